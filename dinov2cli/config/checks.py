"""Checks across keys: values that are fine one by one and contradict each other."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dinov2cli.config.schema import Config


def contradictions(config: "Config") -> list[str]:
    """Problems, one line each, as `key=value: what is wrong and what would be right`; empty when all is well."""
    checks = (_crops, _ranges, _heads, _schedules, _online_knn)
    return [problem for check in checks for problem in check(config)]


def _crops(config: "Config") -> Iterator[str]:
    crops, patch = config.crops, config.student.patch_size
    sizes = {"global_crops_size": crops.global_crops_size}
    if crops.local_crops_number > 0:
        sizes["local_crops_size"] = crops.local_crops_size
    for key, size in sizes.items():
        if size % patch:
            below, above = size // patch * patch, -(-size // patch) * patch
            nearest = f"{below} or {above}" if below else f"{above}"
            yield f"crops.{key}={size}: must be a multiple of student.patch_size={patch}, such as {nearest}"
    if crops.local_crops_number > 0 and crops.global_crops_size < crops.local_crops_size:
        yield (
            f"crops.global_crops_size={crops.global_crops_size}: must be at least "
            f"crops.local_crops_size={crops.local_crops_size}; swap them, or make the global crops larger"
        )


def _ranges(config: "Config") -> Iterator[str]:
    ranges: Iterable[tuple[str, tuple[float, float]]] = (
        ("crops.global_crops_scale", config.crops.global_crops_scale),
        ("crops.local_crops_scale", config.crops.local_crops_scale),
        ("ibot.mask_ratio_min_max", config.ibot.mask_ratio_min_max),
    )
    for key, (low, high) in ranges:
        if low > high:
            yield f"{key}=[{low}, {high}]: the first number must not exceed the second; write [{high}, {low}]"
    if config.optim.min_lr > config.optim.base_lr:
        yield f"optim.min_lr={config.optim.min_lr:g}: must not exceed optim.base_lr={config.optim.base_lr:g}"


def _heads(config: "Config") -> Iterator[str]:
    embed_dim, _, num_heads = config.arch()
    if embed_dim % num_heads:
        fitting = [heads for heads in range(1, embed_dim + 1) if embed_dim % heads == 0]
        nearest = min(fitting, key=lambda heads: abs(heads - num_heads))
        yield (
            f"student.num_heads={num_heads}: must divide student.embed_dim={embed_dim}; "
            f"student.num_heads={nearest} would"
        )


def _schedules(config: "Config") -> Iterator[str]:
    optim = config.optim
    if optim.warmup_epochs > optim.epochs:
        yield (
            f"optim.warmup_epochs={optim.warmup_epochs}: the warm-up must not be longer than the run; "
            f"at most optim.epochs={optim.epochs}"
        )


def _online_knn(config: "Config") -> Iterator[str]:
    evaluation = config.evaluation
    if evaluation.knn_period > 0:
        for key in ("knn_train_dataset", "knn_val_dataset"):
            if not getattr(evaluation, key):
                yield (
                    f"evaluation.{key}='': evaluation.knn_period={evaluation.knn_period} needs a dataset here; "
                    "set it, or evaluation.knn_period=0"
                )
