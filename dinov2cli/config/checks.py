"""Checks across keys: values that are fine one by one and contradict each other."""

from collections.abc import Iterable, Iterator

from dinov2cli.config.schema import Crops, Evaluation, Ibot, Optim, Student


def contradictions(crops: Crops, student: Student, ibot: Ibot, optim: Optim, evaluation: Evaluation) -> list[str]:
    """Problems, one line each, as `key=value: what is wrong and what would be right`; empty when all is well."""
    return [
        *_crops(crops, student.patch_size),
        *_ranges(crops, ibot, optim),
        *_heads(student),
        *_schedules(optim),
        *_online_knn(evaluation),
    ]


def _crops(crops: Crops, patch: int) -> Iterator[str]:
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


def _ranges(crops: Crops, ibot: Ibot, optim: Optim) -> Iterator[str]:
    ranges: Iterable[tuple[str, tuple[float, float]]] = (
        ("crops.global_crops_scale", crops.global_crops_scale),
        ("crops.local_crops_scale", crops.local_crops_scale),
        ("ibot.mask_ratio_min_max", ibot.mask_ratio_min_max),
    )
    for key, (low, high) in ranges:
        if low > high:
            yield f"{key}=[{low}, {high}]: the first number must not exceed the second; write [{high}, {low}]"
    if optim.min_lr > optim.base_lr:
        yield f"optim.min_lr={optim.min_lr:g}: must not exceed optim.base_lr={optim.base_lr:g}"


def _heads(student: Student) -> Iterator[str]:
    embed_dim, _, num_heads = student.size()
    if embed_dim % num_heads:
        fitting = [heads for heads in range(1, embed_dim + 1) if embed_dim % heads == 0]
        nearest = min(fitting, key=lambda heads: abs(heads - num_heads))
        yield (
            f"student.num_heads={num_heads}: must divide student.embed_dim={embed_dim}; "
            f"student.num_heads={nearest} would"
        )


def _schedules(optim: Optim) -> Iterator[str]:
    if optim.warmup_epochs > optim.epochs:
        yield (
            f"optim.warmup_epochs={optim.warmup_epochs}: the warm-up must not be longer than the run; "
            f"at most optim.epochs={optim.epochs}"
        )


def _online_knn(evaluation: Evaluation) -> Iterator[str]:
    if evaluation.knn_period > 0:
        for key in ("knn_train_dataset", "knn_val_dataset"):
            if not getattr(evaluation, key):
                yield (
                    f"evaluation.{key}='': evaluation.knn_period={evaluation.knn_period} needs a dataset here; "
                    "set it, or evaluation.knn_period=0"
                )
