"""The groups of keys: every key with its type, bounds, default and meaning.

Groups and keys carry the names of the DINOv2 reference, and the defaults are its `vitl16_short` run; keys of our own
are marked "(dino2)" in their description.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, model_validator

from dinov2cli.config.crops import Crops, Fraction
from dinov2cli.config.distillation import Distillation
from dinov2cli.config.gram import Gram, ScheduleOfWeight
from dinov2cli.config.group import Group, key, put_first
from dinov2cli.config.images import FromList, ImageOptions
from dinov2cli.config.library import ARCH, VITS, Arguments, GivenArguments, library_of
from dinov2cli.config.vit import ARCHITECTURES, Architecture, TrainedPart, ViTOptions
from dinov2cli.errors import ConfigError
from dinov2cli.requests.eval import EvalRequest
from dinov2cli.requests.images import Words
from dinov2cli.requests.protocols import EVALUATIONS, task_request

if TYPE_CHECKING:
    Task = str
else:
    Task = Literal[tuple(EVALUATIONS)]


def _without_memeff(value: Any) -> Any:
    # The reference takes `vit_large_memeff` for `vit_large`: the suffix once chose an attention implementation.
    return value.removesuffix("_memeff") if isinstance(value, str) else value


ARCHS = f"one of {', '.join(VITS)}; or hf:NAME or timm:NAME, of another library"
FractionRange = Annotated[tuple[Fraction, Fraction], FromList]
Tasks = Annotated[tuple[Task, ...], FromList]
Texts = Annotated[tuple[str, ...], FromList]


class ComputePrecision(Group):
    """Arithmetic of the forward and backward passes; losses and softmaxes are float32 whatever is chosen."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = key(
        "auto", "(dino2) Autocast type; auto: bf16 on CUDA, fp32 on CPU. CPU runs are always fp32."
    )
    grad_scaler: bool = key(True, "Scale the loss when precision is fp16; no effect otherwise.")


class Dino(Group):
    """Loss and head on the class token."""

    loss_weight: float = key(1.0, "Weight of the class-token loss.", ge=0)
    head_n_prototypes: int = key(65536, "Prototypes, the output size of the head.", ge=2)
    head_bottleneck_dim: int = key(256, "Size of the L2-normalised layer before the prototypes.", ge=1)
    head_nlayers: int = key(3, "Layers of the head's MLP.", ge=1)
    head_hidden_dim: int = key(2048, "Width of the head's MLP.", ge=1)
    koleo_loss_weight: float = key(0.1, "Weight of the KoLeo spread regulariser.", ge=0)
    reweight_dino_local_loss: bool = key(False, "Weigh the local crops' part of the loss by a schedule.")
    local_loss_weight_schedule: ScheduleOfWeight | None = key(
        None, "That schedule, as gram.loss_weight_schedule; 1 is the weight without one."
    )


class Ibot(Group):
    """Loss and head on the masked patch tokens."""

    loss_weight: float = key(1.0, "Weight of the masked-patch loss; 0: no such loss.", ge=0)
    mask_sample_probability: Fraction = key(0.5, "Share of the global crops that are masked.")
    mask_ratio_min_max: FractionRange = key((0.1, 0.5), "Lowest and highest share of patches masked in a masked crop.")
    separate_head: bool = key(False, "Give the patches a head of their own instead of dino's.")
    head_n_prototypes: int = key(65536, "Prototypes; used with separate_head, as those below.", ge=2)
    head_bottleneck_dim: int = key(256, "Size of the L2-normalised layer before the prototypes.", ge=1)
    head_nlayers: int = key(3, "Layers of the head's MLP.", ge=1)
    head_hidden_dim: int = key(2048, "Width of the head's MLP.", ge=1)


