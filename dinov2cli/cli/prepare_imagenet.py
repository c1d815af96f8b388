"""`dino2 prepare-imagenet`: the metadata files through which the ImageNet datasets are read."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov2cli.console import err, out
from dinov2cli.errors import DataError

if TYPE_CHECKING:
    from dinov2cli.data.datasets.imagenet import Split
    from dinov2cli.data.prepare.labels import Labels


class SplitName(StrEnum):
    """Splits of ImageNet-1k."""

    TRAIN = "TRAIN"
    VAL = "VAL"
    TEST = "TEST"


class Variant(StrEnum):
    """Which ImageNet."""

    IMAGENET_1K = "1k"
    IMAGENET_22K = "22k"


def prepare_imagenet(
    root: Annotated[Path, typer.Option(help="Folder with train/, val/, test/ (22k: with the <wnid>.tar files).")],
    extra: Annotated[
        Path | None, typer.Option(help="Folder to write the metadata files to.", show_default="the root")
    ] = None,
    split: Annotated[
        list[SplitName] | None, typer.Option(help="Split to prepare; repeatable.", show_default="all that are there")
    ] = None,
    variant: Annotated[Variant, typer.Option(help="ImageNet-1k, or ImageNet-22k as tars.")] = Variant.IMAGENET_1K,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; verify layout, labels.txt, counts, and open a sample.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write files anew that are there already.")] = False,
    write_labels: Annotated[
        bool, typer.Option("--write-labels", help="Make labels.txt from the class folders' names first.")
    ] = False,
    val_labels: Annotated[
        Path | None,
        typer.Option(
            help="Sort a flat val/ into class folders first, by the devkit's ground truth or 'image class-id' lines."
        ),
    ] = None,
    link: Annotated[
        bool, typer.Option("--link", help="With --val-labels: link from the class folders instead of moving.")
    ] = False,
) -> None:
    """Prepare ImageNet-1k, a subset of it, or ImageNet-22k for training.

    Writes `entries-<SPLIT>.npy`, `class-ids-<SPLIT>.npy` and `class-names-<SPLIT>.npy` (22k: `entries.npy` and
    `class-ids.npy`) in the reference implementation's formats: its tools read these files and dino2 reads its.
    Files that are there already are left alone, without `--force`.

    Example:

        dino2 prepare-imagenet --root /data/imagenet --extra /data/imagenet-extra

        dino2 prepare-imagenet --root /data/imagenet --check
    """
    root = root.expanduser()
    extra = extra.expanduser() if extra else root
    if not root.is_dir():
        raise DataError(f"--root {root} is not a folder")
    if link and not val_labels:
        raise DataError("--link goes with --val-labels")
    if variant is Variant.IMAGENET_22K:
        if split or check or write_labels or val_labels:
            raise DataError("--variant 22k takes --root, --extra and --force only")
        _prepare_22k(root, extra, force)
        return
    _prepare_1k(root, extra, [s.value for s in split or []], check, force, write_labels, val_labels, link)


def _prepare_1k(
    root: Path,
    extra: Path,
    wanted: list[str],
    check: bool,
    force: bool,
    write_labels: bool,
    val_labels: Path | None,
    link: bool,
) -> None:
    from dinov2cli.data.datasets.imagenet import Split
    from dinov2cli.data.prepare import labels as labels_txt
    from dinov2cli.data.prepare.imagenet import prepare_split
    from dinov2cli.data.prepare.val_folders import sort_val

    if val_labels is not None:
        count = sort_val(root, val_labels, "link" if link else "move")
        _say(f"val: {count} images {'linked from' if link else 'moved to'} their class folders")
    splits = [Split[name] for name in wanted] or [s for s in Split if (root / s.folder).is_dir()]
    if not splits:
        raise DataError(f"{root} has no train/, val/ or test/ folder")
    if write_labels:
        class_ids = {p.name for s in (Split.TRAIN, Split.VAL) for p in (root / s.folder).glob("[!.]*") if p.is_dir()}
        _say(f"wrote {labels_txt.write_labels(root, sorted(class_ids))}")
    labels = labels_txt.Labels({}, []) if splits == [Split.TEST] else labels_txt.read_labels(root)
    if check:
        _check(root, splits, labels)
        return
    for problem in labels.problems:
        _warn(problem)
    for split in splits:
        done = prepare_split(root, extra, split, labels, force=force)
        if not done.written:
            _say(f"{split.name}: {done.images} images, already prepared in {extra}")
            if done.stale:
                _warn(f"{root / split.folder} has changed since; --force writes the files anew")
            continue
        _say(f"{split.name}: {done.images} images -> {', '.join(path.name for path in done.files)} in {extra}")
        if done.images != split.full_size:
            _warn(f"a subset: the full {split.name} has {split.full_size} images")
        if done.unexpected:
            shown = ", ".join(done.unexpected[:3])
            _warn(f"left out {len(done.unexpected)} names that are not of the layout, such as {shown}")


def _check(root: Path, splits: "list[Split]", labels: "Labels") -> None:
    from dinov2cli.data.prepare.check import check_split
    from dinov2cli.data.prepare.imagenet import list_split

    problems = list(labels.problems)
    for split in splits:
        report = check_split(root, list_split(root, split), labels)
        least, median, most = report.counts
        per_class = f", {least} / {median} / {most} a class (least, median, most)" if split.name != "TEST" else ""
        _say(f"{report.split}: {report.images} images in {report.classes} classes{per_class}; opened {report.opened}")
        for note in report.notes:
            _say(f"  {note}")
        problems += report.problems
    for problem in problems:
        _warn(problem)
    if problems:
        raise DataError(f"{len(problems)} problems found in {root}")
    _say("no problems found")


def _prepare_22k(root: Path, extra: Path, force: bool) -> None:
    from dinov2cli.data.prepare.imagenet22k import prepare_imagenet22k

    if not force and (extra / "entries.npy").is_file() and (extra / "class-ids.npy").is_file():
        _say(f"already prepared in {extra}; --force writes the files anew")
        return
    images, classes = prepare_imagenet22k(root, extra)
    _say(f"{images} images in {classes} classes -> entries.npy, class-ids.npy in {extra}")


def _say(line: str) -> None:
    out.print(line, markup=False, highlight=False, soft_wrap=True)


def _warn(line: str) -> None:
    err.print(f"warning: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)
