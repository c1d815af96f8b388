"""Experiment trackers beside `training_metrics.json`: TensorBoard and Weights & Biases, each by a switch.

Both packages are optional and imported only when their switch is on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dinov2cli.config import Config
from dinov2cli.errors import EnvironmentProblem
from dinov2cli.files import write_text


class Tracker(Protocol):
    """Takes the same lines as `training_metrics.json`; a line's `iteration` is the step."""

    def write(self, metrics: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def make_trackers(config: Config, run_folder: Path, *, resume_at: int = 0) -> list[Tracker]:
    """The trackers that `train.tensorboard` and `train.wandb` switch on. Call on the main process only.

    Args:
        run_folder: TensorBoard writes below `logs/tensorboard`, W&B below `logs/wandb`.
        resume_at: first iteration of this process; what a lost run logged from there on is replaced.

    Raises:
        EnvironmentProblem: a package that is switched on is not installed.
    """
    trackers: list[Tracker] = []
    if config.train.tensorboard:
        trackers.append(TensorBoardTracker(run_folder / "logs" / "tensorboard", resume_at))
    if config.train.wandb:
        trackers.append(WandbTracker(run_folder, config))
    return trackers


class TensorBoardTracker:
    """Scalars in event files; `tensorboard --logdir RUN/logs/tensorboard` shows them."""

    def __init__(self, folder: Path, resume_at: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise EnvironmentProblem(
                f"train.tensorboard=true needs the tensorboard package, which does not import ({error})",
                "pip install 'dinov2cli[plots]', or leave train.tensorboard=false.",
            ) from error
        # Steps of a lost run at or after the resumed iteration are hidden: they are done again.
        self._writer = SummaryWriter(str(folder), purge_step=resume_at or None)

    def write(self, metrics: Mapping[str, Any]) -> None:
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name, value, int(metrics["iteration"]))

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A W&B run named after the run folder. A resumed run goes on in it; its id stands in `logs/wandb_run`."""

    def __init__(self, run_folder: Path, config: Config) -> None:
        try:
            import wandb
        except ImportError as error:
            raise EnvironmentProblem(
                f"train.wandb=true needs the wandb package, which does not import ({error})",
                "pip install 'dinov2cli[wandb]', or leave train.wandb=false.",
            ) from error
        known = run_folder / "logs" / "wandb_run"
        run_id = known.read_text().strip() if known.exists() else wandb.util.generate_id()
        write_text(known, run_id + "\n")
        self._run = wandb.init(
            project="dino2",
            name=run_folder.resolve().name,
            id=run_id,
            resume="allow",
            dir=str(run_folder / "logs"),
            config=config.model_dump(),
        )

    def write(self, metrics: Mapping[str, Any]) -> None:
        self._run.log(_numbers(metrics), step=int(metrics["iteration"]))

    def close(self) -> None:
        self._run.finish()


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in metrics.items()
        if name != "iteration" and isinstance(value, int | float) and not isinstance(value, bool)
    }