class Train(Group):
    """The run: data, batch, randomness, files."""

    batch_size_per_gpu: int = key(64, "Images per process in one forward pass.", ge=1)
    dataset_path: str = key("ImageNet:split=TRAIN", "Training data: a dataset string or a folder of images.")
    output_dir: str = key(".", "The run folder.")
    seed: int = key(0, "Seed of initial weights, data order, augmentation and masks.", ge=0)
    num_workers: int | None = key(None, "Data-loading processes per GPU; null: from the number of cores.", ge=0)
    OFFICIAL_EPOCH_LENGTH: int = key(1250, "Iterations that count as one epoch in all schedules.", ge=1)
    centering: Literal["centering", "sinkhorn_knopp"] = key(
        "centering", "How teacher outputs are balanced over prototypes."
    )
    gradient_accumulation: int = key(
        1, "(dino2) Batches of batch_size_per_gpu whose gradients make one optimizer step.", ge=1
    )
    checkpoint_period: int | None = key(
        None, "(dino2) Iterations between checkpoints to resume from; null: three epochs.", ge=1
    )
    keep: int = key(3, "(dino2) Checkpoints kept; older ones are deleted.", ge=1)
    log_period: int = key(10, "(dino2) Iterations between lines of training_metrics.json.", ge=1)
    max_nonfinite: int = key(
        3, "(dino2) Consecutive iterations with a non-finite loss after which the run stops.", ge=1
    )
    stop_on_collapse: int = key(
        0,
        "(dino2) Stop, saved, when the monitors have found a collapse so often in a row, each log_period; 0: never.",
        ge=0,
    )
    max_bad_fraction: Fraction = key(0.01, "(dino2) Share of unreadable images above which the run stops.")
    activation_checkpointing: Literal["selective", True, False] = key(
        False,
        "(dino2) Recompute activations in the backward pass, for less memory: selective, what takes no matrix "
        "product or attention; true, all of a block, for about a quarter more time.",
    )
    compile: Literal["auto", True, False] = key(
        "auto",
        "(dino2) Run blocks, heads and losses through torch.compile: same results but for rounding, slower "
        "first steps; auto: on a GPU.",
    )
    sharding: Literal["auto", "none", "ddp", "fsdp"] = key(
        "auto",
        "(dino2) How several processes share the work: ddp, each with all parameters; fsdp, each with a "
        "part of them; auto: ddp, or fsdp where memory demands it.",
    )
    hang_timeout: int = key(
        1800,
        "(dino2) Seconds without a finished iteration, or four times as many before training begins or without any "
        "progress of an evaluation, after which the stacks of all processes are written and the run ends, for its "
        "supervisor to restart it; 0: never.",
        ge=0,
    )
    tensorboard: bool = key(False, "(dino2) Log metrics to RUN/logs/tensorboard as well; needs dinov2cli[plots].")
    wandb: bool = key(False, "(dino2) Log metrics to Weights & Biases as well; needs dinov2cli[wandb].")


