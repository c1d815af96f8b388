"""The configuration: all groups of keys, checked as a whole.

It is frozen, and derived values (learning rate after scaling, iterations, periods) are methods, so that nothing derived
is stored.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import yaml
from pydantic import model_validator

from dinov2cli.config import schema
from dinov2cli.config.crops import Crops, Resolution
from dinov2cli.config.images import IMAGENET_MEAN, ImageOptions, Images
from dinov2cli.config.library import OF_VIT, LibraryConfig
from dinov2cli.config.vit import Architecture, ViTConfig, ViTOptions
from dinov2cli.files import write_text, writing


class Config(schema.Groups):
    """Everything that defines a run. Build it with `load_config`, or `Config()` for the defaults.

    Raises `pydantic.ValidationError` when built directly from wrong values; `load_config` turns that into a
    `ConfigError` with one line per problem.
    """

    @model_validator(mode="after")
    def _no_contradictions(self) -> "Config":
        if problems := list(_contradictions(self)):
            raise ValueError("\n".join(problems))
        return self

    def arch(self) -> Architecture:
        """`(embed_dim, depth, num_heads)` of the backbone: those of `student.arch` where not given one by one."""
        return self.student.size()

    def vit(self) -> ViTConfig:
        """The backbone that the student and the teacher have."""
        options = {key: getattr(self.student, key) for key in ViTOptions.model_fields}
        size = {**self.arch()._asdict(), "mlp_ratio": self.student.ffn_ratio}
        return ViTConfig(**options, **size, img_size=self.crops.largest().global_size)

    def backbone(self) -> ViTConfig | LibraryConfig:
        """What the student and the teacher have: `vit`, or a backbone of another library."""
        student = self.student
        if (library := student.library()) is None:
            return self.vit()
        return LibraryConfig(
            library=library,
            name=student.arch.partition(":")[2],
            arguments=student.backbone_config,
            in_chans=student.in_chans,
            patch_size=student.patch_size,
            img_size=self.crops.largest().global_size,
        )

    def at(self, resolution: Resolution) -> "Config":
        """The run as it is in an iteration of this resolution; to be built from, not saved."""
        sides = {"global_crops_size": resolution.global_size, "local_crops_size": resolution.local_size}
        more = {"gram_teacher_crops_size": resolution.gram_teacher_size, "global_local_crop_pairs_ratios": (1.0,)}
        return self.model_copy(update={"crops": self.crops.model_copy(update=sides | more)})

    def images(self) -> Images:
        """What the backbone expects of its images."""
        options = {key: getattr(self.data, key) for key in ImageOptions.model_fields}
        return Images(**options, in_chans=self.student.in_chans)

    def iterations(self, epochs: int | None = None) -> int:
        """Iterations of so many epochs, by default of the whole run."""
        return (self.optim.epochs if epochs is None else epochs) * self.train.OFFICIAL_EPOCH_LENGTH

    def checkpoint_period(self) -> int:
        """Iterations between checkpoints to resume from: `train.checkpoint_period`, or three epochs."""
        return self.train.checkpoint_period or self.iterations(3)

    def effective_batch(self, world_size: int = 1) -> int:
        """Images per optimizer step over all processes and accumulated batches."""
        return self.train.batch_size_per_gpu * world_size * self.train.gradient_accumulation

    def scaled_lr(self, world_size: int = 1) -> float:
        """Peak learning rate: `base_lr * sqrt(effective batch / 1024)`, as in the reference implementation."""
        if self.optim.scaling_rule == "none":
            return self.optim.base_lr
        return self.optim.base_lr * math.sqrt(self.effective_batch(world_size) / 1024.0)

    def compares_all_patches(self) -> bool:
        """Whether the patch loss is of every patch of the global crops, instead of those that masks choose."""
        distillation = self.distillation
        return bool(distillation.teacher) and distillation.patches == "all" and self.ibot.loss_weight > 0

    def deviations(self) -> list[str]:
        """In which of its switches this run departs from what the published reference code does, one line each."""
        return list(_deviations(self))

    def to_yaml(self) -> str:
        """The complete configuration, every key written out: it alone reproduces the run."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=10_000)

    def save(self, path: str | Path) -> None:
        """Write `to_yaml()` to `path`, creating its folder. The file appears complete or not at all.

        Raises:
            EnvironmentProblem: the file cannot be written.
        """
        with writing(Path(path)):
            write_text(Path(path), self.to_yaml())


