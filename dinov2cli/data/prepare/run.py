"""What `dino2 prepare-imagenet` does, and says meanwhile: the metadata files through which ImageNet is read."""

from pathlib import Path

from dinov2cli.console import err, out
from dinov2cli.data.datasets.imagenet import Split
from dinov2cli.data.prepare.check import check_split
from dinov2cli.data.prepare.imagenet import list_split, prepare_split
from dinov2cli.data.prepare.imagenet22k import prepare_imagenet22k
from dinov2cli.data.prepare.labels import Labels, read_labels, write_labels
from dinov2cli.data.prepare.val_folders import sort_val
from dinov2cli.errors import DataError
from dinov2cli.requests.tools import PrepareImagenetRequest


def run(request: PrepareImagenetRequest) -> None:
    """Do what a request asks, saying what is written and found.

    Raises:
        DataError: images or labels that are not as they must be, or problems that `check` has found.
    """
    root = request.root.expanduser()
    extra = request.extra.expanduser() if request.extra else root
    if not root.is_dir():
        raise DataError(f"--root {root} is not a folder")
    (_prepare_22k if request.variant == "22k" else _prepare_1k)(root, extra, request)


def _prepare_1k(root: Path, extra: Path, request: PrepareImagenetRequest) -> None:
    if request.val_labels is not None:
        count = sort_val(root, request.val_labels, "link" if request.link else "move")
        _say(f"val: {count} images {'linked from' if request.link else 'moved to'} their class folders")
    splits = [Split[name] for name in request.split] or [s for s in Split if (root / s.folder).is_dir()]
    if not splits:
        raise DataError(f"{root} has no train/, val/ or test/ folder")
    if request.write_labels:
        class_ids = {p.name for s in (Split.TRAIN, Split.VAL) for p in (root / s.folder).glob("[!.]*") if p.is_dir()}
        _say(f"wrote {write_labels(root, sorted(class_ids))}")
    labels = Labels({}, []) if splits == [Split.TEST] else read_labels(root)
    if request.check:
        return _check(root, splits, labels)
    for problem in labels.problems:
        _warn(problem)
    for split in splits:
        done = prepare_split(root, extra, split, labels, force=request.force)
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


def _check(root: Path, splits: list[Split], labels: Labels) -> None:
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


def _prepare_22k(root: Path, extra: Path, request: PrepareImagenetRequest) -> None:
    if not request.force and (extra / "entries.npy").is_file() and (extra / "class-ids.npy").is_file():
        _say(f"already prepared in {extra}; --force writes the files anew")
        return
    images, classes = prepare_imagenet22k(root, extra)
    _say(f"{images} images in {classes} classes -> entries.npy, class-ids.npy in {extra}")


def _say(line: str) -> None:
    out.print(line, markup=False, highlight=False, soft_wrap=True)


def _warn(line: str) -> None:
    err.print(f"warning: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)
