"""Training from Python and notebooks: `dinov2cli.train(...)`, and the run that it leaves as an object."""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from dinov2cli import start
from dinov2cli.console import Manner, logger, set_up_logging
from dinov2cli.errors import ConfigError, DataError
from dinov2cli.eval.images import embed, load_model
from dinov2cli.files import user_path
from dinov2cli.launch.training import first_look, resolve_students
from dinov2cli.models.library_backbone import Backbone
from dinov2cli.requests.train import TrainRequest
from dinov2cli.train.allocator import memory_given_back
from dinov2cli.train.run_folder import RunFolder
from dinov2cli.train.verdicts import json_lines
from dinov2cli.visualize.run_plot import figure_of, read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Overrides = Mapping[str, Any] | Iterable[str]


class Fit:
    """A run in its folder, while it trains or after: what `dinov2cli.train` returns. Files are read when asked for.

        fit = dinov2cli.Fit("runs/photos")

    Raises:
        DataError: the folder is not there.
    """

    output_dir: Path
    """The run folder."""

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = user_path(output_dir)
        if not self.output_dir.is_dir():
            raise DataError(f"{self.output_dir}: no such run folder")

    @cached_property
    def model(self) -> Backbone:
        """The newest teacher, in eval mode and with its preprocessing, on a GPU if there is one.

        Raises WeightsError where none has been written yet.
        """
        return load_model(self.output_dir, device="auto")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of training_metrics.json, one every `train.log_period` iterations: losses, rates, monitors.

        `pandas.DataFrame(fit.metrics)` makes a table of them.
        """
        return json_lines(RunFolder(self.output_dir).metrics)

    @property
    def scores(self) -> list[dict[str, Any]]:
        """k-NN scores while training (`evaluation.knn_period`): `iteration` and `knn_top1` in percent."""
        return json_lines(RunFolder(self.output_dir).knn_metrics)

    def plot(self, *, smooth: int = 1) -> "Figure":
        """The curves of the run, as `dino2 plot` draws them; a notebook shows the figure.

        Args:
            smooth: logged points in the moving mean that is drawn over each curve; 1 draws the curve alone.

        Raises:
            DataError: nothing has been logged yet.
            EnvironmentProblem: matplotlib is not installed.
        """
        return figure_of([read_run(self.output_dir)], smooth=smooth)

    def embed(self, images: Any, **options: Any) -> Tensor:
        """Class tokens of images by the newest teacher: `dinov2cli.embed(images, fit.model, **options)`."""
        return embed(images, self.model, **options)

    def __repr__(self) -> str:
        metrics, scores = self.metrics, self.scores
        done = f", iteration {metrics[-1]['iteration'] + 1}" if metrics else ", nothing logged yet"
        score = f", k-NN {scores[-1]['knn_top1']:.1f} %" if scores else ""
        return f"Fit({str(self.output_dir)!r}{done}{score})"


def train(
    data: str | Path | None = None,
    *,
    preset: str | None = None,
    config_file: str | Path | None = None,
    output_dir: str | Path | None = None,
    overrides: Overrides = (),
    init_from: str | Path | None = None,
    device: str = "auto",
    resume: bool = True,
    quiet: bool = False,
) -> Fit:
    """Pretrain a vision transformer on your images, as `dino2 train` does, on one device and in this process:

        fit = dinov2cli.train("photos", preset="small_1k", output_dir="runs/photos", overrides={"optim.epochs": 5})
        fit.plot()

    Called again it goes on where the run in its folder was, or returns it at once where that is finished. Ctrl-C, or
    the stop button of a notebook, saves and raises KeyboardInterrupt. Afterwards this process is as it was: signals,
    logging, threads, random numbers, memory.

    Args:
        data: a folder of images, or a dataset string.
        preset: a ready configuration, as `dino2 presets list` names them; by default chosen by the images and the
            machine, which is said, with the reason.
        config_file: a configuration file instead.
        output_dir: the run folder; by default below `runs/`, with the name of the preset, the file or the data.
        overrides: changes of single keys: `{"optim.epochs": 5}`, `{"optim": {"epochs": 5}}` or `["optim.epochs=5"]`.
        init_from: backbone weights to start from: a run, a file, a URL or a released name.
        device: `auto` (a GPU if there is one), `cpu` or `cuda`.
        resume: False begins anew; an earlier run's files move to `previous_1/` and so on.
        quiet: show warnings only.

    Returns:
        the run; of several students (`distillation.students`) that of the first.

    Raises:
        Dino2Error: what the command would end with, with the same message.
        KeyboardInterrupt: interrupted, and saved where training had begun.

    A run that hangs does not end this process, as it would end a command: `train.hang_timeout` is 0 where nobody says
    otherwise. For several GPUs use `dino2 train --gpus N`, and `dinov2cli.Fit(RUN)` to look at what it does.
    """
    words = words_of(overrides)
    if config_file is None:
        words = "train.hang_timeout=0", *words
    try:
        request = TrainRequest(
            data=None if data is None else str(data),
            preset=preset,
            config_file=None if config_file is None else user_path(config_file),
            output_dir=None if output_dir is None else user_path(output_dir),
            overrides=words,
            init_from=None if init_from is None else str(init_from),
            device=device,
            no_resume=not resume,
            gpus=1 if torch.cuda.is_available() else None,
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ConfigError(f"{problem['loc'][0]}={problem['input']!r}: {problem['msg']}") from None
    with process_as_it_was(uses_gpu=not request.cpu):
        Manner.quiet = quiet
        set_up_logging()
        request = first_look(request)
        config, *others = resolve_students(request)
        start.train(config, request, *others)
    return Fit(config.train.output_dir)


def words_of(overrides: Overrides) -> tuple[str, ...]:
    """Changes of keys as a request has them, `group.key=value`.

    Raises:
        ConfigError: a value that is no number, text, truth value, None or list of them.
    """
    if isinstance(overrides, str):
        return (overrides,)
    if not isinstance(overrides, Mapping):
        return tuple(overrides)
    words: list[str] = []
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            words += words_of({f"{key}.{name}": each for name, each in value.items()})
        elif isinstance(value, str | Path):
            words.append(f"{key}={value}")
        else:
            try:
                words.append(f"{key}={json.dumps(getattr(value, 'tolist', lambda value=value: value)())}")
            except TypeError:
                raise ConfigError(f"overrides: {key}={value!r} is no number, text, truth value, None or list") from None
    return tuple(words)


@contextmanager
def process_as_it_was(*, uses_gpu: bool) -> Iterator[None]:
    """Around a training: what it sets of the process, and does not set back itself, is set back."""
    handlers, level, propagates = list(logger.handlers), logger.level, logger.propagate
    manner = Manner.quiet, Manner.verbose
    for handler in handlers:  # they would be closed
        logger.removeHandler(handler)
    gpus = range(torch.cuda.device_count()) if uses_gpu and torch.cuda.is_available() else []
    current = torch.cuda.current_device() if gpus else None
    try:
        with torch.random.fork_rng(gpus), warnings.catch_warnings(), memory_given_back():
            yield
    finally:
        if current is not None:
            torch.cuda.set_device(current)
        Manner.quiet, Manner.verbose = manner
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        for handler in handlers:
            logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates
