"""Keys of Gram anchoring (DINOv3 paper, section 4), and weights of losses that change in the course of a run."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from dinov2cli.config.group import Group, key
from dinov2cli.requests.images import Words


class WeightSchedule(Group):
    """Linear from `start` to `peak`, half a cosine from `peak` to `end`, then `end`; the reference's keys.

    Args:
        warmup_epochs: of the linear part.
        cosine_epochs: of the cosine; None: the rest of the run.
    """

    start: float = key(0.0, "", ge=0)
    peak: float = key(0.0, "", ge=0)
    end: float = key(0.0, "", ge=0)
    warmup_epochs: int = key(0, "", ge=0)
    cosine_epochs: int | None = key(None, "", ge=0)


_EXPECTED = "{start: A, peak: B, end: C, warmup_epochs: M, cosine_epochs: N} with numbers of 0 and more"
ScheduleOfWeight = Annotated[WeightSchedule, Words(_EXPECTED, WeightSchedule.model_validate_json)]


class Gram(Group):
    """Gram anchoring: the patches of an image stay as similar to each other as an earlier teacher has them."""

    use_loss: bool = key(False, "Use the loss.")
    loss_weight: float = key(1.0, "Weight of the loss.", ge=0)
    loss_weight_schedule: ScheduleOfWeight | None = key(
        None,
        "Instead of loss_weight: linear from start to peak, half a cosine from there to end, then end; null: none. "
        "Without cosine_epochs the cosine lasts for the rest of the run.",
    )
    ema_teacher: bool = key(False, "Anchor to the running teacher itself, which sees the student's global crops.")
    ckpt: str | None = key(
        None, "Weights that the Gram teacher begins with, of the student's architecture: a run, a file, a URL; or null."
    )
    it_load_ema_teacher: int = key(
        -1, "Iteration before which the Gram teacher becomes what the teacher is; no loss until then; -1: never.", ge=-1
    )
    rep_update: bool = key(True, "Refresh the Gram teacher: every update_frequency iterations it becomes the teacher.")
    update_frequency: int = key(50000, "Iterations between refreshes.", ge=1)
    it_first_update: int = key(0, "Iterations before the first refresh.", ge=0)
    max_updates: int | None = key(None, "Refreshes in all; null: any number.", ge=0)
    normalized: bool = key(True, "Compare cosine similarities; false: products of features as they are.")
    img_level: bool = key(False, "Compare patches within each image; false: all of a process's batch with each other.")
    remove_neg: bool = key(False, "Take negative similarities for 0, on both sides.")
    remove_only_teacher_neg: bool = key(False, "Take the Gram teacher's negative similarities for 0.")
    tokens_used: Literal["all", "masked", "unmasked"] = key(
        "all", "Patches that are compared; those of masks need img_level=false."
    )
    global_teacher_resize_method: Literal["bicubic", "bilinear"] = key(
        "bicubic", "How the features of larger Gram teacher crops are brought to the student's grid."
    )
    global_teacher_resize_antialias: bool = key(False, "With a filter against aliasing.")

    def has_own_teacher(self) -> bool:
        """Whether there is a network for it, beside the running teacher."""
        return self.use_loss and not self.ema_teacher

    def contradictions(self) -> Iterator[str]:
        """Values of these keys that do not fit each other, as in `Config`."""
        if not self.use_loss:
            return
        if self.ema_teacher:
            given: dict[str, tuple[Any, str]] = {
                "rep_update": (self.rep_update, "false"),
                "ckpt": (self.ckpt, "null"),
                "it_load_ema_teacher": (self.it_load_ema_teacher + 1, "-1"),
            }
            for name, (value, wanted) in given.items():
                if value:
                    yield (
                        f"gram.{name}={getattr(self, name)}: the running teacher is the Gram teacher with "
                        f"gram.ema_teacher=true, and is neither loaded nor refreshed; set gram.{name}={wanted}"
                    )
        elif not self.ckpt and self.it_load_ema_teacher < 0:
            yield (
                "gram.use_loss=true: the Gram teacher begins with nothing; set gram.ckpt to weights, or "
                "gram.it_load_ema_teacher to the iteration at which it becomes what the teacher is"
            )
        if self.tokens_used != "all" and self.img_level:
            yield (
                f"gram.tokens_used={self.tokens_used}: images have different numbers of such patches; set "
                "gram.img_level=false, or gram.tokens_used=all"
            )
        if self.remove_neg and self.remove_only_teacher_neg:
            yield "gram.remove_only_teacher_neg=true: gram.remove_neg=true does that already; set one of both"
