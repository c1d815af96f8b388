"""Where the files of a run are, with the reference's names."""

from contextlib import suppress
from pathlib import Path

import yaml

from dinov2cli.errors import ConfigError
from dinov2cli.files import parse_yaml
from dinov2cli.train.verdicts import BASELINES_FILE, VERDICTS_FILE

# Of evaluations nothing: they may be running, and are done again.
LEFTOVERS = (".dino2-preflight-*", ".dino2-owner.*", ".dino2-write-test", ".config.yaml.*.partial",
             ".*_metrics.json.*.partial", f".{VERDICTS_FILE}.*.partial", "logs/heartbeat/.rank_*.partial",
             "eval/training_*/.teacher_checkpoint.pth.*.partial")  # fmt: skip


def written_by_dino2(config: Path) -> bool:
    """Whether a config.yaml has the keys that dino2 adds to the reference's, in whatever version."""
    try:
        train = parse_yaml(config.read_text())["train"]
        return "keep" in train or "gradient_accumulation" in train
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError):
        return False


class RunFolder:
    """Paths below the run's `--output-dir`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.log = path / "logs" / "train.log"
        self.metrics = path / "training_metrics.json"
        self.knn_metrics = path / "knn_metrics.json"
        self.knn_baselines = path / BASELINES_FILE
        self.verdicts = path / VERDICTS_FILE
        self.checkpoints = path / "checkpoints"

    def teacher(self, iteration: int) -> Path:
        """Teacher checkpoint after the iteration of that number, counted from 0 as in the reference."""
        return self.path / "eval" / f"training_{iteration}" / "teacher_checkpoint.pth"

    def log_of(self, rank: int) -> Path:
        """Log of a process: the first one's is the run's."""
        return self.log if rank == 0 else self.log.with_name(f"rank_{rank:05d}.log")

    def heartbeat(self, rank: int) -> Path:
        """Where a process says that it is alive."""
        return self.path / "logs" / "heartbeat" / f"rank_{rank:05d}.json"

    def stacks(self, rank: int) -> Path:
        """Where a process that hangs says what it is doing."""
        return self.path / "logs" / "stacks" / f"rank_{rank:05d}.txt"

    def has_checkpoints(self) -> bool:
        return any(self.checkpoints.glob("iteration_*"))

    def refuse_foreign(self) -> None:
        """Refuse a folder with a run that dino2 has not written: nothing in it is ever changed.

        Raises:
            ConfigError: it holds one.
        """
        theirs = [*self.path.glob("model_*.rank_*.pth"), *self.path.glob("last_checkpoint.rank_*")]
        if self.config.is_file():
            theirs += [] if written_by_dino2(self.config) else [self.config]
        else:
            theirs += [
                path for path in (self.metrics, self.path / "eval") if path.exists() and not self.has_checkpoints()
            ]
        if theirs:
            raise ConfigError(
                f"{self.path} holds a run that dino2 has not written ({theirs[0].name}), and is left as it is",
                f"Start from its teacher in a folder of its own: --init-from {self.path} --output-dir NEW",
            )

    def make(self) -> None:
        """Create the folder, or say why that is not possible."""
        self.refuse_foreign()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".dino2-write-test"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"--output-dir {self.path}: cannot be written to ({error.strerror})") from error

    def clear_leftovers(self) -> None:
        """Remove what trainings that were killed had not given its name yet; for the one that owns the folder."""
        for pattern in LEFTOVERS:
            for path in self.path.glob(pattern):
                with suppress(OSError):
                    path.unlink()

    def set_aside(self) -> Path | None:
        """Move an earlier run's files into `previous_<n>/`, so that a new one starts in a clean folder.

        Returns:
            that folder, or None where there was nothing to move.
        """
        metrics = self.metrics, self.knn_metrics, self.knn_baselines, self.verdicts
        files = [self.config, self.log.parent, *metrics, self.checkpoints, self.path / "eval"]
        there = [file for file in files if file.exists()]
        if not there:
            return None
        number = 1
        while (folder := self.path / f"previous_{number}").exists():
            number += 1
        folder.mkdir()
        for file in there:
            file.rename(folder / file.name)
        return folder
