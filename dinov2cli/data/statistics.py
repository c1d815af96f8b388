"""`dino2 datasets stats`: mean and standard deviation of each channel of a set, as a configuration's keys.

Every image counts the same, however large it is, as in training. Images are drawn at random, decoded by worker
processes and forgotten; what has been added up is kept now and then, so that the same command goes on where it was.
"""

import json
import os
import shlex
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dinov2cli.config.editing import with_entry
from dinov2cli.config.images import Images
from dinov2cli.config.loading import read_yaml
from dinov2cli.config.presets import find_preset
from dinov2cli.console import logger, progress, stoppable
from dinov2cli.data.datasets import ImageDataset, UnreadableImage, make_dataset
from dinov2cli.data.decoding import Reading
from dinov2cli.data.loaders import Loader, refuse_too_many_bad
from dinov2cli.data.sampler import SampleOrder
from dinov2cli.data.tallies import Levels, Sums
from dinov2cli.errors import ConfigError, DataError
from dinov2cli.files import check_folder, digest, write_text, writing
from dinov2cli.requests.datasets import DatasetStatsRequest
from dinov2cli.site import cache_folder

BATCH, KEPT_EVERY, LOOKED_AT = 8, 16, 16
SEED = 0


class ChannelStatistics(NamedTuple):
    """What was measured, and the overrides that tell a training so."""

    dataset: str
    images: int
    unreadable: int
    channels: list[str]
    mean: list[float]
    std: list[float]
    min: list[float]
    max: list[float]
    settings: dict[str, dict[str, Any]]
    written: str = ""

    def __str__(self) -> str:
        names = [name if not name.isdecimal() else f"channel {name}" for name in self.channels]
        width = max(map(len, names))
        rows = zip(names, self.mean, self.std, self.min, self.max, strict=True)
        lines = [f"{'':{width}}    mean     std     min     max"]
        lines += [f"{name:{width}}" + "".join(f"{number:8.4f}" for number in numbers) for name, *numbers in rows]
        bad = f", {self.unreadable} unreadable" if self.unreadable else ""
        words = [
            shlex.quote(f"{group}.{key}={str(value).replace(chr(39), '') if isinstance(value, list) else value}")
            for group, keys in self.settings.items()
            for key, value in keys.items()
        ]
        how = f"written to {self.written}" if self.written else "for dino2 train: " + " ".join(words)
        return "\n".join([f"{self.dataset}: {self.images} images looked at{bad}", *lines, how])


Total = TypeVar("Total", Sums, Levels)


def run(request: DatasetStatsRequest) -> ChannelStatistics:
    """Measure what the request names, and write the keys where it says.

    Raises:
        DataError: no dataset, images with other channels, too many that cannot be read.
        ConfigError: the configuration to be written cannot be read, or has these keys in a form that is not edited.
    """
    if request.write is not None:
        check_folder(request.write.absolute().parent, "--write")
        base = _text_of(request)
    dataset = make_dataset(request.dataset)
    reading = Reading.of(Images(channels=request.channels, in_chans=len(request.channels) or 3), None, request)
    if not request.channels:
        usual = reading.images.model_copy(update={"in_chans": usual_channels(dataset, reading)})
        reading = replace(reading, images=usual)
    how = request.max_images, request.num_workers, request.max_bad_fraction
    if request.percentiles:
        levels = measure(dataset, reading, Levels, *how)
        black, white = (levels.percentile(p) for p in request.percentiles)
        if black == white:
            raise DataError(f"{dataset.describe()}: its percentiles {request.percentiles} are both {black:g}",
                            "Give others with --percentiles, such as 0 100.")  # fmt: skip
        said = reading.images.model_copy(update={"value_range": f"[{black:.6g}, {white:.6g}]"})
        reading = replace(reading, images=said)
    images = reading.images
    sums = measure(dataset, reading, Sums, *how)
    mean = np.array(sums.mean) / sums.images
    std = np.sqrt(np.maximum(np.array(sums.square) / sums.images - mean**2, 0))
    flat = [name for name, spread in zip(_names(images), std, strict=True) if spread < 5e-5]
    if flat:
        raise DataError(f"{dataset.describe()}: every sample of channel {', '.join(flat)} is the same",
                        "Leave it out with --channels, or see whether --value-range is right.")  # fmt: skip
    special = images.beside_weights() | {"mean": _rounded(mean), "std": _rounded(std)}
    settings = {"student": {"in_chans": images.in_chans}, "data": special}
    found = ChannelStatistics(
        dataset.describe(), sums.images, len(sums.bad), _names(images), special["mean"], special["std"],
        _rounded(sums.low), _rounded(sums.high), settings,
    )  # fmt: skip
    if request.write is None:
        return found
    with writing(request.write):
        write_text(request.write, with_settings(base, settings, request.write))
    return found._replace(written=str(request.write))


