"""Checks across keys: values that are fine one by one and contradict each other."""

from collections.abc import Iterator

from dinov2cli.config.schema import Crops, Evaluation, Ibot, Optim, Student


def contradictions(crops: Crops, student: Student, ibot: Ibot, optim: Optim, evaluation: Evaluation) -> Iterator[str]:
    """Problems, one line each, as `key=value: what is wrong and what would be right`; none when all is well."""
    yield from _crops(crops, student.patch_size)
    for key, (low, high) in (
        ("crops.global_crops_scale", crops.global_crops_scale),
        ("crops.local_crops_scale", crops.local_crops_scale),
        ("ibot.mask_ratio_min_max", ibot.mask_ratio_min_max),
    ):
        if low > high:
            yield f"{key}=[{low}, {high}]: the first number must not exceed the second; write [{high}, {low}]"
    if optim.min_lr > optim.base_lr:
        yield f"optim.min_lr={optim.min_lr:g}: must not exceed optim.base_lr={optim.base_lr:g}"
    dim, _, heads = student.size()
    if dim % heads:
        nearest = min((n for n in range(1, dim + 1) if dim % n == 0), key=lambda n: abs(n - heads))
        yield f"student.num_heads={heads}: must divide student.embed_dim={dim}; student.num_heads={nearest} would"
    if optim.warmup_epochs > optim.epochs:
        yield (
            f"optim.warmup_epochs={optim.warmup_epochs}: the warm-up must not be longer than the run; "
            f"at most optim.epochs={optim.epochs}"
        )
    for key in ("knn_train_dataset", "knn_val_dataset"):
        if evaluation.knn_period > 0 and not getattr(evaluation, key):
            yield (
                f"evaluation.{key}='': evaluation.knn_period={evaluation.knn_period} needs a dataset here; "
                "set it, or evaluation.knn_period=0"
            )


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
