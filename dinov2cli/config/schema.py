"""The groups of keys: every key with its type, bounds, default and meaning.

Groups and keys carry the names of the DINOv2 reference, and the defaults are its `vitl16_short` run; keys of our own
are marked "(dino2)" in their description.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from dinov2cli.config.group import Group, put_first
from dinov2cli.config.vit import ARCHITECTURES, Architecture, ViTOptions
from dinov2cli.requests.eval import EVALUATIONS

if TYPE_CHECKING:
    Task = str
else:
    Task = Literal[tuple(EVALUATIONS)]


def _tuple_from_list(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _without_memeff(value: Any) -> Any:
    # The reference takes `vit_large_memeff` for `vit_large`: the suffix once chose an attention implementation.
    return value.removesuffix("_memeff") if isinstance(value, str) else value


Fraction = Annotated[float, Field(ge=0, le=1)]
AreaRange = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]],
                      BeforeValidator(_tuple_from_list)]  # fmt: skip
FractionRange = Annotated[tuple[Fraction, Fraction], BeforeValidator(_tuple_from_list)]
ThreeFractions = Annotated[tuple[Fraction, Fraction, Fraction], BeforeValidator(_tuple_from_list)]


class ComputePrecision(Group):
    """Arithmetic of the forward and backward passes; losses and softmaxes are float32 whatever is chosen."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="(dino2) Autocast type; auto: bf16 on CUDA, fp32 on CPU. CPU runs are always fp32."
    )
    grad_scaler: bool = Field(True, description="Scale the loss when precision is fp16; no effect otherwise.")


class Dino(Group):
    """Loss and head on the class token."""

    loss_weight: float = Field(1.0, ge=0, description="Weight of the class-token loss.")
    head_n_prototypes: int = Field(65536, ge=2, description="Prototypes, the output size of the head.")
    head_bottleneck_dim: int = Field(256, ge=1, description="Size of the L2-normalised layer before the prototypes.")
    head_nlayers: int = Field(3, ge=1, description="Layers of the head's MLP.")
    head_hidden_dim: int = Field(2048, ge=1, description="Width of the head's MLP.")
    koleo_loss_weight: float = Field(0.1, ge=0, description="Weight of the KoLeo spread regulariser.")


class Ibot(Group):
    """Loss and head on the masked patch tokens."""

    loss_weight: float = Field(1.0, ge=0, description="Weight of the masked-patch loss; 0: no such loss.")
    mask_sample_probability: Fraction = Field(0.5, description="Share of the global crops that are masked.")
    mask_ratio_min_max: FractionRange = Field(
        (0.1, 0.5), description="Lowest and highest share of patches masked in a masked crop."
    )
    separate_head: bool = Field(False, description="Give the patches a head of their own instead of dino's.")
    head_n_prototypes: int = Field(65536, ge=2, description="Prototypes; used with separate_head, as those below.")
    head_bottleneck_dim: int = Field(256, ge=1, description="Size of the L2-normalised layer before the prototypes.")
    head_nlayers: int = Field(3, ge=1, description="Layers of the head's MLP.")
    head_hidden_dim: int = Field(2048, ge=1, description="Width of the head's MLP.")


