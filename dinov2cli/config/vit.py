"""What a vision transformer is made of, each option declared once with its text and bounds. Imports no torch.

A new option is a field here. From then on it is a key of a run's `student` group and an argument of
`VisionTransformer`; resuming, starting from weights, exports and the key of cached features heed it, as they loop over
the fields. What is left to write is what it does (`models.layers`, `models.vision_transformer`) and how weights show it
(`models.load.infer`).
"""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError, model_validator

from dinov2cli.config.group import Group, key, put_first


class Architecture(NamedTuple):
    """Size of a vision transformer."""

    embed_dim: int
    depth: int
    num_heads: int


class TrainedPart(NamedTuple):
    """What of a backbone is trained: `all`, the `last` so many blocks, or `lora` adapters of such a rank."""

    kind: str
    number: int = 0


ARCHITECTURES = {
    "vit_tiny": Architecture(192, 12, 3),
    "vit_small": Architecture(384, 12, 6),
    "vit_base": Architecture(768, 12, 12),
    "vit_large": Architecture(1024, 24, 16),
    "vit_giant2": Architecture(1536, 40, 24),
}

InitialScale = Annotated[
    float | None, Field(ge=0, title="LayerScale", description="Initial LayerScale; 0 or null: no LayerScale.")
]


class ViTOptions(Group):
    """The options that a run sets in its `student` group. A field's title is its name in a sentence."""

    patch_size: int = key(16, "Side of a patch in pixels.", ge=1, title="patch size")
    layerscale: InitialScale = 1e-5
    ffn_layer: Literal["mlp", "swiglu", "swiglufused", "swiglu64"] = key(
        "mlp",
        "Feed-forward layer; swiglu and swiglufused are the same, swiglu64 rounds the width up to a multiple of 64.",
        title="feed-forward layer",
    )
    qkv_bias: bool = key(True, "Bias in the query, key and value projections.", title="qkv bias")
    proj_bias: bool = key(True, "Bias in the attention's output projection.", title="projection bias")
    ffn_bias: bool = key(True, "Biases in the feed-forward layer.", title="feed-forward bias")
    num_register_tokens: int = key(0, "Register tokens.", ge=0, title="registers")
    interpolate_antialias: bool = key(False, "Antialias when position embeddings are resized.", title="antialiasing")
    interpolate_offset: float = key(
        0.1, "Offset added to the size when position embeddings are resized; 0: exact size.", ge=0, lt=1, title="offset"
    )
    in_chans: int = key(3, "Image channels.", ge=1, title="image channels")
    norm_layer: Literal["layernorm", "layernormbf16", "rmsnorm"] = key(
        "layernorm",
        "Normalisation: layernorm adds 1e-6 to the variance, layernormbf16 1e-5; rmsnorm is without mean and bias.",
        title="normalisation",
    )
    pos_embed_type: Literal["learned", "rope"] = key(
        "learned",
        "Positions: learned embeddings of DINOv2, or rope: DINOv3's rotation of queries and keys.",
        title="positions",
    )
    pos_embed_rope_base: float = key(100.0, "Longest period of the rotation, nearly.", gt=1, title="RoPE base")
    pos_embed_rope_min_period: float | None = key(
        None, "Shortest period, in place of the base; with the longest.", gt=0, title="shortest RoPE period"
    )
    pos_embed_rope_max_period: float | None = key(
        None, "Longest period, in place of the base; with the shortest.", gt=0, title="longest RoPE period"
    )
    pos_embed_rope_normalize_coords: Literal["separate", "max", "min"] = key(
        "separate", "What -1 to 1 is: each side of an image, the longer, or the shorter.", title="RoPE coordinates"
    )
    pos_embed_rope_dtype: Literal["fp32", "bf16"] = key(
        "fp32", "Arithmetic of the rotation; DINOv3 was trained in bf16 and is used in fp32.", title="RoPE arithmetic"
    )
    n_storage_tokens: int = key(
        0, "Storage tokens: DINOv3's name of registers, behind which they stand.", ge=0, title="storage tokens"
    )
    mask_k_bias: bool = key(False, "No bias of the keys beside those of queries and values.", title="masked key bias")
    untie_cls_and_patch_norms: bool = key(
        False, "A last normalisation of their own for class and storage tokens.", title="class tokens' own norm"
    )
    untie_global_and_local_cls_norm: bool = key(
        False, "In training, another one for those of local crops.", title="local class tokens' own norm"
    )


RESIZING = ("interpolate_antialias", "interpolate_offset")
"""How position embeddings are resized: no weights show it, and weights fit models that do it otherwise."""
OF_DINOV3 = tuple(ViTOptions.model_fields)[tuple(ViTOptions.model_fields).index("in_chans") + 1 :]
"""What its successor has added: those after `in_chans`."""
ROPE = tuple(name for name in ViTOptions.model_fields if name.startswith("pos_embed_rope_"))
"""Of rotary positions. Weights show the periods alone."""


