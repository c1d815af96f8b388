"""The released DINOv2 models: names, architectures, addresses and sizes (DINOv2 model card)."""

from dataclasses import dataclass
from itertools import product

from dinov2cli.config.vit import ARCHITECTURES, ViTConfig
from dinov2cli.models.vision_transformer import parameter_count

RELEASED_URL = "https://dl.fbaipublicfiles.com/dinov2"
_SIZES = {"s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}
IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Released:
    """A released model.

    Args:
        name: its torch.hub name, such as `dinov2_vitb14_reg_lc`.
        stem: the beginning of its files' names on the server, such as `dinov2_vitb14`.
        architecture: of the backbone; position embeddings are for 518x518 pixels.
        classifier: whether the name stands for the backbone with an ImageNet-1k linear head (`_lc`).
    """

    name: str
    stem: str
    architecture: ViTConfig
    classifier: bool = False

    @property
    def backbone_url(self) -> str:
        return f"{RELEASED_URL}/{self.stem}/{self.stem}{self._registers}_pretrain.pth"

    @property
    def backbone_bytes(self) -> int:
        """Bytes of the float32 tensors; the file is a little larger."""
        return 4 * parameter_count(self.architecture)

    def head_url(self, layers: int) -> str:
        """Address of the linear head on the last 1 or 4 blocks."""
        return f"{RELEASED_URL}/{self.stem}/{self.stem}{self._registers}_linear{'4' if layers == 4 else ''}_head.pth"

    def head_bytes(self, layers: int) -> int:
        """Bytes of the head's float32 tensors."""
        return 4 * IMAGENET_CLASSES * ((layers + 1) * self.architecture.embed_dim + 1)

    @property
    def _registers(self) -> str:
        return "_reg4" if self.architecture.num_register_tokens else ""


def _released(head: bool, registers: int, letter: str) -> Released:
    stem = f"dinov2_vit{letter}14"
    architecture = ViTConfig(
        **ARCHITECTURES[_SIZES[letter]]._asdict(),
        patch_size=14,
        img_size=518,
        layerscale=1.0,
        ffn_layer="swiglu" if letter == "g" else "mlp",
        num_register_tokens=registers,
        interpolate_antialias=bool(registers),
        interpolate_offset=0.0 if registers else 0.1,
    )
    return Released(stem + "_reg" * bool(registers) + "_lc" * head, stem, architecture, head)


RELEASED = {model.name: model for model in (_released(*kind) for kind in product((False, True), (0, 4), _SIZES))}
"""Every released name: 8 backbones and the same with a linear classifier."""
BACKBONES = tuple(name for name, model in RELEASED.items() if not model.classifier)