class Student(ViTOptions):
    """The vision transformer that is trained; the teacher has the same architecture."""

    arch: Annotated[str, BeforeValidator(_without_memeff), Words(ARCHS, str, VITS)] = key(
        "vit_large",
        "Named size; vit: that of embed_dim, depth and num_heads, which override a name. Or, to be distilled, an "
        "architecture of another library: hf:NAME or hf:FOLDER, what AutoBackbone of transformers takes; timm:NAME.",
        pattern=ARCH.pattern,
    )
    backbone_config: GivenArguments = key(
        Arguments(),
        "(dino2) Arguments of an architecture of another library, such as {depths: [2, 2]}; dino2 fills in the rest.",
    )
    drop_path_rate: float = key(0.3, "Stochastic depth: share of samples a block skips.", ge=0, lt=1)
    drop_path_uniform: bool = key(True, "Same drop_path_rate in all blocks; otherwise it rises linearly with depth.")
    ffn_ratio: float = key(
        4.0, "Width of the feed-forward layer over the token size; SwiGLU has two thirds of it.", gt=0
    )
    pos_embed_rope_shift_coords: float | None = key(
        None, "RoPE, in training: each axis of the coordinates is moved by a number from minus to plus this.", gt=0
    )
    pos_embed_rope_jitter_coords: float | None = key(
        None, "RoPE, in training: then each axis is stretched by a factor from its inverse to this.", gt=1
    )
    pos_embed_rope_rescale_coords: float | None = key(
        None, "RoPE, in training: then both axes alike by such a factor; DINOv3's recipe has 2.", gt=1
    )
    pretrained_weights: str = key("", "Backbone weights to start from; empty: random.")
    pretrained_channels: Literal["same", "mean", "repeat", "zero-new"] = key(
        "same",
        "(dino2) How these start a model with another number of image channels: every channel gets the mean of "
        "their patch filters (mean), or theirs in turn (repeat), scaled so that equal channels give what they gave; or "
        "the first channels theirs, and those that are new zeros (zero-new).",
    )
    pretrained_patches: Literal["same", "resize"] = key(
        "same", "(dino2) How these start a model with another patch size: by resizing their patch filters (resize)."
    )
    train: Annotated[str, Words("all, last:N or lora:R", str)] = key(
        "all",
        "(dino2) What of these weights is trained, beside the heads: all; last:N, the last N blocks and the last norm; "
        "lora:R, low-rank adapters of rank R beside every linear layer, merged in the teacher and what is exported.",
        pattern=r"^(all|(last|lora):[1-9][0-9]{0,3})$",
    )
    freeze_backbone_epochs: int = key(
        0, "(dino2) Epochs in which only the heads learn, for fresh heads on pretrained weights.", ge=0
    )
    block_chunks: Annotated[int, AfterValidator(lambda _: 0)] = key(
        0, "Accepted for compatibility and taken as 0: weights are always written with flat block numbers.", ge=0
    )
    embed_dim: int | None = key(None, "(dino2) Token size; null: that of arch.", ge=1)
    depth: int | None = key(None, "(dino2) Transformer blocks; null: those of arch.", ge=1)
    num_heads: int | None = key(None, "(dino2) Attention heads; null: those of arch.", ge=1)
    attention_backend: Literal["auto", "xformers", "varlen", "sdpa"] = key(
        "auto", "(dino2) Attention implementation; all give the same result."
    )

    @model_validator(mode="before")
    @classmethod
    def _say_the_size_once(cls, keys: Any) -> Any:
        """No name stays beside another size: the reference would build the named one, and leave blocks random."""
        if not isinstance(keys, dict) or not (given := {k: keys[k] for k in Architecture._fields if keys.get(k)}):
            return keys
        named = ARCHITECTURES.get(str(_without_memeff(keys.get("arch", cls.model_fields["arch"].default))))
        size = {**(named._asdict() if named else {}), **given}
        known = next((name for name, known in ARCHITECTURES.items() if known._asdict() == size), None)
        if known is not None:
            return {**keys, "arch": known, **dict.fromkeys(Architecture._fields)}
        return {**keys, "arch": "vit", **size} if named else keys

    def library(self) -> str | None:
        """`hf` or `timm`, if the backbone is one of these; None for a vision transformer."""
        return library_of(self.arch)

    def trained(self) -> TrainedPart:
        """`train`, taken apart."""
        kind, _, number = self.train.partition(":")
        return TrainedPart(kind, int(number or 0))

    def size(self) -> Architecture:
        """That of `arch`, or the one given in its place; of no use for another library's."""
        return ARCHITECTURES.get(self.arch) or Architecture(*(getattr(self, name) for name in Architecture._fields))


# The reference's order.
put_first(Student, "arch", "patch_size", "drop_path_rate", "layerscale", "drop_path_uniform", "pretrained_weights",
          "freeze_backbone_epochs", "ffn_layer", "block_chunks")  # fmt: skip


class Teacher(Group):
    """The moving average of the student, and its temperature."""

    momentum_teacher: Fraction = key(0.992, "Momentum of the moving average at the start.")
    final_momentum_teacher: Fraction = key(1.0, "Momentum at the end (half cosine in between).")
    warmup_teacher_temp: float = key(0.04, "Teacher temperature at the start.", gt=0)
    teacher_temp: float = key(0.07, "Teacher temperature after its warm-up.", gt=0)
    warmup_teacher_temp_epochs: int = key(
        30, "Epochs of linear temperature warm-up; may exceed the run, which then ends below the top.", ge=0
    )


