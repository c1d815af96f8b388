"""What the processes of a run tell each other before every iteration, so that they do the same thing next."""

import signal
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from dinov2cli import distributed
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.errors import Dino2Error

# The later wins where processes have got different ones: whoever asks for a requeue is going to start the run again.
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR2] if hasattr(signal, "SIGUSR2") else []))


class Standing(NamedTuple):
    """The same in every process.

    Args:
        signal: number of a signal that some process has got, or 0.
        bad_images: unreadable images in the coming batches of all processes.
        checkpoint_failed: some process could not write its part of a checkpoint.
        collapsed: the process that looks gives the run up.
    """

    signal: int
    bad_images: int
    checkpoint_failed: bool
    collapsed: bool


def next_batches(
    batches: Iterator[MultiCropBatch], count: int, signals: Sequence[int], checkpoint_failed: bool, collapsed: bool
) -> tuple[list[MultiCropBatch], Standing]:
    """This process's next `count` batches, and how all processes stand.

    One small sum over the processes, of numbers in main memory: the device is not waited for. `signals`,
    `checkpoint_failed` and `collapsed` are this process's own.

    Raises:
        Dino2Error: the data of some process cannot be read; every process raises it.
    """
    fetched, problem = [], None
    try:
        fetched = list(islice(batches, count))
    except Dino2Error as error:
        problem = error
    bad = sum(len(batch.bad) for batch in fetched)
    got = [number in signals for number in SIGNALS]
    told = torch.tensor([problem is not None, bad, checkpoint_failed, collapsed, *got], dtype=torch.int64)
    problems, bad, failed, given_up, *got = distributed.all_reduce_sum(told).tolist()
    if problems:
        with distributed.same_error_everywhere():
            if problem is not None:
                raise problem
    received = [int(number) for number, count in zip(SIGNALS, got, strict=True) if count]
    return fetched, Standing(received[-1] if received else 0, bad, bool(failed), bool(given_up))
