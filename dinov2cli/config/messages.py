"""Validation errors as a person wants to read them: one line each, with the key, the value and the remedy."""

import difflib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from dinov2cli.config.tree import FIELDS, GROUPS, choices, expectation
from dinov2cli.errors import ConfigError, did_you_mean

# Names that people try, which no spelling distance would lead to the right key.
_OTHER_NAMES = {
    "lr": "optim.base_lr",
    "learning_rate": "optim.base_lr",
    "batch_size": "train.batch_size_per_gpu",
    "data": "train.dataset_path",
    "dataset": "train.dataset_path",
    "dim": "student.embed_dim",
    "heads": "student.num_heads",
    "model": "student.arch",
    "ffn": "student.ffn_layer",
    "wd": "optim.weight_decay",
    "local_crops": "crops.local_crops_number",
    "workers": "train.num_workers",
    "accumulation_steps": "train.gradient_accumulation",
    "image_size": "crops.global_crops_size",
    "dtype": "compute_precision.precision",
    "fp16": "compute_precision.precision",
    "bf16": "compute_precision.precision",
    "registers": "student.num_register_tokens",
}


def explain(error: ValidationError, layers: Sequence[tuple[dict[str, Any], str]]) -> ConfigError:
    """All problems of a failed validation in one `ConfigError`, one line each.

    Args:
        layers: of keys, each with its source, a file or preset; the later win. What was typed has no source.
    """
    lines: list[str] = []
    unknown = False
    for problem in error.errors(include_url=False):
        path = [str(part) for part in problem["loc"] if not isinstance(part, int)][:2]  # a value may have parts
        unknown = unknown or (problem["type"] == "extra_forbidden" and ".".join(path) not in FIELDS)
        for line in _lines(problem, path, said_by(layers, path)[0]):
            about = path or line.partition("=")[0].split(".")  # a contradiction names its first key
            source = said_by(layers, about)[1]
            line = f"{line} (in {source})" if source else line
            if line not in lines:
                lines.append(line)
    hint = "Every key, with its default: dino2 presets show vitl16_short --full" if unknown else None
    return ConfigError("\n".join(lines), hint=hint)


def suggest(key: str) -> str | None:
    """The known key that an unknown one most likely means, or None: a right name in a wrong group, or a misspelling."""
    leaf = key.rsplit(".", 1)[-1].lower()
    if leaf in _OTHER_NAMES:
        return _OTHER_NAMES[leaf]
    candidates = [known for known in FIELDS if known != "optim.lr"]  # which has no effect
    best = max(candidates, key=lambda known: _likeness(key, known))
    return best if _likeness(key, best) >= 0.7 else None


_ABSENT = object()


def said_by(layers: Sequence[tuple[dict[str, Any], str]], path: list[str]) -> tuple[Any, str]:
    """The value of a key, and the source that says it, of those of `explain`."""
    found = ((_lookup(layer, path), source) for layer, source in reversed(layers))
    return next((each for each in found if each[0] is not _ABSENT), (_ABSENT, ""))


def _lines(problem: Any, path: list[str], value: Any) -> Iterator[str]:
    key = ".".join(path)
    if not path:  # contradictions between keys, already in words
        yield from str(problem["ctx"]["error"]).splitlines()
        return
    if problem["type"] == "extra_forbidden" and key not in FIELDS:
        yield _unknown_key(key, value)
    elif key in FIELDS:
        guess = did_you_mean(str(value).lower(), choices(FIELDS[key]) or ())
        guess = "; write it in quotes" if problem["type"] == "string_type" else guess
        yield f"{key}={_shown(value)}: must be {expectation(FIELDS[key])}{guess}"
    else:
        example = next(name for name in FIELDS if name.startswith(f"{path[0]}."))
        yield f"{key}={_shown(value)}: is a group of keys; name one of them, such as {example}"


def _unknown_key(key: str, value: Any) -> str:
    if "." not in key and isinstance(value, dict):
        return f"{key}: no such group" + did_you_mean(key.lower(), GROUPS, f"; groups: {', '.join(GROUPS)}")
    closest = suggest(key)
    shown = key if isinstance(value, dict) else f"{key}={_shown(value)}"
    if closest:
        return f"{shown}: no such key; did you mean {closest}?"
    group = key.split(".")[0]
    known = [name.split(".")[1] for name in FIELDS if name.startswith(f"{group}.")]
    there = f"{group} has {', '.join(known)}" if known else f"groups: {', '.join(GROUPS)}"
    return f"{shown}: no such key; {there}"


def _likeness(key: str, known: str) -> float:
    key, known = key.lower(), known.lower()
    leaf, known_leaf = key.rsplit(".", 1)[-1], known.rsplit(".", 1)[-1]
    likeness = difflib.SequenceMatcher(None, leaf, known_leaf).ratio()
    if len(leaf) >= 3 and (leaf in known_leaf or known_leaf in leaf):
        likeness = max(likeness, 0.7 + 0.2 * likeness)
    return likeness + (0.1 if key.split(".")[0] == known.split(".")[0] else 0.0)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value if value and value == value.strip() else repr(value)
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _lookup(layer: Any, path: list[str]) -> Any:
    for name in path:
        if not isinstance(layer, dict) or name not in layer:
            return _ABSENT
        layer = layer[name]
    return layer
