"""What a DINOv2 backbone is made of, inferred from the shapes of its weights.

Legend: D width, N patches at the native size, R registers, P patch size, H hidden width of the feed-forward layer.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from dinov2cli.config import ARCHITECTURES
from dinov2cli.errors import WeightsError
from dinov2cli.models.vision_transformer import VisionTransformer

Shape = tuple[int, ...]


@dataclass(frozen=True)
class VitArchitecture:
    """Everything that `VisionTransformer` needs to hold a given set of weights.

    `img_size` is the native image side in pixels, for which the position embeddings were made. `layerscale` says
    whether the blocks have LayerScale; the initial value is no property of trained weights.
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    img_size: int
    in_chans: int = 3
    hidden_dim: int = 0
    ffn_layer: str = "mlp"
    num_register_tokens: int = 0
    layerscale: bool = True
    qkv_bias: bool = True
    proj_bias: bool = True
    ffn_bias: bool = True
    interpolate_antialias: bool = False
    interpolate_offset: float = 0.1

    @property
    def grid(self) -> int:
        """Patches along one side at the native size."""
        return self.img_size // self.patch_size

    @property
    def name(self) -> str:
        """The known name of the width, depth and heads (`vit_small`), or `vit` for others."""
        size = (self.embed_dim, self.depth, self.num_heads)
        return next((name for name, known in ARCHITECTURES.items() if known == size), "vit")

    def describe(self) -> str:
        """One line for people, such as `vit_small/14, 384 wide, 12 blocks, 6 heads, mlp, native 518x518`."""
        registers = f", {self.num_register_tokens} registers" if self.num_register_tokens else ""
        channels = f", {self.in_chans} channels" if self.in_chans != 3 else ""
        return (
            f"{self.name}/{self.patch_size}, {self.embed_dim} wide, {self.depth} blocks, {self.num_heads} heads, "
            f"{self.ffn_layer}{registers}{channels}, native {self.img_size}x{self.img_size}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def arguments(self) -> dict[str, Any]:
        """The arguments of `VisionTransformer`."""
        return {
            "img_size": self.img_size,
            "patch_size": self.patch_size,
            "in_chans": self.in_chans,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "mlp_ratio": self._mlp_ratio(),
            "ffn_layer": self.ffn_layer,
            "qkv_bias": self.qkv_bias,
            "proj_bias": self.proj_bias,
            "ffn_bias": self.ffn_bias,
            "layerscale": 1.0 if self.layerscale else None,
            "num_register_tokens": self.num_register_tokens,
            "interpolate_antialias": self.interpolate_antialias,
            "interpolate_offset": self.interpolate_offset,
        }

    def build(self, **overrides: Any) -> VisionTransformer:
        """A `VisionTransformer` of this architecture with random weights; `overrides` go to its constructor."""
        return VisionTransformer(**{**self.arguments(), **overrides})

    def shapes(self) -> dict[str, Shape]:
        """The canonical (flat) state dict's keys and shapes."""
        dim, hidden = self.embed_dim, self.hidden_dim
        shapes: dict[str, Shape] = {
            "cls_token": (1, 1, dim),
            "pos_embed": (1, 1 + self.grid**2, dim),
            "mask_token": (1, dim),
            "patch_embed.proj.weight": (dim, self.in_chans, self.patch_size, self.patch_size),
            "patch_embed.proj.bias": (dim,),
            "norm.weight": (dim,),
            "norm.bias": (dim,),
        }
        if self.num_register_tokens:
            shapes["register_tokens"] = (1, self.num_register_tokens, dim)
        linears = {"attn.qkv": (3 * dim, dim, self.qkv_bias), "attn.proj": (dim, dim, self.proj_bias)}
        if self.ffn_layer == "mlp":
            linears |= {"mlp.fc1": (hidden, dim, self.ffn_bias), "mlp.fc2": (dim, hidden, self.ffn_bias)}
        else:
            linears |= {"mlp.w12": (2 * hidden, dim, self.ffn_bias), "mlp.w3": (dim, hidden, self.ffn_bias)}
        for i in range(self.depth):
            for norm in ("norm1", "norm2"):
                shapes[f"blocks.{i}.{norm}.weight"] = shapes[f"blocks.{i}.{norm}.bias"] = (dim,)
            for name, (rows, columns, bias) in linears.items():
                shapes[f"blocks.{i}.{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"blocks.{i}.{name}.bias"] = (rows,)
            if self.layerscale:
                shapes[f"blocks.{i}.ls1.gamma"] = shapes[f"blocks.{i}.ls2.gamma"] = (dim,)
        return shapes

    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def _mlp_ratio(self) -> float:
        if self.ffn_layer == "mlp":
            return _ratio(self.hidden_dim, self.embed_dim)
        for mlp_width in (4 * self.embed_dim, (3 * self.hidden_dim + 1) // 2):
            if swiglu_width(mlp_width) == self.hidden_dim:
                return _ratio(mlp_width, self.embed_dim)
        raise WeightsError(f"a SwiGLU layer cannot be {self.hidden_dim} wide: it must be a multiple of 8")


def swiglu_width(mlp_width: int) -> int:
    """Width of the SwiGLU layer in the place of an MLP: two thirds of it, rounded up to a multiple of 8."""
    return (int(mlp_width * 2 / 3) + 7) // 8 * 8


def _ratio(width: int, embed_dim: int) -> float:
    ratio = width / embed_dim
    return ratio if int(embed_dim * ratio) == width else (width + 0.5) / embed_dim  # the model rounds down


# Hints about what shapes cannot show: keys of VitArchitecture, from a config.yaml, an HF config.json or file metadata.
Hints = Mapping[str, Any]


def infer_architecture(state: Mapping[str, Tensor], hints: Hints, source: str) -> VitArchitecture:
    """The architecture of canonical weights; `hints` add what shapes cannot show and must not contradict them.

    Raises:
        WeightsError: a part is missing, shapes contradict each other or the hints, or the heads cannot be known.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for key, ndim in (("cls_token", 3), ("pos_embed", 3), ("patch_embed.proj.weight", 4)):
        if key not in shapes:
            raise WeightsError(f"{source}: incomplete weights, '{key}' is missing")
        if len(shapes[key]) != ndim:
            raise WeightsError(f"{source}: '{key}' has shape {shapes[key]}, expected {ndim} dimensions")
    dim, in_chans, patch, patch_w = shapes["patch_embed.proj.weight"]
    if patch != patch_w:
        raise WeightsError(f"{source}: patches of {patch}x{patch_w} pixels; only square ones are supported")
    indices = {int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}
    if not indices or indices != set(range(len(indices))):
        gaps = sorted(set(range(max(indices, default=0) + 1)) - indices)
        raise WeightsError(f"{source}: incomplete weights, transformer blocks {gaps} are missing")
    ffn_layer, hidden = _feed_forward(shapes, source)
    registers = shapes.get("register_tokens", (1, 0, dim))[1]
    architecture = VitArchitecture(
        embed_dim=dim,
        depth=len(indices),
        num_heads=0,
        patch_size=patch,
        img_size=_grid(shapes["pos_embed"], source) * patch,
        in_chans=in_chans,
        hidden_dim=hidden,
        ffn_layer=ffn_layer,
        num_register_tokens=registers,
        layerscale="blocks.0.ls1.gamma" in shapes,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        proj_bias="blocks.0.attn.proj.bias" in shapes,
        ffn_bias=f"blocks.0.mlp.{'fc1' if ffn_layer == 'mlp' else 'w12'}.bias" in shapes,
        # How the released models interpolate: those with registers exactly and antialiased, the others with an offset.
        interpolate_antialias=bool(registers),
        interpolate_offset=0.0 if registers else 0.1,
    )
    return _with_hints(architecture, hints, source)


def check_complete(state: Mapping[str, Tensor], architecture: VitArchitecture, source: str) -> None:
    """Refuse weights that do not have exactly the keys and shapes of `architecture`, with finite numbers.

    Raises:
        WeightsError: naming the keys that are missing, too many or of another shape.
    """
    expected = architecture.shapes()
    missing = [name for name in expected if name not in state]
    unknown = [name for name in state if name not in expected]
    if missing or unknown:
        parts = [f"missing: {_some(missing)}"] * bool(missing) + [f"unknown: {_some(unknown)}"] * bool(unknown)
        raise WeightsError(f"{source}: not the weights of {architecture.describe()}; {'; '.join(parts)}")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise WeightsError(f"{source}: '{name}' has shape {tuple(state[name].shape)}, expected {shape}")
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise WeightsError(f"{source}: weights that are not finite numbers (NaN or infinity): {_some(broken)}")


def _feed_forward(shapes: Mapping[str, Shape], source: str) -> tuple[str, int]:
    if "blocks.0.mlp.fc1.weight" in shapes:
        return "mlp", shapes["blocks.0.mlp.fc1.weight"][0]
    if "blocks.0.mlp.w12.weight" in shapes:
        return "swiglu", shapes["blocks.0.mlp.w12.weight"][0] // 2
    raise WeightsError(
        f"{source}: incomplete weights, block 0 has neither 'blocks.0.mlp.fc1.weight' (MLP) nor "
        "'blocks.0.mlp.w12.weight' (SwiGLU)"
    )


def _grid(pos_embed: Shape, source: str) -> int:
    patches = pos_embed[1] - 1
    grid = math.isqrt(max(patches, 0))
    if grid < 1 or grid * grid != patches:
        raise WeightsError(f"{source}: {pos_embed[1]} position embeddings are not 1 + a square number of patches")
    return grid


def _with_hints(architecture: VitArchitecture, hints: Hints, source: str) -> VitArchitecture:
    for key in ("embed_dim", "depth", "patch_size", "ffn_layer", "num_register_tokens"):
        stated, found = hints.get(key), getattr(architecture, key)
        if stated is not None and stated != found:
            raise WeightsError(
                f"{source}: {hints.get('from', 'its description')} says {key}={stated}, but the weights have {found}"
            )
    heads = hints.get("num_heads") or next(
        (heads for dim, _, heads in ARCHITECTURES.values() if dim == architecture.embed_dim), None
    )
    if heads is None:
        known = ", ".join(str(dim) for dim, _, _ in sorted(ARCHITECTURES.values()))
        raise WeightsError(
            f"{source}: the number of attention heads of a model {architecture.embed_dim} wide cannot be known from "
            f"its weights (known widths: {known})",
            hint="Put the run's config.yaml beside the file, or pass num_heads=... to load_model.",
        )
    if architecture.embed_dim % heads:
        raise WeightsError(f"{source}: a width of {architecture.embed_dim} does not divide into {heads} heads")
    interpolation = {
        key: hints[key] for key in ("interpolate_antialias", "interpolate_offset") if hints.get(key) is not None
    }
    return replace(architecture, num_heads=heads, **interpolation)


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