class ViTConfig(ViTOptions):
    """All that a backbone is; of two equal ones, the same weights compute the same.

    Instead of `hidden_dim`, `mlp_ratio` may be given: the width of an MLP over `embed_dim`, 4 by default; a SwiGLU
    layer has two thirds of it, see `swiglu_width`.

    Raises:
        ValueError: an unknown option, a value out of its bounds, or values that do not fit each other.
    """

    layerscale: InitialScale = None
    embed_dim: int = key(768, "Size of a token.", ge=1, title="width")
    depth: int = key(12, "Transformer blocks.", ge=1, title="depth")
    num_heads: int = key(12, "Attention heads.", ge=1, title="attention heads")
    img_size: int = key(224, "Native side in pixels, for which the position embeddings are.", ge=1, title="image size")
    hidden_dim: int = key(3072, "Width within the feed-forward layer.", ge=1, title="hidden width")

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise ValueError("; ".join(map(_in_words, error.errors(include_url=False)))) from None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, options: dict[str, Any]) -> dict[str, Any]:
        options = dict(options)
        ratio = options.pop("mlp_ratio", None if "hidden_dim" in options else 4.0)
        width, layer = options.get("embed_dim", cls.model_fields["embed_dim"].default), options.get("ffn_layer", "mlp")
        if isinstance(width, int) and isinstance(ratio, int | float):
            mlp_width, multiple = int(width * ratio), 64 if layer == "swiglu64" else 8
            options["hidden_dim"] = mlp_width if layer == "mlp" else swiglu_width(mlp_width, multiple)
        options["ffn_layer"] = "swiglu" if layer in ("swiglufused", "swiglu64") else layer
        options["layerscale"] = options.get("layerscale") or None
        return options

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ViTConfig":
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} is not a multiple of patch_size {self.patch_size}")
        if self.pos_embed_type == "rope" and self.embed_dim // self.num_heads % 4:
            raise ValueError(f"heads {self.embed_dim // self.num_heads} wide: RoPE needs a multiple of 4")
        if (self.pos_embed_rope_min_period is None) != (self.pos_embed_rope_max_period is None):
            raise ValueError("pos_embed_rope_min_period and pos_embed_rope_max_period are given together, or neither")
        return self

    @property
    def is_rotary(self) -> bool:
        """Whether positions are rotations of queries and keys (RoPE), and no weights."""
        return self.pos_embed_type == "rope"

    @property
    def grid(self) -> int:
        """Patches along one side at the native size."""
        return self.img_size // self.patch_size

    @property
    def prefix_names(self) -> tuple[str, ...]:
        """The tokens of an image before its patches, in their order."""
        registers = (f"register {i + 1}" for i in range(self.num_register_tokens))
        return "cls", *registers, *(f"storage {i + 1}" for i in range(self.n_storage_tokens))

    @property
    def prefix_tokens(self) -> int:
        """How many these are."""
        return len(self.prefix_names)

    @property
    def name(self) -> str:
        """The known name of the width, depth and heads (`vit_small`), or `vit` for others."""
        size = (self.embed_dim, self.depth, self.num_heads)
        return next((name for name, known in ARCHITECTURES.items() if known == size), "vit")

    @property
    def ffn_ratio(self) -> float:
        """The `mlp_ratio` that gives such a feed-forward layer, whose width is a multiple of 8 if it is SwiGLU."""
        return self.hidden_dim * (1.0 if self.ffn_layer == "mlp" else 1.5) / self.embed_dim

    def changed(self, **options: Any) -> "ViTConfig":
        """The same with other options. Errors as those of the class."""
        return ViTConfig(**{**self.model_dump(), **options})

    def describe(self) -> str:
        """One line for people, such as `vit_small/14, 384 wide, 12 blocks, 6 heads, mlp, native 518x518`."""
        registers = f", {self.num_register_tokens} registers" if self.num_register_tokens else ""
        registers += f", {self.n_storage_tokens} storage tokens" if self.n_storage_tokens else ""
        registers += ", RoPE" if self.is_rotary else ""
        channels = f", {self.in_chans} channels" if self.in_chans != 3 else ""
        return (
            f"{self.name}/{self.patch_size}, {self.embed_dim} wide, {self.depth} blocks, {self.num_heads} heads, "
            f"{self.ffn_layer}{registers}{channels}, native {self.img_size}x{self.img_size}"
        )


# The order in the metadata of exported files.
put_first(ViTConfig, "embed_dim", "depth", "num_heads", "patch_size", "img_size", "in_chans", "hidden_dim", "ffn_layer",
          "num_register_tokens")  # fmt: skip


def swiglu_width(mlp_width: int, multiple: int = 8) -> int:
    """Width of the SwiGLU layer in the place of an MLP: two thirds of it, rounded up to a multiple.

    So the parameters are about as many.
    """
    return -(-int(mlp_width * 2 / 3) // multiple) * multiple


def _in_words(problem: Any) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    key, value = problem["loc"][-1], problem["input"]
    if problem["type"] == "literal_error":
        known = ", ".join(ViTOptions.model_fields[key].annotation.__args__)  # type: ignore[union-attr]
        return f"{key} {value!r} is unknown; known: {known}"
    if problem["type"] == "extra_forbidden":
        return f"a vision transformer has no option {key!r}"
    return f"{key} {value!r}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
