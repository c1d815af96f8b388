"""`dino2 bench gpu`: one file whatever happens to its parts, and parts that the command line knows."""

import json
import time
from pathlib import Path

import pytest

from dinov2cli.bench import gpu
from dinov2cli.cli.main import main
from dinov2cli.requests.bench import BenchGpuRequest


def test_a_part_that_fails_or_takes_too_long_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [
        gpu.Part("fine", ["-c", "print('{\"images_per_s\": 3.5}')"], 60),
        gpu.Part("broken", ["-c", "raise SystemExit('no such kernel')"], 60),
        gpu.Part("endless", ["-c", "import time; time.sleep(60)"], 1),
        gpu.Part("text", ["-c", "print('3 passed')"], 60),
    ]
    monkeypatch.setattr(gpu, "parts", lambda request: some)
    found = gpu.run(BenchGpuRequest(output=tmp_path / "gpu.json", device="cpu"))
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["device"] == "CPU" and written["parts"] == found.figures["parts"]
    parts = written["parts"]
    assert parts["fine"]["result"] == {"images_per_s": 3.5} and parts["text"]["result"] == ["3 passed"]
    assert "no such kernel" in parts["broken"]["error"] and "ended after 1 s" in parts["endless"]["error"]


def test_what_a_part_has_begun_ends_with_it(tmp_path: Path) -> None:
    """A step is measured in a process of its own, which would disturb what is measured next."""
    wait = "import time; time.sleep(60)"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", {wait!r}])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    found = gpu.measure(gpu.Part("endless", ["-S", "-c", code], 3), 60)
    assert "ended after 3 s" in found["error"]
    child = Path("/proc") / (tmp_path / "child").read_text()
    for _ in range(50):
        if not child.exists() or "(zombie)" in (child / "status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError("it is still there")


def test_without_time_nothing_begins(tmp_path: Path) -> None:
    found = gpu.run(BenchGpuRequest(output=tmp_path / "gpu.json", device="cpu", minutes=1e-9))
    assert {part["error"] for part in found.figures["parts"].values()} == {"not run: no time was left"}


def test_every_part_is_a_command_line_that_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [part.words[2:] for part in gpu.parts(BenchGpuRequest()) if part.words[1] == "dinov2cli"]
    assert len(lines) == 12
    said = [" ".join(line) for line in lines]
    for what in ("--kernels 25", "data.device_augment=true", "--compile off", "--attention xformers", "bench knn"):
        assert any(what in line for line in said)
    for words in lines:
        if words[0] == "doctor":
            continue
        # Unknown options and values are refused before a device that is not there.
        with pytest.raises(SystemExit) as stop:
            main([word if word != "cuda" else "cuda:99" for word in words])
        assert stop.value.code == 2 and "cuda:99: this machine has" in capsys.readouterr().err, words