def _contradictions(config: Config) -> Iterator[str]:
    """Values that are fine one by one and do not fit each other: `key=value: what is wrong and what would be right`."""
    crops, student, optim = config.crops, config.student, config.optim
    if lists := list(_unfit_lists(crops)):
        yield from lists
        return  # what else there is to say would be of sides that do not go together
    yield from _unfit_crops(config)
    yield from _unfit_channels(config.data, student.in_chans)
    for key, (low, high) in (
        ("crops.global_crops_scale", crops.global_crops_scale),
        ("crops.local_crops_scale", crops.local_crops_scale),
        ("ibot.mask_ratio_min_max", config.ibot.mask_ratio_min_max),
    ):
        if low > high:
            yield f"{key}=[{low}, {high}]: the first number must not exceed the second; write [{high}, {low}]"
    if optim.min_lr > optim.base_lr:
        yield f"optim.min_lr={optim.min_lr:g}: must not exceed optim.base_lr={optim.base_lr:g}"
    dim, depth, heads = student.size()
    if student.library():
        yield from _unfit_library(config)
    elif student.backbone_config:
        yield f"student.backbone_config={student.backbone_config}: is for student.arch=hf:NAME or timm:NAME"
    elif not (dim and depth and heads):
        yield "student.arch=vit: give student.embed_dim, student.depth and student.num_heads, or a named size"
    elif dim % heads:
        nearest = min((n for n in range(1, dim + 1) if dim % n == 0), key=lambda n: abs(n - heads))
        yield f"student.num_heads={heads}: must divide student.embed_dim={dim}; student.num_heads={nearest} would"
    elif student.pos_embed_type == "rope" and dim // heads % 4:
        yield f"student.num_heads={heads}: heads {dim // heads} wide; RoPE needs a width that is a multiple of 4"
    else:
        yield from _unfit_part(student)
    yield from _unfit_rope(student)
    if student.untie_global_and_local_cls_norm and not crops.local_crops_number:
        yield "student.untie_global_and_local_cls_norm=true: there are no local crops (crops.local_crops_number=0)"
    if optim.warmup_epochs > optim.epochs:
        yield (
            f"optim.warmup_epochs={optim.warmup_epochs}: the warm-up must not be longer than the run; "
            f"at most optim.epochs={optim.epochs}"
        )
    yield from config.distillation.contradictions()
    yield from config.gram.contradictions()
    if (config.dino.local_loss_weight_schedule is not None) != config.dino.reweight_dino_local_loss:
        set_one = str(config.dino.reweight_dino_local_loss).lower()
        yield (
            f"dino.reweight_dino_local_loss={set_one}: goes with dino.local_loss_weight_schedule, as both are set or "
            "neither"
        )
    yield from config.evaluation.contradictions()
    for key in ("knn_train_dataset", "knn_val_dataset"):
        if config.evaluation.knn_period > 0 and not getattr(config.evaluation, key):
            yield (
                f"evaluation.{key}='': evaluation.knn_period={config.evaluation.knn_period} needs a dataset here; "
                "set it, or evaluation.knn_period=0"
            )


