"""`dino2 datasets`: the datasets that have a name here, shown and edited."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dinov2cli.console import plain_table
from dinov2cli.data.datasets import make_dataset
from dinov2cli.data.datasets.imagenet import ImageNet, ImageNet22k, Split
from dinov2cli.data.decoding import USUAL
from dinov2cli.data.look import look_at
from dinov2cli.data.spelling import EXAMPLES, IMAGENETS, absolute, complete
from dinov2cli.errors import ConfigError, DataError
from dinov2cli.requests.datasets import (
    AddDatasetRequest,
    ForgetDatasetRequest,
    ListDatasetsRequest,
    ShowDatasetRequest,
)
from dinov2cli.site import Place, read_site, remember_dataset, shown, user_file


class Known(NamedTuple):
    """A dataset by its name; the file that says so, and what is there now."""

    name: str
    place: str | Place
    file: Path

    @property
    def folder(self) -> Path | None:
        """Where it lies; None for a dataset string."""
        path = Path(self.place.root if isinstance(self.place, Place) else self.place)
        return path if path.is_absolute() else None

    @property
    def is_there(self) -> bool:
        return self.folder is None or self.folder.exists()

    def as_dict(self) -> dict[str, Any]:
        place = self.place.model_dump() if isinstance(self.place, Place) else {"dataset": self.place}
        return {"name": self.name, **place, "file": str(self.file), "there": self.is_there}

    def __str__(self) -> str:
        if isinstance(self.place, str):
            return self.place
        return self.place.root + (f", metadata in {self.place.extra}" if self.place.extra else "")


class KnownDatasets(list[Known]):
    """All of them, for people as a table."""

    def as_dict(self) -> dict[str, Any]:
        return {"datasets": [each.as_dict() for each in self]}

    def __rich__(self) -> Any:
        if not self:
            return (
                f"No dataset has a name yet; they are kept in {shown(user_file())}.\n"
                "dino2 prepare-imagenet --root ROOT, or dino2 datasets add NAME FOLDER"
            )
        table = plain_table("dataset", "where", "")
        table.columns[1].overflow = "fold"
        for each in self:
            table.add_row(each.name, str(each), "" if each.is_there else "gone")
        return table


class Parts(NamedTuple):
    """What a known dataset holds: a line for each split, or one."""

    known: Known
    lines: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        return {**self.known.as_dict(), "parts": list(self.lines)}

    def __str__(self) -> str:
        return "\n".join([f"{self.known.name}: {self.known}", *self.lines, f"named in {shown(self.known.file)}"])


def list_them(request: ListDatasetsRequest) -> KnownDatasets:
    """Do what `dino2 datasets list` asks."""
    site = read_site()
    return KnownDatasets(
        Known(name, place, site.sources[f"datasets.{name}"]) for name, place in site.settings.datasets.items()
    )


def show(request: ShowDatasetRequest) -> Parts:
    """What is in a known dataset.

    Raises:
        ConfigError: no such name; DataError: it is gone, or cannot be read.
    """
    known = find(request.name)
    splits = [f":split={split}" for split in Split.__members__] if known.name == ImageNet.__name__ else [""]
    lines, problems = [], []
    for split in splits:
        try:
            dataset = make_dataset(known.name + split)
        except DataError as error:
            problems.append(error)
        else:
            look = look_at(dataset, USUAL)
            lines += [dataset.describe(), f"  {look}", *(f"  {mixture}" for mixture in look.mixtures())]
    if not lines:
        raise problems[0]
    return Parts(known, lines)


def add(request: AddDatasetRequest) -> str:
    """Give a dataset a name, once it has been opened.

    Raises:
        ConfigError: the name is taken, or cannot be one; DataError: it cannot be read.
    """
    name, place = request.name, absolute(request.dataset)
    if name in EXAMPLES.keys() - IMAGENETS.keys():
        raise ConfigError(
            f"{name} is a kind of dataset", f"Choose another name; by this one only {' and '.join(IMAGENETS)}."
        )
    already = read_site().settings.datasets.get(name)
    if already is not None and not request.force:
        raise ConfigError(
            f"{name} is known already, as {find(name)}", "Replace it with --overwrite, or choose another name."
        )
    if name in IMAGENETS:
        extra = absolute(str(request.extra or request.dataset))
        value: str | dict[str, str] = _place(place, extra)
        found = _prepared(name, place, extra)
    elif request.extra:
        raise ConfigError(f"--extra goes with {' and '.join(IMAGENETS)}, not with {name}")
    else:
        value = complete(place)
        found = [make_dataset(value).describe()]
    file = remember_dataset(name, value)
    return "\n".join([*found, f"known as {name} in {shown(file)}; use it as --data {name}"])


def remove(request: ForgetDatasetRequest) -> str:
    """Forget a name; the images stay.

    Raises:
        ConfigError: no such name, or the working folder's file says it.
    """
    known = find(request.name)
    if known.file != user_file().absolute():
        raise ConfigError(
            f"{known.name} is named in {known.file}", "Take it out there: dino2 edits your own file only."
        )
    file = remember_dataset(known.name, None)
    return f"{known.name} ({known}) is no longer named in {shown(file)}; its files stay"


def find(name: str) -> Known:
    """The known dataset of that name; ConfigError if there is none."""
    known = list_them(ListDatasetsRequest())
    for each in known:
        if each.name == name:
            return each
    names = ", ".join(each.name for each in known) or "none yet"
    raise ConfigError(f"no dataset is known as {name}; known: {names}", f"dino2 datasets add {name} FOLDER names one.")


def register(name: str, root: Path, extra: Path) -> str:
    """Make a prepared ImageNet known under its name, unless another that is still there has it; what to tell of it."""
    place = _place(absolute(str(root)), absolute(str(extra)))
    known = read_site().settings.datasets.get(name)
    if isinstance(known, Place) and known.model_dump(exclude_none=True) == place:
        return f"known as {name}, as before"
    if isinstance(known, Place) and Path(known.root).is_dir():
        command = f"dino2 datasets add {name} {absolute(str(root))} --extra {absolute(str(extra))} --overwrite"
        return f"{name} is still the name of the one in {known.root}; to give it to this one: {command}"
    return f"known as {name} in {shown(remember_dataset(name, place))}"


def _place(root: str, extra: str) -> dict[str, str]:
    return {"root": root} if extra == root else {"root": root, "extra": extra}


def _prepared(name: str, root: str, extra: str) -> list[str]:
    """Descriptions of the prepared splits below `root`; DataError if there are none."""
    place = f'root="{root}":extra="{extra}"'
    if name == ImageNet22k.__name__:
        return [make_dataset(f"{name}:{place}").describe()]
    splits = [split for split in Split.__members__ if (Path(extra) / f"entries-{split}.npy").is_file()]
    return [make_dataset(f"{name}:split={split}:{place}").describe() for split in splits or ["TRAIN"]]
