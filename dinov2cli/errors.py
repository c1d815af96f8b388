"""The errors that dino2 raises for its users: one clear message each, no traceback."""


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


class ConfigError(Dino2Error):
    """A configuration key or value that cannot be used."""


class DataError(Dino2Error):
    """A dataset that cannot be found, read or understood."""


class WeightsError(Dino2Error):
    """Model weights that are missing, unknown, incomplete or of another architecture."""


class CheckpointError(Dino2Error):
    """A training checkpoint that cannot be written or resumed from."""


class EnvironmentProblem(Dino2Error):
    """A missing package, device, permission or disk space."""


class TrainingFailure(Dino2Error):
    """Training stopped because it cannot go on (for example losses that stay non-finite)."""

    exit_code = 1
