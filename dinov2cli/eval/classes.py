"""Classes of two datasets, brought to one numbering."""

import torch
from torch import Tensor

from dinov2cli.console import few, logger
from dinov2cli.data.datasets import ImageDataset
from dinov2cli.errors import DataError


def check_labels(targets: Tensor, dataset: str, protocol: str) -> None:
    """Raise DataError where an image has no class (its target is below 0); `dataset` and `protocol` as to be named."""
    if missing := int((targets < 0).sum()):
        raise DataError(
            f"The {dataset} has {missing} of {len(targets)} images without a class; {protocol} needs a class for each.",
            hint="Put the images into one subfolder per class.",
        )


def align_classes(train: ImageDataset, other: ImageDataset, other_name: str = "val") -> Tensor | None:
    """The train set's class index of each class of `other`: int64 [C_other], or None where the numbering is the same.

    Folder datasets number the classes that they hold; a val folder that lacks one would shift all that follow.

    Raises:
        DataError: `other` has classes that the train set has not, by name or, without names, by number.
    """
    known, names = tuple(train.class_names), tuple(other.class_names)
    if not known or not names or known == names:
        return None
    if missing := sorted(set(names) - set(known)):
        raise DataError(
            f"The {other_name} dataset has {len(missing)} of {len(names)} classes that the train dataset has not: "
            f"{few(missing, 8)}.",
            hint=f"train: {train.describe()} ({len(known)} classes). {other_name}: {other.describe()}. "
            "Both need the same class names (for folders: the same subfolders).",
        )
    if len(set(known)) < len(known) or len(set(names)) < len(names):
        return None  # ambiguous names (ImageNet has two cranes): the numbering is all there is
    logger.info("%s has %d of the %d classes of train; numbered by name", other_name, len(names), len(known))
    return torch.tensor([known.index(name) for name in names])
