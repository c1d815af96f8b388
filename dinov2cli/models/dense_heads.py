"""Heads that give a frozen backbone's patches a class or a depth, and both together as one model.

Names of parameters are those of the released files (DINOv2 model card; Oquab et al. 2023, section 7.4; the DPT head is
that of Ranftl et al. 2021).

Shape legend: B images, C channels, H x W pixels, h x w patches, D width, F inputs of a head, K classes, N bins.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from dinov2cli.errors import WeightsError
from dinov2cli.models.library_backbone import Backbone

Features = Sequence[tuple[Tensor, Tensor]]
"""Of each block that a head reads, earliest first: patch tokens [B, D, h, w] and class token [B, D]."""

_FOUR_BLOCKS = {24: (4, 11, 17, 23)}  # as released; of other depths the ends of quarters
_BIN_WEIGHTS = {
    "linear": lambda scores: (positive := torch.relu(scores) + 0.1) / positive.sum(dim=1, keepdim=True),
    "softmax": lambda scores: torch.softmax(scores, dim=1),
    "sigmoid": lambda scores: (share := torch.sigmoid(scores)) / share.sum(dim=1, keepdim=True),
}


class HeadConfig(BaseModel):
    """What a head is beyond its weights; written beside them, as they do not show it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Literal["segmentation", "depth"]
    layers: tuple[int, ...] = Field((), description="blocks that are read, by index; empty: as the released heads do")
    norm: bool | None = Field(None, description="whether the final norm is applied; None: in segmentation alone")
    min_depth: float = Field(0.001, description="metres; depths are clamped to the range", ge=0)
    max_depth: float = Field(10.0, description="metres", gt=0)
    bin_weights: Literal["linear", "softmax", "sigmoid"] = Field("linear", description="from scores of bins to weights")
    classes: tuple[str, ...] = Field((), description="names, in order; empty: not known")
    palette: tuple[tuple[int, int, int], ...] = Field((), description="RGB of the classes; empty: generated")
    dataset: str = Field("", description="of the labels, for people")
    backbone: str = Field("", description="weights that it was trained on, as --model takes them; empty: not known")
    fingerprint: str = Field("", description="`fingerprint_of` that model; empty: not known")
    short_side: int | None = Field(None, description="pixels of the short side of test images", ge=1)
    window: int | None = Field(None, description="side in pixels of the windows they are seen by; None: as that", ge=1)

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if list(self.layers) != sorted({layer for layer in self.layers if layer >= 0}):
            raise ValueError(f"layers {self.layers}: must be indices of blocks, in order")
        if self.min_depth >= self.max_depth:
            raise ValueError(f"depths from {self.min_depth} to {self.max_depth} m: must be a range")
        if self.classes and self.palette and len(self.classes) != len(self.palette):
            raise ValueError(f"a palette of {len(self.palette)} colours for {len(self.classes)} classes")
        return self

    @property
    def uses_norm(self) -> bool:
        return self.task == "segmentation" if self.norm is None else self.norm


class DenseHead(nn.Module):
    """What the heads share.

    Args:
        in_channels: F, over all blocks that are read.
        config: what the weights do not show.
    """

    tokens_read = 1
    """1: patch tokens alone; 2: the class token, too, beside each of them."""

    def __init__(self, in_channels: int, config: HeadConfig) -> None:
        super().__init__()
        self.in_channels, self.config = in_channels, config

    def predict(self, features: Features, size: tuple[int, int]) -> Tensor:
        """What `forward` gives, stretched bilinearly to `size` (H, W): [B, K or 1, H, W]; depths within their range."""
        low = self(features)
        if self.config.task == "depth":
            low = low.clamp(self.config.min_depth, self.config.max_depth)
        return F.interpolate(low, size=size, mode="bilinear", align_corners=False)

    def blocks_read(self, backbone: Backbone) -> tuple[int, ...]:
        """Indices of the blocks of `backbone` that the head reads.

        Raises:
            WeightsError: it does not fit the backbone; widths and depths are named.
        """
        width, depth = backbone.embed_dim * self.tokens_read, backbone.depth
        count = len(self.config.layers) or self.in_channels // width
        known = (1, 4) if self.config.task == "depth" else tuple(range(1, depth + 1))
        fits = count * width == self.in_channels and max((count, *(i + 1 for i in self.config.layers))) <= depth
        if not fits or (not self.config.layers and count not in known):
            of = "patch and class token" if self.tokens_read == 2 else "patch tokens"
            blocks = f"blocks {', '.join(map(str, self.config.layers))}" if self.config.layers else "1 or 4 blocks"
            sizes = ", ".join(str(number * width) for number in ([count] if self.config.layers else [1, 4]))
            raise WeightsError(
                f"a {self.config.task} head with {self.in_channels} inputs does not fit a backbone "
                f"{backbone.embed_dim} wide with {depth} blocks: of the {of} of {blocks} it would take {sizes}",
                self.config.backbone and f"It was trained on {self.config.backbone}.",
            )
        if self.config.layers:
            return self.config.layers
        return spread_blocks(depth) if (self.config.task, count) == ("depth", 4) else last_blocks(depth, count)


