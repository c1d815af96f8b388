"""Acceptance of files written by the DINOv2 reference: keys that mean nothing here, and its nested precision."""

from collections.abc import Iterator
from typing import Any

from dinov2cli.console import logger

# Keys of the reference that have no effect there either, and later additions at the value that changes nothing.
WITHOUT_EFFECT: dict[tuple[str, str], tuple[Any, ...] | None] = {  # None: any value
    ("MODEL", "WEIGHTS"): None,
    ("train", "saveckp_freq"): None,
    ("train", "cache_dataset"): None,
    ("train", "cell_augmentation"): (False, None),
    ("gram", "compute_stats"): (False,),
    ("student", "in_chans"): (None,),
    ("student", "channel_adaptive"): (False, None),
}
PRECISIONS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
PRECISIONS |= {name: name for name in PRECISIONS.values()}


def translate(layer: dict[str, Any], origin: str) -> dict[str, Any]:
    """One layer of settings (a file, or the overrides) in our terms; whatever was left out is logged.

    The input is not changed. Values that are wrong are left in place: validation names them.
    """
    layer = {group: dict(keys) if isinstance(keys, dict) else keys for group, keys in layer.items()}
    for note in (*_drop_without_effect(layer), *_drop_derived_lr(layer), *_flatten_precision(layer)):
        logger.info("%s: %s", origin, note)
    return layer


def _drop_without_effect(layer: dict[str, Any]) -> Iterator[str]:
    dropped = []
    for (group, key), values in WITHOUT_EFFECT.items():
        keys = layer.get(group)
        if isinstance(keys, dict) and key in keys and (values is None or keys[key] in values):
            del keys[key]
            dropped.append(f"{group}.{key}")
    if layer.get("MODEL") == {}:
        del layer["MODEL"]
    student = layer.get("student")
    if isinstance(student, dict) and isinstance(chunks := student.get("block_chunks"), int) and chunks > 0:
        student["block_chunks"] = 0  # else the reference would look for this run's weights under chunked names
        yield f"student.block_chunks={chunks} is taken as 0: weights are written with flat block numbers"
    if dropped:
        yield f"keys of the reference without effect, ignored: {', '.join(dropped)}"


def _drop_derived_lr(layer: dict[str, Any]) -> Iterator[str]:
    # The reference overwrites optim.lr from base_lr at every start, so the number in a file is what came out of
    # scaling on that run's GPUs. Taking it as given would scale it twice.
    optim = layer.get("optim")
    if not isinstance(optim, dict) or not isinstance(optim.get("lr"), int | float) or isinstance(optim["lr"], bool):
        return
    if rate := optim.pop("lr"):
        yield (
            f"optim.lr={rate:g} is ignored: as in the reference, the learning rate is derived at start from "
            "optim.base_lr and the effective batch; to change it, set optim.base_lr"
        )


def _flatten_precision(layer: dict[str, Any]) -> Iterator[str]:
    precision = layer.get("compute_precision")
    if not isinstance(precision, dict):
        return
    types: dict[str, Any] = {}
    for side in ("student", "teacher"):
        if isinstance(precision.get(side), dict):
            types |= {f"{side}.{name}": _param_dtype(module) for name, module in precision.pop(side).items()}
    if not types:
        return
    known = {name: PRECISIONS[dtype] for name, dtype in types.items() if dtype in PRECISIONS}
    for name, dtype in types.items():
        if dtype is not None and dtype not in PRECISIONS:
            # Put back as a value of the flat key, where validation will refuse it and list what there is.
            precision.setdefault("precision", dtype)
            yield f"compute_precision.{name} asks for {dtype}"
            return
    if not known:
        yield "compute_precision.{student,teacher}.*: sharding settings of the reference, ignored"
        return
    chosen = known.get("student.backbone", next(iter(known.values())))
    precision.setdefault("precision", chosen)
    mixed = "" if len(set(known.values())) == 1 else " (that of student.backbone; one precision serves all modules)"
    yield (
        f"compute_precision.{{student,teacher}}.*: taken as precision={precision['precision']}{mixed}; "
        "sharding_strategy and reduce_dtype are chosen by dino2"
    )


def _param_dtype(module: Any) -> Any:
    mixed = module.get("mixed_precision") if isinstance(module, dict) else None
    return mixed.get("param_dtype") if isinstance(mixed, dict) else None