def usual_channels(dataset: ImageDataset, reading: Reading) -> int:
    """How many channels a look at some images finds; grey ones among RGB ones are RGB.

    Raises:
        DataError: they differ, or none can be read.
    """
    order, found, problem = SampleOrder(len(dataset), SEED), Counter[int](), ""
    for k in range(min(LOOKED_AT, len(dataset))):
        try:
            found[dataset.open(order.index(k), reading).channels] += 1
        except UnreadableImage as error:
            problem = str(error)
    if not found:
        raise DataError(f"none of {min(LOOKED_AT, len(dataset))} images could be read, the last: {problem}")
    if len(found) > 1 and set(found) != {1, 3}:
        counts = ", ".join(f"{count} with {channels}" for channels, count in sorted(found.items()))
        raise DataError(f"{dataset.describe()}: images have different numbers of channels ({counts})",
                        "Say which are used with --channels, such as --channels 0 1 2.")  # fmt: skip
    return max(found)


def measure(
    dataset: ImageDataset,
    reading: Reading,
    kind: type[Total],
    most: int,
    num_workers: int | None = None,
    allowed: float = 0.01,
) -> Total:
    """Add up `most` images (0: all), going on where an interrupted one of the same set and settings was.

    Raises:
        DataError: more than the share `allowed` cannot be read, or none can.
    """
    order, count = SampleOrder(len(dataset), SEED), min(most or len(dataset), len(dataset))

    def batch(number: int) -> Total:
        part = kind(batches=1)
        for k in range(number * BATCH, min((number + 1) * BATCH, count)):
            try:
                part.join(kind.of(dataset, order.index(k), reading))
            except UnreadableImage as error:
                part.bad.append(str(error))
        return part

    said = [_fingerprint(dataset), reading.images.model_dump(mode="json"), count, kind.__name__]
    state = cache_folder("statistics") / f"{digest(json.dumps(said))[:24]}.json"
    total = _kept(state, kind) or kind()
    if total.batches:
        logger.info("going on after %d images", total.batches * BATCH)
    batches = -(-count // BATCH)
    loader = Loader(dataset, batch, range(total.batches, batches), num_workers, False)
    with progress() as bar, stoppable("stopping; the same command goes on from here") as stop_if_asked:
        task = bar.add_task("statistics", total=count, completed=min(total.batches * BATCH, count))
        try:
            for part in loader:
                total.join(part)
                bar.advance(task, part.images + len(part.bad))
                if total.batches % KEPT_EVERY == 0:
                    write_text(state, json.dumps(asdict(total)))
                stop_if_asked()
        except BaseException:
            write_text(state, json.dumps(asdict(total)))
            raise
    state.unlink(missing_ok=True)
    for message in total.bad[:10]:
        logger.warning("%s", message)
    refuse_too_many_bad(len(total.bad), count, allowed if total.images else 0, total.bad)
    return total


def with_settings(text: str, settings: dict[str, dict[str, Any]], where: Path) -> str:
    """YAML with these keys, and all else, comments too, as it was.

    Raises:
        ConfigError: it holds one of the groups in another form than a line a key.
    """
    try:
        for group, keys in settings.items():
            for key, value in keys.items():
                text = with_entry(text, group, key, value)
    except ValueError:
        what = f"is not written as one key a line; write these keys into it yourself: {settings}"
        raise ConfigError(f"{where}: {what}") from None
    return text


def _text_of(request: DatasetStatsRequest) -> str:
    assert request.write is not None
    if request.preset is not None:
        if request.write.exists():
            raise ConfigError(f"{request.write} exists; --preset is for a new file")
        return find_preset(request.preset).path.read_text(encoding="utf-8")
    if request.write.exists():
        read_yaml(request.write)
        return request.write.read_text(encoding="utf-8")
    return ""


def _kept(state: Path, kind: type[Total]) -> Total | None:
    try:
        return kind(**json.loads(state.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        logger.warning("%s: damaged (%s); beginning anew", state, error)
        return None


def _fingerprint(dataset: ImageDataset) -> list[Any]:
    """Of the set: how many, and of some the names, and sizes and times of the files that hold them."""
    found: list[Any] = [dataset.describe(), len(dataset)]
    for i in range(0, len(dataset), max(1, len(dataset) // 1000)):
        found.append(dataset.path(i))
        with suppress(OSError):  # an image that is made: its name is all there is
            status = os.stat(dataset.container(i))
            found.append([status.st_size, status.st_mtime_ns])
    return found


def _names(images: Images) -> list[str]:
    if images.are_rgb:
        return ["red", "green", "blue"]
    return list(images.channels) or [str(i) for i in range(images.in_chans)]


def _rounded(numbers: Any) -> list[float]:
    """To four significant digits, or four decimals."""
    return [float(f"{number:.4g}") if abs(number) < 0.1 else round(float(number), 4) for number in numbers]