class Optim(Group):
    """AdamW and its schedules."""

    epochs: int = key(100, "Length of the run in epochs of OFFICIAL_EPOCH_LENGTH iterations.", ge=1)
    weight_decay: float = key(0.04, "Weight decay at the start.", ge=0)
    weight_decay_end: float = key(0.4, "Weight decay at the end (half cosine in between).", ge=0)
    base_lr: float = key(0.004, "Peak learning rate at an effective batch of 1024 images.", gt=0)
    lr: float = key(0.0, "Ignored, as in the reference: the rate used is base_lr after scaling_rule.", ge=0)
    warmup_epochs: int = key(10, "Epochs of linear learning-rate warm-up from 0.", ge=0)
    min_lr: float = key(1e-6, "Learning rate at the end (half cosine after the warm-up).", ge=0)
    clip_grad: float = key(3.0, "Largest gradient norm of each submodule; 0: no clipping.", ge=0)
    freeze_last_layer_epochs: int = key(1, "Epochs in which the prototypes stay as they are.", ge=0)
    scaling_rule: Literal["sqrt_wrt_1024", "none"] = key(
        "sqrt_wrt_1024", "Peak rate = base_lr * sqrt(effective batch / 1024), or base_lr itself (none)."
    )
    patch_embed_lr_mult: float = key(0.2, "Learning-rate factor of the patch embedding.", ge=0)
    layerwise_decay: float = key(0.9, "Learning-rate factor from a block to the one below.", gt=0, le=1)
    adamw_beta1: float = key(0.9, "AdamW's first beta.", ge=0, lt=1)
    adamw_beta2: float = key(0.999, "AdamW's second beta.", ge=0, lt=1)


class Data(ImageOptions):
    """(dino2) What is read of image files, and how images reach the device."""

    max_image_gb: float = key(
        3.0, "(dino2) Largest memory in GB that decoding one image may need; larger ones count as unreadable.", gt=0
    )
    normalize_on_device: bool = key(
        True, "(dino2) Send crops as uint8 and normalise them on the device; the numbers are the same."
    )
    device_augment: bool = key(
        False,
        "(dino2) Loader processes decode and crop only; jitter, grayscale, blur and solarize run batched "
        "on the training device, from the same random numbers.",
    )
    scaled_decode: bool = key(
        False,
        "(dino2) Decode a JPEG at 1/2, 1/4 or 1/8 where no crop needs more pixels; faster for large "
        "photos, and crops differ slightly.",
    )


put_first(Data, "normalize_on_device", "device_augment", "scaled_decode")


class Evaluation(Group):
    """What is written and measured while training."""

    eval_period_iterations: int = key(
        12500, "Iterations between teacher checkpoints in eval/; 0: only at the end.", ge=0
    )
    knn_period: int = key(0, "(dino2) Iterations between k-NN scores of the teacher; 0: none.", ge=0)
    knn_train_dataset: str = key("", "(dino2) Labelled data whose neighbours vote, for knn_period.")
    knn_val_dataset: str = key("", "(dino2) Labelled data that is classified, for knn_period.")
    tasks: Tasks = key((), "(dino2) Evaluations of every teacher checkpoint, on the data of knn_period or their own.")
    task_options: GivenArguments = key(
        Arguments(), "(dino2) Options of dino2 eval for these, by task: {segmentation: {iterations: 1000}}."
    )
    segmentation_dataset: str = key("", "(dino2) Images with masks, train and val, for the task segmentation.")
    depth_dataset: str = key("", "(dino2) Images with depth, train and val, for the task depth.")
    tasks_as_jobs: bool = key(
        False, "(dino2) Submit these to Slurm, each as a job of its own, and go on training meanwhile."
    )
    slurm: Texts = key((), "(dino2) KEY=VALUE: sbatch parameters of these jobs, on top of those of the training job.")

    def request(self, task: str, checkpoint: str, device: str | None = None) -> EvalRequest:
        """One of `tasks`, with its options, of a teacher checkpoint."""
        return task_request(task, self.task_options.get(task, {}), checkpoint, device)

    def contradictions(self) -> Iterator[str]:
        """Of `task_options`, what no evaluation takes, one line each."""
        for task, options in self.task_options.items():
            if task not in EVALUATIONS or not isinstance(options, dict):
                tasks = ", ".join(EVALUATIONS)
                yield f"evaluation.task_options.{task}={options}: must be {{TASK: {{OPTION: VALUE}}}}, of {tasks}"
                continue
            try:
                self.request(task, "a teacher")
            except ConfigError as error:
                yield error.message


class Groups(Group):
    """All of them, in the order of files and tables."""

    compute_precision: ComputePrecision = ComputePrecision()
    dino: Dino = Dino()
    ibot: Ibot = Ibot()
    train: Train = Train()
    student: Student = Student()
    teacher: Teacher = Teacher()
    distillation: Distillation = Distillation()
    gram: Gram = Gram()
    optim: Optim = Optim()
    crops: Crops = Crops()
    data: Data = Data()
    evaluation: Evaluation = Evaluation()