class Train(Group):
    """The run: data, batch, randomness, files."""

    batch_size_per_gpu: int = Field(64, ge=1, description="Images per process in one forward pass.")
    dataset_path: str = Field(
        "ImageNet:split=TRAIN", description="Training data: a dataset string or a folder of images."
    )
    output_dir: str = Field(".", description="The run folder.")
    seed: int = Field(0, ge=0, description="Seed of initial weights, data order, augmentation and masks.")
    num_workers: int | None = Field(
        None, ge=0, description="Data-loading processes per GPU; null: from the number of cores."
    )
    OFFICIAL_EPOCH_LENGTH: int = Field(1250, ge=1, description="Iterations that count as one epoch in all schedules.")
    centering: Literal["centering", "sinkhorn_knopp"] = Field(
        "centering", description="How teacher outputs are balanced over prototypes."
    )
    gradient_accumulation: int = Field(
        1, ge=1, description="(dino2) Batches of batch_size_per_gpu whose gradients make one optimizer step."
    )
    checkpoint_period: int | None = Field(
        None, ge=1, description="(dino2) Iterations between checkpoints to resume from; null: three epochs."
    )
    keep: int = Field(3, ge=1, description="(dino2) Checkpoints kept; older ones are deleted.")
    log_period: int = Field(10, ge=1, description="(dino2) Iterations between lines of training_metrics.json.")
    max_nonfinite: int = Field(
        3, ge=1, description="(dino2) Consecutive iterations with a non-finite loss after which the run stops."
    )
    max_bad_fraction: Fraction = Field(
        0.01, description="(dino2) Share of unreadable images above which the run stops."
    )
    activation_checkpointing: bool = Field(
        False, description="(dino2) Recompute activations in the backward pass: less memory, about a third slower."
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="(dino2) Run blocks, heads and losses through torch.compile: same results but for rounding, slower "
        "first steps; auto: on a GPU.",
    )
    sharding: Literal["auto", "none", "ddp", "fsdp"] = Field(
        "auto",
        description="(dino2) How several processes share the work: ddp, each with all parameters; fsdp, each with a "
        "part of them; auto: ddp, or fsdp where memory demands it.",
    )
    hang_timeout: int = Field(
        1800,
        ge=0,
        description="(dino2) Seconds without a finished iteration after which the stacks of all processes "
        "are written and the run ends, for its supervisor to restart it; 0: never.",
    )
    tensorboard: bool = Field(
        False, description="(dino2) Log metrics to RUN/logs/tensorboard as well; needs dinov2cli[plots]."
    )
    wandb: bool = Field(False, description="(dino2) Log metrics to Weights & Biases as well; needs dinov2cli[wandb].")


class Student(ViTOptions):
    """The vision transformer that is trained; the teacher has the same architecture."""

    arch: Annotated[
        Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_giant2"], BeforeValidator(_without_memeff)
    ] = Field("vit_large", description="Named size; embed_dim, depth and num_heads override it.")
    drop_path_rate: float = Field(0.3, ge=0, lt=1, description="Stochastic depth: share of samples a block skips.")
    drop_path_uniform: bool = Field(
        True, description="Same drop_path_rate in all blocks; otherwise it rises linearly with depth."
    )
    pretrained_weights: str = Field("", description="Backbone weights to start from; empty: random.")
    freeze_backbone_epochs: int = Field(
        0, ge=0, description="(dino2) Epochs in which only the heads learn, for fresh heads on pretrained weights."
    )
    block_chunks: int = Field(
        0, ge=0, description="Accepted for compatibility; weights are always written with flat block numbers."
    )
    embed_dim: int | None = Field(None, ge=1, description="(dino2) Token size; null: that of arch.")
    depth: int | None = Field(None, ge=1, description="(dino2) Transformer blocks; null: those of arch.")
    num_heads: int | None = Field(None, ge=1, description="(dino2) Attention heads; null: those of arch.")
    attention_backend: Literal["auto", "xformers", "varlen", "sdpa"] = Field(
        "auto", description="(dino2) Attention implementation; all give the same result."
    )

    def size(self) -> Architecture:
        """That of `arch`, where it is not given one by one."""
        named = ARCHITECTURES[self.arch]
        return Architecture(
            self.embed_dim or named.embed_dim, self.depth or named.depth, self.num_heads or named.num_heads
        )


# The reference's order.
put_first(Student, "arch", "patch_size", "drop_path_rate", "layerscale", "drop_path_uniform", "pretrained_weights",
          "freeze_backbone_epochs", "ffn_layer", "block_chunks")  # fmt: skip


class Teacher(Group):
    """The moving average of the student, and its temperature."""

    momentum_teacher: Fraction = Field(0.992, description="Momentum of the moving average at the start.")
    final_momentum_teacher: Fraction = Field(1.0, description="Momentum at the end (half cosine in between).")
    warmup_teacher_temp: float = Field(0.04, gt=0, description="Teacher temperature at the start.")
    teacher_temp: float = Field(0.07, gt=0, description="Teacher temperature after its warm-up.")
    warmup_teacher_temp_epochs: int = Field(
        30, ge=0, description="Epochs of linear temperature warm-up; may exceed the run, which then ends below the top."
    )


