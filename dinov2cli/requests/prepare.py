"""The request to prepare ImageNet."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import model_validator

from dinov2cli.requests.base import Option, Request


class PrepareImagenet(Request):
    """Prepare ImageNet-1k, a subset of it, or ImageNet-22k for training.

    Writes `entries-<SPLIT>.npy`, `class-ids-<SPLIT>.npy` and `class-names-<SPLIT>.npy` (22k: `entries.npy` and
    `class-ids.npy`) in the reference implementation's formats: its tools read these files and dino2 reads its.
    Files that are there already are left alone, without `--force`.

    Example:

        dino2 prepare-imagenet --root /data/imagenet --extra /data/imagenet-extra

        dino2 prepare-imagenet --root /data/imagenet --check
    """

    command: ClassVar[str] = "prepare-imagenet"
    run_by: ClassVar[str] = "dinov2cli.data.prepare.run:run"

    root: Annotated[Path, Option("Folder with train/, val/, test/ (22k: with the <wnid>.tar files).")]
    extra: Annotated[Path | None, Option("Folder to write the metadata files to.", default_text="the root")] = None
    split: Annotated[
        tuple[Literal["TRAIN", "VAL", "TEST"], ...],
        Option("Split to prepare; repeatable.", default_text="all that are there"),
    ] = ()
    variant: Annotated[Literal["1k", "22k"], Option("ImageNet-1k, or ImageNet-22k as tars.")] = "1k"
    check: Annotated[bool, Option("Write nothing; verify layout, labels.txt, counts, and open a sample.")] = False
    force: Annotated[bool, Option("Write files anew that are there already.")] = False
    write_labels: Annotated[bool, Option("Make labels.txt from the class folders' names first.")] = False
    val_labels: Annotated[
        Path | None,
        Option("Sort a flat val/ into class folders first, by the devkit's ground truth or 'image class-id' lines."),
    ] = None
    link: Annotated[bool, Option("With --val-labels: link from the class folders instead of moving.")] = False

    @model_validator(mode="after")
    def _goes_together(self) -> "PrepareImagenet":
        if self.link and not self.val_labels:
            raise ValueError("--link goes with --val-labels")
        if self.variant == "22k" and (self.split or self.check or self.write_labels or self.val_labels):
            raise ValueError("--variant 22k takes --root, --extra and --force only")
        return self
