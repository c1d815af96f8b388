"""What a run says of a backbone of another library, of transformers or timm. Imports no torch."""

import json
import re
from typing import Annotated, Any

from pydantic import AfterValidator, StringConstraints

from dinov2cli.config.group import Group, key
from dinov2cli.config.vit import ARCHITECTURES, Architecture, ViTOptions

LIBRARIES = {"hf": "transformers", "timm": "timm"}
"""What `student.arch` begins with, and whose architectures these are."""
VITS = (*ARCHITECTURES, "vit")
ARCH = re.compile(rf"({'|'.join(VITS)}|({'|'.join(LIBRARIES)}):\S.*)$")
OF_VIT = (
    *Architecture._fields, "ffn_ratio", "drop_path_uniform", "train", "pretrained_channels", "pretrained_patches",
    *(name for name in ViTOptions.model_fields if name not in ("patch_size", "in_chans")),
    *(f"pos_embed_rope_{name}_coords" for name in ("shift", "jitter", "rescale")),
)  # fmt: skip
"""Keys of the `student` group that only a vision transformer has."""


class Arguments(dict[str, Any]):
    """Of an architecture: as JSON holds them, and never changed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(str(self))

    def __str__(self) -> str:
        return json.dumps(self)


GivenArguments = Annotated[dict[str, Any], AfterValidator(Arguments)]


def library_of(arch: str) -> str | None:
    """`hf` or `timm`, whose architecture it is; None for a vision transformer of dino2."""
    library, colon, _ = arch.partition(":")
    return library if colon else None


class LibraryConfig(Group):
    """All that such a backbone is; the counterpart of `ViTConfig`, for what reads either."""

    library: Annotated[str, StringConstraints(pattern=rf"^({'|'.join(LIBRARIES)})$")] = key(
        "hf", "Whose architecture it is."
    )
    name: str = key("", "Its name there.")
    arguments: GivenArguments = key(Arguments(), "Of the architecture.")
    in_chans: int = key(3, "Image channels.", ge=1)
    patch_size: int = key(16, "Side in pixels of the patches that its feature map is resized to.", ge=1)
    img_size: int = key(224, "Side in pixels of the largest crops that it was trained on.", ge=1)

    @property
    def arch(self) -> str:
        """As `student.arch` says it."""
        return f"{self.library}:{self.name}"

    @property
    def grid(self) -> int:
        """Patches along one side of an image of `img_size`."""
        return self.img_size // self.patch_size

    @property
    def prefix_names(self) -> tuple[str, ...]:
        """The tokens of an image before its patches: the pooled features alone."""
        return ("cls",)

    @property
    def prefix_tokens(self) -> int:
        """How many these are."""
        return len(self.prefix_names)

    def describe(self) -> str:
        """One line for people, such as `hf:resnet, feature map at patches of 14, trained at 224x224`."""
        channels = f", {self.in_chans} channels" if self.in_chans != 3 else ""
        side = self.img_size
        return f"{self.arch}{channels}, feature map at patches of {self.patch_size}, trained at {side}x{side}"