def _unfit_lists(crops: Crops) -> Iterator[str]:
    ratios = crops.global_local_crop_pairs_ratios
    lists = {name: sides for name, sides in crops.sides().items() if isinstance(sides, tuple)}
    for name, sides in lists.items():
        if len(sides) != len(ratios):
            yield (
                f"crops.{name}={list(sides)}: has {len(sides)} sides, and crops.global_local_crop_pairs_ratios="
                f"{list(ratios)} {len(ratios)}; give as many of both"
            )
    if not lists and len(ratios) > 1:
        yield f"crops.global_local_crop_pairs_ratios={list(ratios)}: is for lists of sides, and there is none"
    if abs(sum(ratios) - 1) > 1e-6:
        yield f"crops.global_local_crop_pairs_ratios={list(ratios)}: add up to {sum(ratios):g}, and must to 1"


def _unfit_crops(config: Config) -> Iterator[str]:
    crops, patch, uses_gram = config.crops, config.student.patch_size, config.gram.has_own_teacher()
    for name, given in crops.sides().items():
        if name == "local_crops_size" and not crops.local_crops_number:
            continue
        for size in given if isinstance(given, tuple) else [given]:
            if size is not None and size % patch:
                below, above = size // patch * patch, -(-size // patch) * patch
                nearest = f"{below} or {above}" if below else f"{above}"
                yield f"crops.{name}={size}: must be a multiple of student.patch_size={patch}, such as {nearest}"
    for each in crops.resolutions():
        if crops.local_crops_number > 0 and each.global_size < each.local_size:
            yield (
                f"crops.global_crops_size={each.global_size}: must be at least crops.local_crops_size="
                f"{each.local_size}; swap them, or make the global crops larger"
            )
        if each.gram_teacher_size is not None and each.gram_teacher_size < each.global_size:
            yield (
                f"crops.gram_teacher_crops_size={each.gram_teacher_size}: must be at least crops.global_crops_size="
                f"{each.global_size}"
            )
    if (larger := crops.gram_teacher_crops_size) is not None and not uses_gram:
        why = "gram.ema_teacher=true has" if config.gram.use_loss else "gram.use_loss=false has"
        shown = list(larger) if isinstance(larger, tuple) else larger
        yield f"crops.gram_teacher_crops_size={shown}: {why} no Gram teacher to see such crops; set it to null"
    if crops.gram_teacher_crops_size and config.data.device_augment and not crops.gram_teacher_no_distortions:
        yield (
            "data.device_augment=true: the Gram teacher's crops are made in the loader processes; set "
            "crops.gram_teacher_no_distortions=true, or data.device_augment=false"
        )


def _unfit_part(student: schema.Student) -> Iterator[str]:
    part, (dim, depth, _) = student.trained(), student.size()
    if part.kind == "all":
        return
    if not student.pretrained_weights:
        yield f"student.train={student.train}: the rest would stay random; set student.pretrained_weights (--init-from)"
    if part.kind == "last" and part.number > depth:
        yield f"student.train={student.train}: there are {depth} blocks; at most last:{depth}, or all"
    if part.kind == "lora" and part.number >= dim:
        yield f"student.train={student.train}: layers of {dim} have no higher rank; a small one such as lora:16, or all"


def _unfit_library(config: Config) -> Iterator[str]:
    student = config.student
    if not config.distillation.teacher:
        yield (
            f"student.arch={student.arch}: can only be distilled (--teacher), as DINO's and iBOT's training by itself "
            "masks patches, which needs a vision transformer"
        )
    for name in OF_VIT:
        if (value := getattr(student, name)) != (default := schema.Student.model_fields[name].default):
            yield (
                f"student.{name}={value}: is of vision transformers, and {student.arch} has options of its own in "
                f"student.backbone_config; leave it at {'null' if default is None else default}"
            )
    if config.gram.use_loss:
        yield f"gram.use_loss=true: Gram anchoring is of vision transformers, not of student.arch={student.arch}"
    if config.train.activation_checkpointing:
        yield (
            f"train.activation_checkpointing={str(config.train.activation_checkpointing).lower()}: is of vision "
            f"transformers, not of student.arch={student.arch}; take smaller batches and train.gradient_accumulation"
        )


