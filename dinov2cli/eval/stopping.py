"""Ctrl-C during an evaluation: it ends between two steps, with nothing half-written."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dinov2cli.console import Interrupted, interruption


@contextmanager
def stoppable(message: str = "stopping") -> Iterator[Callable[[], None]]:
    """A function that a loop calls between its steps; it raises `Interrupted` after Ctrl-C or SIGTERM.

    What is inside runs undisturbed between these calls, and to its end if there are none: a file is written whole or
    not begun. A second Ctrl-C raises at once. Inside of other work that handles signals, a training above all, they
    are left to that.
    """
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler) and handler is not signal.default_int_handler:
        yield lambda: None
        return
    with interruption(message) as signals:

        def stop_if_asked() -> None:
            if signals:
                raise Interrupted(signals[0])

        yield stop_if_asked
        stop_if_asked()