class Optim(Group):
    """AdamW and its schedules."""

    epochs: int = Field(100, ge=1, description="Length of the run in epochs of OFFICIAL_EPOCH_LENGTH iterations.")
    weight_decay: float = Field(0.04, ge=0, description="Weight decay at the start.")
    weight_decay_end: float = Field(0.4, ge=0, description="Weight decay at the end (half cosine in between).")
    base_lr: float = Field(0.004, gt=0, description="Peak learning rate at an effective batch of 1024 images.")
    lr: float = Field(
        0.0, ge=0, description="Ignored, as in the reference: the rate used is base_lr after scaling_rule."
    )
    warmup_epochs: int = Field(10, ge=0, description="Epochs of linear learning-rate warm-up from 0.")
    min_lr: float = Field(1e-6, ge=0, description="Learning rate at the end (half cosine after the warm-up).")
    clip_grad: float = Field(3.0, ge=0, description="Largest gradient norm of each submodule; 0: no clipping.")
    freeze_last_layer_epochs: int = Field(1, ge=0, description="Epochs in which the prototypes stay as they are.")
    scaling_rule: Literal["sqrt_wrt_1024", "none"] = Field(
        "sqrt_wrt_1024", description="Peak rate = base_lr * sqrt(effective batch / 1024), or base_lr itself (none)."
    )
    patch_embed_lr_mult: float = Field(0.2, ge=0, description="Learning-rate factor of the patch embedding.")
    layerwise_decay: float = Field(0.9, gt=0, le=1, description="Learning-rate factor from a block to the one below.")
    adamw_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first beta.")
    adamw_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second beta.")


class Crops(Group):
    """Multi-crop augmentation. Sizes in pixels, scales as shares of the image's area."""

    global_crops_number: ClassVar[int] = 2
    """Global crops per image; the losses are defined for two."""

    global_crops_scale: AreaRange = Field((0.32, 1.0), description="Area range of the two global crops.")
    local_crops_number: int = Field(8, ge=0, description="Local crops per image.")
    local_crops_scale: AreaRange = Field((0.05, 0.32), description="Area range of the local crops.")
    global_crops_size: int = Field(224, ge=1, description="Side of the global crops; a multiple of patch_size.")
    local_crops_size: int = Field(96, ge=1, description="Side of the local crops; a multiple of patch_size.")
    blur_prob: ThreeFractions = Field(
        (0.0, 0.9, 0.5),
        description="(dino2) Blur probability of global crop 1, global crop 2 and the local crops. The published code "
        "runs the default; what it spells out is [1.0, 0.1, 0.5].",
    )
    color_jitter_prob: Fraction = Field(
        0.8, description="(dino2) Probability of a jitter of brightness, contrast, saturation and hue."
    )
    grayscale_prob: Fraction = Field(0.2, description="(dino2) Probability that a crop loses its colour.")
    solarize_prob: Fraction = Field(0.2, description="(dino2) Probability that global crop 2 is solarized.")


class Data(Group):
    """(dino2) How images reach the device."""

    normalize_on_device: bool = Field(
        True, description="(dino2) Send crops as uint8 and normalise them on the device; the numbers are the same."
    )
    device_augment: bool = Field(
        False,
        description="(dino2) Loader processes decode and crop only; jitter, grayscale, blur and solarize run batched "
        "on the training device, from the same random numbers.",
    )
    scaled_decode: bool = Field(
        False,
        description="(dino2) Decode a JPEG at 1/2, 1/4 or 1/8 where no crop needs more pixels; faster for large "
        "photos, and crops differ slightly.",
    )


class Evaluation(Group):
    """What is written and measured while training."""

    eval_period_iterations: int = Field(
        12500, ge=0, description="Iterations between teacher checkpoints in eval/; 0: only at the end."
    )
    knn_period: int = Field(0, ge=0, description="(dino2) Iterations between k-NN scores of the teacher; 0: none.")
    knn_train_dataset: str = Field("", description="(dino2) Labelled data whose neighbours vote, for knn_period.")
    knn_val_dataset: str = Field("", description="(dino2) Labelled data that is classified, for knn_period.")
    tasks: Annotated[tuple[Task, ...], BeforeValidator(_tuple_from_list)] = Field(
        (), description="(dino2) Evaluations of every teacher checkpoint, on the data of knn_period."
    )
    tasks_as_jobs: bool = Field(
        False, description="(dino2) Submit these to Slurm, each as a job of its own, and go on training meanwhile."
    )
    slurm: Annotated[tuple[str, ...], BeforeValidator(_tuple_from_list)] = Field(
        (), description="(dino2) KEY=VALUE: sbatch parameters of these jobs, on top of those of the training job."
    )
