"""Several students of one frozen teacher, trained side by side: each is a run of its own, with the numbers that it has
alone, and the teacher's pass over a batch is done once.

So distillation costs the teacher once, and not once for each size that is wanted of it, as DINOv3's family was made.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from dinov2cli import distributed
from dinov2cli.console import Interrupted, logger, speaking
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.errors import ConfigError, TrainingFailure
from dinov2cli.train.networks import FROZEN_TEACHER
from dinov2cli.train.resuming import check_same_batches
from dinov2cli.train.trainer import Trainer, stream_of


class Shared(Iterator[MultiCropBatch]):
    """An iteration's batches, for one student after the other, and what the teacher's backbone makes of them.

    They are on the device and normalised: crops that are the same tensor are seen once. What is kept are the tokens
    that are read, not the scores over prototypes that each student's pass makes of them, which are large.

    Args:
        batches: of the whole training.
        run: any of those that share it, and with it the teacher, if there is one.
    """

    def __init__(self, batches: Iterator[MultiCropBatch], run: Trainer) -> None:
        self.batches, self.run = batches, run
        self.kept: list[MultiCropBatch] = []
        self.place = 0
        self.seen: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
        if teacher := run.objective.networks.followers.get(FROZEN_TEACHER.name):
            self.look, teacher.see = teacher.backbone.forward_tokens, self.tokens

    def __next__(self) -> MultiCropBatch:
        if self.place == len(self.kept):
            self.kept.append(self.run.on_device(next(self.batches)).normalized())
        self.place += 1
        return self.kept[self.place - 1]

    def tokens(self, crops: list[Tensor], *others: Any) -> tuple[Tensor, Tensor]:
        """As `VisionTransformer.forward_tokens`."""
        for images, tokens in self.seen:
            if images is crops[0]:
                return tokens
        self.seen.append((crops[0], self.look(crops, *others)))
        return self.seen[-1][1]

    def again(self, *, new: bool) -> None:
        """For the next student; or for the first, a `new` iteration."""
        self.place = 0
        if new:
            self.kept.clear()
            self.seen.clear()


def train_students(runs: Sequence[Trainer]) -> None:
    """Train all to their ends; a single run as it does by itself.

    They go in step from the iteration of the one that is least far: another that has done more, as its checkpoint came
    later, waits for it. One that fails by itself, by losses that are not finite or a collapse, is left behind.

    Args:
        runs: all but the first made `beside` it.

    Raises:
        ConfigError: the students have not seen the same images.
        TrainingFailure: some failed; the others have come to their ends.
        Dino2Error, Interrupted: as `Trainer.train`, of all.
    """
    going = [run for run in runs if run.iteration < run.total]
    if len(runs) == 1 or not going:
        for run in runs:
            run.train()
        return
    check_goes_together(going)
    names = {run: run.folder.path.name for run in runs}
    last = min(going, key=lambda run: run.iteration)
    loader = last.make_loader(max(run.total for run in going))
    failures: list[str] = []
    interrupted: Interrupted | None = None
    with ExitStack() as stack:
        for run in going:
            with speaking(names[run]):
                run.begin(loader, stack)
        for run in going:
            stack.enter_context(run.record.display)
        batches, signals = stack.enter_context(stream_of(loader))
        shared = Shared(batches, last)
        steps = {run: run.steps(shared, signals) for run in going}
        while steps:
            iteration = min(run.iteration for run in steps)
            now = [run for run in steps if run.iteration == iteration]
            for run in now:
                shared.again(new=run is now[0])
                try:
                    with speaking(names[run]):
                        next(steps[run])
                except Interrupted as stop:  # saved; the others see the same signal
                    interrupted = stop
                except TrainingFailure as failure:
                    if distributed.is_main():
                        logger.error("%s: %s; it is left behind", names[run], failure.message)
                    failures.append(f"student {names[run]}: {failure}")
                else:
                    if run.iteration < run.total:
                        continue
                del steps[run]
    if interrupted:
        raise interrupted
    if failures:
        raise TrainingFailure("\n".join(failures))


def check_goes_together(runs: Sequence[Trainer]) -> None:
    """Whether the students, as they go on, see the same batches.

    Raises:
        ConfigError: one has had other batches, or more of them in an iteration, in the time when it was trained alone.
    """
    check_same_batches([run.config for run in runs])
    first = runs[0]
    for run in runs[1:]:
        images = (run.iteration - first.iteration) * first.record.images_per_iteration
        if run.record.samples_seen != first.record.samples_seen + images:
            seen = [f"{each.folder.path} {each.record.samples_seen} images in {each.iteration} iterations"
                    for each in (first, run)]  # fmt: skip
            raise ConfigError(
                f"distillation.students: have not seen the same images: {seen[0]}, {seen[1]}",
                "They were trained with other batches before: go on with each alone.",
            )
