"""DINOv2's objective: student, followers, and the terms between them (DINOv2 paper, section 4)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2cli.config import Config
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.losses import (
    DINOTerm,
    DistilledDINOTerm,
    DistilledIBOTTerm,
    GramLoss,
    GramTerm,
    KoLeoTerm,
    LossTerm,
    SinkhornKnoppCentering,
    SoftmaxCentering,
    iBOTTerm,
)
from dinov2cli.train.frozen_teacher import has_fresh_heads
from dinov2cli.train.gram_teacher import gram_follower
from dinov2cli.train.monitors import TeacherView
from dinov2cli.train.networks import FROZEN_TEACHER, OF_TEACHER, TEACHER, Follower, NetworkOutputs, Networks, SSLNetwork
from dinov2cli.train.schedules import Schedule, gram_loss_weight, local_loss_weight


class Losses(NamedTuple):
    """The weighted sum of all terms, which is minimised, and what is logged of each; float32 scalars."""

    total: Tensor
    logged: dict[str, Tensor]


class Term(NamedTuple):
    """A term as a run uses it.

    Args:
        loss: the term itself.
        weight: in the total; a number, or a function of the iteration.
        follower: whose tokens its targets are made of; None for a term that reads the student alone.
        logs_weighted: it is logged times its weight.
    """

    loss: LossTerm
    weight: float | Schedule
    follower: Follower | None = TEACHER
    logs_weighted: bool = False


CENTERINGS: dict[str, Callable[[int], nn.Module]] = {
    "centering": SoftmaxCentering,
    "sinkhorn_knopp": lambda n_prototypes: SinkhornKnoppCentering(),
}


def dino(config: Config) -> Term:
    """Class tokens against the teacher's."""
    centering, local = CENTERINGS[config.train.centering](config.dino.head_n_prototypes), local_loss_weight(config)
    if config.distillation.teacher:
        loss = DistilledDINOTerm(centering, local, fresh_heads=has_fresh_heads(config))
        return Term(loss, config.dino.loss_weight, FROZEN_TEACHER)
    return Term(DINOTerm(centering, local), config.dino.loss_weight)


def koleo(config: Config) -> Term:
    """Spread of the class tokens; the reference logs it times its weight."""
    return Term(KoLeoTerm(), config.dino.koleo_loss_weight, follower=None, logs_weighted=True)


def ibot(config: Config) -> Term:
    """Masked patches against the teacher's; without a weight nothing is masked, and the term is 0."""
    head = config.ibot if config.ibot.separate_head else config.dino
    centering = CENTERINGS[config.train.centering](head.head_n_prototypes)
    if config.distillation.teacher:
        loss = DistilledIBOTTerm(centering, fresh_heads=has_fresh_heads(config))
        return Term(loss, config.ibot.loss_weight, FROZEN_TEACHER)
    return Term(iBOTTerm(centering), config.ibot.loss_weight)


def gram(config: Config) -> Term | None:
    """Similarities between patches against the Gram teacher's."""
    keys = config.gram
    if not keys.use_loss:
        return None
    loss = GramLoss(
        normalized=keys.normalized, remove_neg=keys.remove_neg, remove_only_teacher_neg=keys.remove_only_teacher_neg
    )
    term = GramTerm(
        loss,
        img_level=keys.img_level,
        tokens_used=keys.tokens_used,
        resize_method=keys.global_teacher_resize_method,
        antialias=keys.global_teacher_resize_antialias,
    )
    return Term(term, gram_loss_weight(config), gram_follower(config))


TERMS: dict[str, Callable[[Config], Term | None]] = {"dino": dino, "koleo": koleo, "ibot": ibot, "gram": gram}
"""The terms in the order in which they are computed and summed; None where a run does without one.

Whoever has a term of his own puts it here before the run begins.
"""