def _unfit_rope(student: schema.Student) -> Iterator[str]:
    periods = ("pos_embed_rope_min_period", "pos_embed_rope_max_period")
    missing = [name for name in periods if getattr(student, name) is None]
    if len(missing) == 1:
        yield f"student.{missing[0]}=null: the shortest and the longest period are given together, or neither"
    if student.pos_embed_type != "rope":
        for name in (name for name in schema.Student.model_fields if name.startswith("pos_embed_rope_")):
            if getattr(student, name) != schema.Student.model_fields[name].default:
                yield f"student.{name}={getattr(student, name)}: needs rotary positions, student.pos_embed_type=rope"


def _unfit_channels(data: schema.Data, wanted: int) -> Iterator[str]:
    if data.channels and len(data.channels) != wanted:
        yield f"student.in_chans={wanted}: data.channels names {len(data.channels)}; set student.in_chans to that"
    for key in ("mean", "std"):
        if (levels := getattr(data, key)) is not None and len(levels) != wanted:
            yield f"data.{key}={list(levels)}: must be {wanted} numbers, one a channel, as student.in_chans={wanted}"
    if (data.mean is None) != (data.std is None):
        missing = "mean" if data.mean is None else "std"
        yield f"data.{missing}=null: data.mean and data.std are given together, or neither"
    if data.mean is None and data.std is None and wanted != len(IMAGENET_MEAN):
        yield (
            f"data.mean=null: ImageNet's is of 3 channels, and student.in_chans={wanted}; measure yours with "
            "dino2 datasets stats DATASET"
        )


def _deviations(config: Config) -> Iterator[str]:
    precision, train = config.compute_precision, config.train
    if precision.precision != "fp16":
        used = {"auto": "bf16 on CUDA, fp32 on CPU"}.get(precision.precision, precision.precision)
        yield f"compute_precision.precision={precision.precision}: {used}; the reference runs fp16 with a scaler"
    elif not precision.grad_scaler:
        yield "compute_precision.grad_scaler=false: fp16 without a gradient scaler, which the reference uses"
    of_colours = ("color_jitter_prob", "grayscale_prob", "solarize_prob")
    of_distillation = (
        ("student.drop_path_rate", 0, "the paper distils without stochastic depth"),
        ("train.centering", "sinkhorn_knopp", "the reference distils with sinkhorn_knopp"),
        ("ibot.separate_head", True, "the reference distils with a head of the patches' own"),
        ("distillation.patches", "masked", "the reference compares those that masks choose"),
    )
    for key, reference, what in (
        ("crops.blur_prob", Crops.model_fields["blur_prob"].default, "the published code runs [0.0, 0.9, 0.5]"),
        *((f"crops.{name}", (usual := Crops.model_fields[name].default), f"the reference uses {usual}")
          for name in of_colours),
        ("data.exif_orientation", False, "images are turned upright as EXIF says; the reference shows them as stored"),
        ("data.background", "drop",
         "what is transparent shows this background; the reference shows the colours hidden there (drop)"),
        ("train.gradient_accumulation", 1,
         f"centering, Sinkhorn-Knopp and KoLeo see {train.batch_size_per_gpu} images per process at a time; the "
         "reference has no accumulation"),
        *(of_distillation if config.distillation.teacher else ()),
        ("optim.scaling_rule", "sqrt_wrt_1024", "the reference knows only sqrt_wrt_1024"),
        ("train.max_nonfinite", 1, "the reference stops at the first non-finite loss"),
        ("train.max_bad_fraction", 0, "an unreadable image is logged and replaced; the reference stops at the first"),
    ):  # fmt: skip
        group, name = key.split(".")
        value = getattr(getattr(config, group), name)
        if value != reference:
            shown = (
                list(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else value
            )
            yield f"{key}={shown}: {what}"
