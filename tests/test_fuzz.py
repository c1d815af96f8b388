"""Hostile input, see `fuzz.py`: nothing is executed or written elsewhere, nothing hangs, each refusal is a message."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz import KINDS, fuzz

from dinov2cli.config import load_config
from dinov2cli.errors import ConfigError
from dinov2cli.files import parse_json, parse_yaml


@pytest.mark.long
def test_mutated_files_and_strings_are_read_or_refused() -> None:
    found = fuzz(0, range(100 * len(KINDS)), list(KINDS))
    assert found["faults"] == []
    counts = found["counts"]
    assert all(sum(counts[kind].values()) == 100 and counts[kind].get("refused", 0) >= 10 for kind in KINDS)
    assert sum(count.get("read", 0) for count in counts.values()) >= 90


@pytest.mark.long
def test_the_fuzz_sees_what_it_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the unpickler's guard down, its payloads run, and are noticed."""
    monkeypatch.setenv("FUZZ_UNGUARDED", "1")
    found = fuzz(0, range(80), ["weights"])
    seen = " ".join(fault["outcome"] for fault in found["faults"])
    assert all(what in seen for what in ("os.system", "subprocess.Popen", "the canary"))


def test_a_few_lines_of_aliases_are_no_config(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="aliases make more than"):
        load_config(config_file=tmp_path / "c.yaml")
    shared = parse_yaml("a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}, e: *a}")
    assert shared == {"a": [1, 2], "b": [1, 2], "c": {"d": 1, "e": [1, 2]}}


@pytest.mark.parametrize("text", ["[" * 9999, "2001-19-99", "&a [*a]", "? [a]\n: b", "!!python/name:os.system", "{a"])
def test_yaml_that_is_none_is_an_error_of_yaml(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


@pytest.mark.parametrize("text", ["[" * 99999, "{", "", b"\xff"])
def test_json_that_is_none_is_a_value_error(text: Any) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_a_pickle_that_calls_is_refused_by_name(tmp_path: Path) -> None:
    import os

    import torch

    from dinov2cli.errors import WeightsError
    from dinov2cli.models.load import load_model

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'canary'}",)

    torch.save({"x": Payload()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"could run code; refused"):
        load_model(tmp_path / "w.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(WeightsError):
        load_model(tmp_path / "old.pth")
    assert not (tmp_path / "canary").exists()
