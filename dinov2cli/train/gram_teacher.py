"""The Gram teacher: an earlier teacher, whose similarities between patches the student keeps (`losses.gram`)."""

from torch import Tensor

from dinov2cli import distributed
from dinov2cli.config import Config
from dinov2cli.console import logger
from dinov2cli.errors import weights_of
from dinov2cli.models.load import load_backbone_into
from dinov2cli.models.load.locate import check_there, locate_together
from dinov2cli.train.networks import TEACHER, Follower, Networks, copy

NAME = "gram_teacher"


def gram_follower(config: Config) -> Follower:
    """The network whose patches the student's are compared with, and when it becomes what the teacher is."""
    gram = config.gram
    if gram.ema_teacher:
        return TEACHER
    return Follower(
        NAME,
        "snapshot",
        period=gram.update_frequency if gram.rep_update else 0,
        first=gram.it_first_update,
        most=gram.max_updates,
        loads_at=gram.it_load_ema_teacher,
        sees="gram_teacher_crops" if config.crops.gram_teacher_crops_size else "global_crops",
    )


class GramTeacher:
    """How the Gram teacher of a run begins; nothing where the run has none of its own.

    A run that goes on may take one up: its checkpoint then holds none.

    Args:
        networks: of the run.
        is_saved: the checkpoint with which the run goes on holds it.
    """

    def __init__(self, config: Config, networks: Networks, *, is_saved: bool) -> None:
        self.gram, self.networks, self.is_saved = config.gram, networks, is_saved
        self.network = networks.followers.get(NAME)

    def read(self) -> None:
        """Put the weights that `gram.ckpt` names into it, unless a checkpoint holds its own. Collective.

        Raises:
            WeightsError: they are not there, or not of the student's architecture; the message begins with the key.
        """
        if self.network is None or self.is_saved or not self.gram.ckpt:
            return
        with weights_of("gram.ckpt"):
            source = locate_together(self.gram.ckpt)
        with distributed.same_error_everywhere(), weights_of("gram.ckpt"):
            report = load_backbone_into(self.network.backbone, source)
        if distributed.is_main():
            logger.info("Gram teacher: %s", report)

    def what_is_saved(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the run's state, what the checkpoint holds."""
        if self.network is None or self.is_saved:
            return state
        return {name: tensor for name, tensor in state.items() if not name.startswith(f"{NAME}.")}

    def join(self, iteration: int) -> None:
        """Begin in a run that has done so many iterations without it: as its teacher, where no weights are named."""
        if self.network is None or self.is_saved:
            return
        if not self.gram.ckpt:
            copy(self.networks.teacher, self.network)
        begins = self.gram.ckpt or f"the teacher after {iteration} iterations"
        logger.info("the run takes up Gram anchoring; its Gram teacher is %s", begins)

    def facts(self) -> dict[str, int]:
        """For checkpoints: whether they hold it."""
        return {} if self.network is None else {NAME: 1}


def check_weights_there(config: Config) -> None:
    """Whether `gram.ckpt` names a file, folder or released name; nothing is downloaded.

    Raises:
        WeightsError: there is none.
    """
    if config.gram.use_loss and config.gram.ckpt:
        with weights_of("gram.ckpt"):
            check_there(config.gram.ckpt)


def describe(config: Config) -> str:
    """For the plan: what the Gram teacher is, sees, and when it changes."""
    gram, crops = config.gram, config.crops
    if gram.ema_teacher:
        return "the running teacher"
    begins = gram.ckpt or f"the teacher before iteration {gram.it_load_ema_teacher}"
    sizes = [str(each.gram_teacher_size or each.global_size) for each in crops.resolutions()]
    size = " or ".join(sizes)
    if not gram.rep_update:
        return f"{begins}, crops of {size} pixels, never refreshed"
    first = -(-max(gram.it_first_update, 1) // gram.update_frequency) * gram.update_frequency
    times = "" if gram.max_updates is None else f", {gram.max_updates} times"
    return (
        f"{begins}, crops of {size} pixels; the teacher after {first} iterations, and every "
        f"{gram.update_frequency}{times}"
    )