class SSLMetaArch(nn.Module):
    """Student, followers and terms.

    Every network, and every child module of a term as `<term>_<child>`, is a child of this module: what is saved of a
    run are their states. `attention_backend` is a key of `models.attention.ATTENTION_BACKENDS`; `there` are
    followers that exist already, by name.
    """

    student: SSLNetwork
    teacher: SSLNetwork

    def __init__(
        self, config: Config, attention_backend: str = "sdpa", there: Mapping[str, SSLNetwork] | None = None
    ) -> None:
        super().__init__()
        self.config, self.attention_backend = config, attention_backend
        made = {name: make(config) for name, make in TERMS.items()}
        self.terms = {name: term for name, term in made.items() if term is not None}
        reads: frozenset[str] = frozenset().union(*(term.loss.reads for term in self.terms.values()))
        reads_of: dict[Follower, frozenset[str]] = {}
        for term in self.terms.values():
            if term.follower:
                reads_of[term.follower] = reads_of.get(term.follower, frozenset()) | term.loss.reads_of_follower
        self.networks = Networks(config, attention_backend, reads, reads_of, there or {})
        for name, network in self.networks.named():
            self.add_module(name, network)
        for name, term in self.terms.items():
            own = [*term.loss.parameters(recurse=False), *term.loss.buffers(recurse=False)]
            assert not own, f"{name}: what a term remembers belongs into a child module of it"
            for child, module in term.loss.named_children():
                self.add_module(f"{name}_{child}", module)
        self.forward_student: Callable[..., NetworkOutputs] = self.student.__call__
        """Runs the student; `train.sharding` puts a wrapper here that averages gradients over processes."""
        self.last_view: TeacherView | None = None
        """Of the last batch, which the monitors look at; None without a term that is watched."""

    def train(self, mode: bool = True) -> "SSLMetaArch":
        """As `nn.Module.train`, except that the followers stay in evaluation mode."""
        super().train(mode)
        for follower in self.networks.followers.values():
            follower.eval()
        return self

    def forward(
        self, batch: MultiCropBatch, values: Mapping[str, float], drop_generator: torch.Generator | None = None
    ) -> Losses:
        """Losses of one batch.

        Args:
            batch: crops and masks, on the model's device.
            values: of `Schedules.at`.
            drop_generator: CPU generator of the student's stochastic depth.
        """
        batch = batch.normalized()
        targets, of_teacher = self.targets(batch, values)
        # With a frozen teacher the student sees all patches; the masks only choose which of them are compared.
        unmasked = FROZEN_TEACHER.name in self.networks.followers
        crops, masks = [batch.global_crops, batch.local_crops], [None if unmasked else batch.masks, None]
        if not len(batch.local_crops):
            crops, masks = crops[:1], masks[:1]
        tokens = self.forward_student(crops, masks, batch.mask_indices, drop_generator, of_teacher)

        weighted: list[Tensor] = []
        logged: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            if term.loss.watched and term.loss.watches_student:
                self.last_view = TeacherView(tokens["cls"][: len(targets[name])].detach(), targets[name])
            value, parts = term.loss(tokens, targets[name], batch)
            weight = term.weight(int(values["iteration"])) if callable(term.weight) else term.weight
            weighted.append(weight * value)
            logged |= {key: weight * part if term.logs_weighted else part for key, part in parts.items()}
        return Losses(sum(weighted[1:], start=weighted[0]), logged)

    @torch.no_grad()
    def targets(
        self, batch: MultiCropBatch, values: Mapping[str, float]
    ) -> tuple[dict[str, Any], NetworkOutputs | None]:
        """What the student has to predict, by term, from the followers' views of the unmasked global crops.

        Of the targets only those of the class tokens are kept: the patches' would stay in memory through the next step.

        Returns:
            this; and the features of a frozen teacher whose heads are trained with the student, else None.
        """
        seen: dict[str, NetworkOutputs] = {
            name: network([getattr(batch, self.networks.rules[name].sees)], [None], batch.mask_indices)
            for name, network in self.networks.followers.items()
            if network.reads
        }
        of_teacher = None
        if (heads := self.teacher.teacher_heads) is not None:
            # The frozen teacher's scores are those of the moving average of the heads that are made for it.
            of_teacher = seen[FROZEN_TEACHER.name]
            reads = frozenset(name for name, there in OF_TEACHER.items() if there in self.student.reads)
            seen[FROZEN_TEACHER.name] = of_teacher | heads(of_teacher, reads)
        targets = {}
        for name, term in self.terms.items():
            tokens = seen.get(term.follower.name, {}) if term.follower else {}
            targets[name] = term.loss.targets(tokens, values)
            if term.loss.watched and not term.loss.watches_student:
                rows, columns = (side // self.config.student.patch_size for side in batch.global_crops.shape[-2:])
                crop, place = batch.mask_indices // (rows * columns), batch.mask_indices % (rows * columns)
                places = torch.stack([place // columns, place % columns], dim=-1)
                self.last_view = TeacherView(tokens["cls"], targets[name], tokens.get("masked"), crop, places)
        return targets, of_teacher

    def saved_state(self) -> dict[str, Tensor]:
        """The state that a run is saved with: without networks that can be read again where they came from."""
        unsaved = tuple(f"{name}." for name, rule in self.networks.rules.items() if not rule.is_saved)
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(unsaved)}

    def compile_parts(self) -> None:
        """Blocks, heads, centering and losses through torch.compile (`train.compile`), in place and each by itself.

        Compiled one by one, equal blocks share one compiled graph, and sharding can still treat each for itself: call
        this before it is applied. The blocks' shapes are fixed by the configuration, except in the last block, the
        heads and the losses, where the number of masked patches differs from step to step: these are compiled for any
        number.
        """
        for _, network in self.networks.named():
            network.compile_parts()
        for term in self.terms.values():
            for part in term.loss.children():
                part.compile()
