"""The errors that dino2 raises for its users: one clear message each, no traceback."""

import difflib
import errno
import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType

# What an OSError may say of the machine; others (a file that is missing, a pipe that is closed) say something of dino2.
OF_THE_MACHINE = {
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENAMETOOLONG, errno.ENFILE, errno.ENODEV,
    errno.ENOSPC, errno.ENXIO, errno.EPERM, errno.EROFS, errno.ESTALE,
}  # fmt: skip
OF_A_LOADER = "DataLoader worker"
"""In the words by which torch interrupts the main thread, wherever it stands, when one of its data loaders has died."""


class Dino2Error(Exception):
    """Something the user can put right. The command line prints the message alone and exits with `exit_code`.

    Args:
        message: names the key, file or value at fault and what would be right, in one sentence.
        hint: what to do next, printed on a line of its own.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """For the end of a message: `; did you mean NAME?` where one of the known names is much like a word."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else otherwise


class ConfigError(Dino2Error):
    """A configuration key or value that cannot be used."""


class DataError(Dino2Error):
    """A dataset that cannot be found, read or understood."""


class WeightsError(Dino2Error):
    """Model weights that are missing, unknown, incomplete or of another architecture."""


@contextmanager
def weights_of(key: str) -> Iterator[None]:
    """Around what reads the weights that a key or an option names: an error begins with it."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{key}: {error.message}", error.hint) from None


class CheckpointError(Dino2Error):
    """A training checkpoint that cannot be written or resumed from."""


class EnvironmentProblem(Dino2Error):
    """A missing package, device, permission or disk space."""


def need(package: str, comes_with: str = "'dinov2cli[export]'") -> ModuleType:
    """Import an optional package. Signals are heard afterwards: the binary parts of some (onnx) crash where one raises.

    Raises:
        EnvironmentProblem: it is not installed, and what to install.
    """
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in numbers}
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError, OSError) as error:  # the last two: a binary part that does not load
        raise EnvironmentProblem(
            f"{package} does not import ({error}); it comes with: pip install {comes_with}"
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for heard in received[:1]:
            signal.raise_signal(heard)


@contextmanager
def machine_problems() -> Iterator[None]:
    """Turn an OSError inside that says something of the machine (a full or read-only disk, a limit, a permission) into
    an EnvironmentProblem, for the places that do not say it better themselves."""
    try:
        yield
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        hints = {
            errno.ENOSPC: "Make space and run the same command again.",
            errno.EDQUOT: "Make space and run the same command again.",
            errno.EMFILE: "Raise the limit of open files (`ulimit -n`), or use fewer workers.",
        }
        raise EnvironmentProblem(
            f"{where}{error.strerror or error}", hints.get(error.errno, "Mend that and run the same command again.")
        ) from error


class ProcessKilled(EnvironmentProblem):
    """A process that the system has killed or given no memory. A supervised training starts again."""


class TrainingFailure(Dino2Error):
    """Training stopped because it cannot go on (for example losses that stay non-finite)."""

    exit_code = 1


class Several(Dino2Error):
    """Several errors as one: a numbered list, each with its remedy."""

    def __init__(self, found: list[Dino2Error]) -> None:
        lines, hints = [f"{len(found)} things are wrong:"], set()
        for number, error in enumerate(found, 1):
            new = error.hint if error.hint not in hints else None  # what mends several is said once
            hints.add(error.hint)
            lines.append(f"{number}. {Dino2Error(error.message, new)}".replace("\n", "\n   "))
        super().__init__("\n".join(lines))
        self.found = found


class Problems:
    """What several checks find wrong, told at once, in the order of the checks: what to mend first comes first."""

    def __init__(self) -> None:
        self.found: list[Dino2Error] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Around one check: what it raises is kept for `tell`."""
        try:
            yield
        except Several as several:
            self.found += several.found
        except Dino2Error as error:
            if str(error) not in map(str, self.found):
                self.found.append(error)

    def tell(self) -> None:
        """Raise what was found: a single error as it is, several as one with a numbered list, remedies included."""
        if not self.found:
            return
        if len(self.found) == 1:
            raise self.found[0]
        raise Several(self.found)


def check_all(*checks: Callable[[], object]) -> None:
    """Make all checks, and raise what they find as `Problems` does."""
    wrong = Problems()
    for check in checks:
        with wrong.noted():
            check()
    wrong.tell()