class SegmentationHead(DenseHead):
    """BatchNorm and a 1x1 convolution on the patch tokens of one or several blocks, concatenated.

    Args:
        in_channels: F = D times the number of blocks.
        num_classes: K.
        config: as in `DenseHead`.
    """

    def __init__(
        self, in_channels: int, num_classes: int, config: HeadConfig = HeadConfig(task="segmentation")
    ) -> None:
        super().__init__(in_channels, config)
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv_seg = nn.Conv2d(in_channels, num_classes, kernel_size=1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def forward(self, features: Features) -> Tensor:
        """Logits of the patches, [B, K, h, w]."""
        logits: Tensor = self.conv_seg(self.bn(torch.cat([patches for patches, _ in features], dim=1)))
        return logits


class DepthHead(DenseHead):
    """A 1x1 convolution to N bins of depth, evenly from the least to the greatest; depth is their weighted mean.

    The reference enlarges the tokens four times before it; here their scores are, which is the same sum in another
    order, for a sixteenth of the work and F/N of the memory.

    Args:
        in_channels: F = 2D times the number of blocks.
        num_bins: N.
        config: as in `DenseHead`; gives the range and how scores become weights.
    """

    tokens_read = 2
    upsampling = 4

    def __init__(self, in_channels: int, num_bins: int = 256, config: HeadConfig = HeadConfig(task="depth")) -> None:
        super().__init__(in_channels, config)
        self.conv_depth = nn.Conv2d(in_channels, num_bins, kernel_size=1)
        nn.init.normal_(self.conv_depth.weight, std=0.01)
        nn.init.zeros_(self.conv_depth.bias)  # type: ignore[arg-type]

    def forward(self, features: Features) -> Tensor:
        """Depth in metres on a grid four times as fine as the patches, [B, 1, 4h, 4w]."""
        scores_BNhw = self.conv_depth(torch.cat([part for pair in features for part in _beside(*pair)], dim=1))
        scores_BNhw = F.interpolate(scores_BNhw, scale_factor=self.upsampling, mode="bilinear", align_corners=False)
        weights_BNhw = _BIN_WEIGHTS[self.config.bin_weights](scores_BNhw)
        bins_N = torch.linspace(
            self.config.min_depth, self.config.max_depth, weights_BNhw.shape[1], device=scores_BNhw.device
        )
        return torch.einsum("bnhw,n->bhw", weights_BNhw.float(), bins_N).unsqueeze(1)


def _beside(patches: Tensor, cls: Tensor) -> tuple[Tensor, Tensor]:
    return patches, cls[:, :, None, None].expand_as(patches)


class DPTHead(DenseHead):
    """Depth by fusing four blocks from coarse to fine (Ranftl et al. 2021).

    Args:
        in_channels: F = 2D times four.
        channels: of the maps that are fused.
        config: as in `DenseHead`; the least depth is what a map of zeros means.
    """

    tokens_read = 2

    def __init__(self, in_channels: int, channels: int = 256, config: HeadConfig = HeadConfig(task="depth")) -> None:
        super().__init__(in_channels, config)
        width = in_channels // 8
        levels = [width // 8, width // 4, width // 2, width]
        self.reassemble_blocks = _Reassemble(width, levels)
        self.convs = nn.ModuleList(_conv(level, channels, 3, bias=False) for level in levels)
        self.fusion_blocks = nn.ModuleList(_Fusion(channels, joins=i > 0) for i in range(4))
        self.project = _conv(channels, channels, 3)
        layers = [
            nn.Conv2d(channels, channels // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(channels // 2, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, kernel_size=1),
        ]
        self.conv_depth = nn.Sequential(OrderedDict(head=nn.Sequential(*layers)))

    def forward(self, features: Features) -> Tensor:
        """Depth in metres, [B, 1, H, W] of twice the finest map, to which the deepest was doubled: about 16h x 16w."""
        levels = [conv(level) for conv, level in zip(self.convs, self.reassemble_blocks(features), strict=True)]
        fused = levels.pop()
        for number, fusion in enumerate(self.fusion_blocks):
            fused = fusion(fused, levels.pop() if number else None)
        depth: Tensor = torch.relu(self.conv_depth(torch.relu(self.project(fused)))) + self.config.min_depth
        return depth


class _Reassemble(nn.Module):
    """Tokens of four blocks to maps at 4, 2, 1 and 1/2 times the patches' resolution."""

    def __init__(self, width: int, levels: Sequence[int]) -> None:
        super().__init__()
        self.readout_projects = nn.ModuleList(nn.Sequential(nn.Linear(2 * width, width), nn.GELU()) for _ in levels)
        self.projects = nn.ModuleList(_conv(width, level, 1) for level in levels)
        first, second, _, last = levels
        self.resize_layers = nn.ModuleList([
            nn.ConvTranspose2d(first, first, kernel_size=4, stride=4),
            nn.ConvTranspose2d(second, second, kernel_size=2, stride=2),
            nn.Identity(),
            nn.Conv2d(last, last, kernel_size=3, stride=2, padding=1),
        ])  # fmt: skip

    def forward(self, features: Features) -> list[Tensor]:
        maps = []
        layers = zip(self.readout_projects, self.projects, self.resize_layers, strict=True)
        for pair, (readout, project, resize) in zip(features, layers, strict=True):
            tokens = torch.cat(_beside(*pair), dim=1).movedim(1, -1)
            maps.append(resize(project(readout(tokens).movedim(-1, 1))))
        return maps


class _Fusion(nn.Module):
    """A coarse map refined by a finer one, if there is such, and doubled."""

    def __init__(self, channels: int, joins: bool) -> None:
        super().__init__()
        self.res_conv_unit1 = _ResidualConvs(channels) if joins else None
        self.res_conv_unit2 = _ResidualConvs(channels)
        self.project = _conv(channels, channels, 1)

    def forward(self, coarse: Tensor, finer: Tensor | None) -> Tensor:
        if self.res_conv_unit1 is not None and finer is not None:
            if finer.shape != coarse.shape:  # an odd side, halved and doubled
                finer = F.interpolate(finer, size=coarse.shape[-2:], mode="bilinear", align_corners=False)
            coarse = coarse + self.res_conv_unit1(finer)
        doubled = F.interpolate(self.res_conv_unit2(coarse), scale_factor=2, mode="bilinear", align_corners=True)
        projected: Tensor = self.project(doubled)
        return projected


class _ResidualConvs(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels, 3, bias=False)
        self.conv2 = _conv(channels, channels, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.conv2(torch.relu(self.conv1(torch.relu(x))))
        return x + changed


def _conv(channels: int, out: int, side: int, bias: bool = True) -> nn.Sequential:
    """A convolution that keeps the map's size, under the key `conv`."""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, out, side, padding=side // 2, bias=bias)))


class DenseModel(nn.Module):
    """A backbone with a head, for images of any size.

    Images are padded with zeros to whole patches; what comes of them is stretched to the images' size, padding
    included, as the released heads were trained.

    Args:
        backbone: as `load_model` gives it; one of another library has one block, its last stage.
        head: one that fits it.

    Raises:
        WeightsError: the head does not fit.
    """

    def __init__(self, backbone: Backbone, head: DenseHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.layers = head.blocks_read(backbone)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] -> logits [B, K, H, W], or depths in metres [B, 1, H, W]."""
        return self.head.predict(self.features(x), (x.shape[-2], x.shape[-1]))

    def features(self, x: Tensor) -> Features:
        """What the head reads of images [B, C, H, W], in the precision in which the backbone gives it."""
        padded = pad_to_patches(x, self.backbone.patch_size)
        return self.backbone.get_intermediate_layers(  # type: ignore[return-value]
            padded, n=self.layers, reshape=True, return_class_token=True, norm=self.head.config.uses_norm
        )


def pad_to_patches(images: Tensor, patch_size: int) -> Tensor:
    """Zeros around images [B, C, H, W] up to whole patches; of an odd number, the smaller half left and above."""
    height, width = -images.shape[-2] % patch_size, -images.shape[-1] % patch_size
    return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))


def last_blocks(depth: int, count: int) -> tuple[int, ...]:
    """Indices of the last blocks, which segmentation reads."""
    return tuple(range(depth - count, depth))


def spread_blocks(depth: int) -> tuple[int, ...]:
    """Indices of the four blocks that depth heads read: 2, 5, 8, 11 of 12."""
    return _FOUR_BLOCKS.get(depth) or tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))


def fingerprint_of(backbone: nn.Module) -> str:
    """What tells the weights of a model from others: a hash of 64 values of each tensor, in hexadecimal."""
    found = hashlib.sha256()
    for name, tensor in backbone.state_dict().items():
        values = tensor.flatten()[:: max(tensor.numel() // 64, 1)].cpu()
        found.update(name.encode() + values.float().numpy().tobytes())
    return found.hexdigest()[:32]
