"""The student, the networks that follow it, and the named sets of tokens that they give: see `losses.term`."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov2cli.config import Config
from dinov2cli.config.library import LibraryConfig
from dinov2cli.config.schema import Dino, Ibot
from dinov2cli.models.dino_head import DINOHead
from dinov2cli.models.library_backbone import Backbone, LibraryBackbone
from dinov2cli.models.load import build_from
from dinov2cli.models.positions import RopeAugmentation
from dinov2cli.models.trained_part import plain_parameters, train_only
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.train.batch_norm import running_averages
from dinov2cli.train.frozen_teacher import check_fits, frozen_teacher, read_teacher

NetworkOutputs = dict[str, Tensor]
"""Token sets by name. A plain dict: DDP and FSDP look into no other mapping."""
OF_TEACHER = {f"{name}_scores": f"teacher_{name}_scores" for name in ("cls", "masked")}
"""What the heads that are trained for a frozen teacher give of its tokens: scores, by what they are called there."""
TOKEN_SETS = frozenset({"cls", "masked", "patches", *OF_TEACHER})
OF_ANOTHER = "teacher_heads"
"""Child of a network that belongs to a frozen teacher, and is not saved with the network for evaluation."""


class Heads(nn.Module):
    """The projection heads of class tokens and patches; None for the patches where they share the class tokens'."""

    def __init__(self, dino_head: DINOHead, ibot_head: DINOHead | None) -> None:
        super().__init__()
        self.dino_head, self.ibot_head = dino_head, ibot_head

    def forward(self, found: NetworkOutputs, reads: frozenset[str]) -> NetworkOutputs:
        """`cls_scores` and `masked_scores`, those that are read."""
        return prototype_scores(found, reads, self.dino_head, self.ibot_head)


def prototype_scores(
    found: NetworkOutputs, reads: frozenset[str], dino_head: DINOHead, ibot_head: DINOHead | None
) -> NetworkOutputs:
    """The scores that are read, of the tokens that were found."""
    wanted = [name for name in ("cls", "masked") if f"{name}_scores" in reads]
    if len(wanted) == 2 and ibot_head is None:  # a shared head sees one concatenation
        both = dino_head(torch.cat([found[name] for name in wanted]))
        scores = both.split([len(found[name]) for name in wanted])
    else:
        heads = {"cls": dino_head, "masked": ibot_head or dino_head}
        scores = [heads[name](found[name]) for name in wanted]
    return {f"{name}_scores": rows for name, rows in zip(wanted, scores, strict=True)}


class SSLNetwork(nn.Module):
    """A backbone with its projection heads. Keys as in teacher checkpoints.

    Args:
        backbone: the vision transformer, or a backbone of another library.
        dino_head: head of the class tokens; None in a network whose scores nobody reads.
        ibot_head: head of the patches; None where they share the class tokens' head.
        reads: the token sets that are computed.
        teacher_heads: heads for a frozen teacher that has none, which are trained with this network.
    """

    def __init__(
        self,
        backbone: Backbone,
        dino_head: DINOHead | None,
        ibot_head: DINOHead | None,
        reads: frozenset[str],
        teacher_heads: Heads | None = None,
    ) -> None:
        super().__init__()
        known = TOKEN_SETS.union(OF_TEACHER.values())
        assert reads <= known, f"unknown token sets {sorted(reads - known)}; known: {sorted(known)}"
        self.backbone, self.dino_head, self.ibot_head, self.reads = backbone, dino_head, ibot_head, reads
        self.teacher_heads = teacher_heads
        self.see: Callable[..., tuple[Tensor, Tensor]] | None = None
        """In place of the backbone's pass; `train.students` puts here what does the teacher's once for all."""

    def heads(self) -> list[DINOHead]:
        return [module for module in self.modules() if isinstance(module, DINOHead)]

    def forward(
        self,
        crops: list[Tensor],
        masks: list[Tensor | None],
        mask_indices: Tensor,
        drop_generator: torch.Generator | None = None,
        of_teacher: NetworkOutputs | None = None,
    ) -> NetworkOutputs:
        """All crops in one packed pass; see `VisionTransformer.forward_tokens` for the arguments.

        Of the last block, only what is read is computed. `of_teacher` are a frozen teacher's tokens, which the heads
        that are trained for it score.
        """
        images = crops[0].shape[0]
        wanted = mask_indices if self.reads & {"masked", "masked_scores"} else mask_indices[:0]
        if "patches" in self.reads:
            height, width = (side // self.backbone.patch_size for side in crops[0].shape[-2:])
            wanted = torch.arange(images * height * width, device=mask_indices.device)
        see = self.see or self.backbone.forward_tokens
        cls, rows = see(crops, masks, wanted, drop_generator)
        found = {"cls": cls, "masked": rows}
        if "patches" in self.reads:
            found |= {"masked": rows.index_select(0, mask_indices), "patches": rows.unflatten(0, (images, -1))}
        if self.reads & OF_TEACHER.keys():
            assert self.dino_head is not None, "a network whose scores are read has heads"
            found |= prototype_scores(found, self.reads, self.dino_head, self.ibot_head)
        if of_teacher is not None and self.teacher_heads is not None:
            reads = frozenset(name for name, there in OF_TEACHER.items() if there in self.reads)
            found |= {OF_TEACHER[name]: rows for name, rows in self.teacher_heads(of_teacher, reads).items()}
        return {name: tokens for name, tokens in found.items() if name in self.reads}

    def compile_parts(self) -> None:
        """Every block and head through torch.compile, in place and each by itself; names of parameters stay."""
        for part in (*self.backbone.blocks, *self.heads()):
            part.compile()


class Follower(NamedTuple):
    """A network beside the student, without gradients, from whose tokens terms make their targets.

    Args:
        name: under which its weights are saved.
        rule: how it follows, a key of `RULES`.
        period: iterations between the snapshots that `snapshot` takes; 0: none.
        first, most: iterations before the first of them, and how many there are; None: any number.
        loads_at: iterations after which it takes one whatever the period says; -1: never.
        sees: which crops of the batch.
        make: builds it, whole and with its weights, from the configuration and the attention backend; without it, it is
            built as the student is, and begins as the student does.
        is_saved: with the run; not so what can be read again where it came from.
    """

    name: str
    rule: str
    period: int = 1
    first: int = 0
    most: int | None = None
    loads_at: int = -1
    sees: str = "global_crops"
    make: Callable[[Config, str], SSLNetwork] | None = None
    is_saved: bool = True


TEACHER = Follower("teacher", "ema")
"""The follower that every run has, and that is saved for evaluation and scored."""


class Networks:
    """The student and its followers, with fresh weights.

    Args:
        config: sizes.
        attention_backend: a key of `models.attention.ATTENTION_BACKENDS`.
        reads: token sets that are read of the student.
        reads_of: token sets that are read of each follower.
        there: followers that exist already, by name.
    """

    def __init__(
        self, config: Config, attention_backend: str, reads: frozenset[str],
        reads_of: Mapping[Follower, frozenset[str]], there: Mapping[str, SSLNetwork],
    ) -> None:  # fmt: skip
        self.student = build_network(config, attention_backend, config.student.drop_path_rate, reads)
        if isinstance(self.student.backbone, VisionTransformer):
            train_only(self.student.backbone, config.student.trained())
        else:
            self.student.backbone.freeze_unused()
        self.rules = {follower.name: follower for follower in (TEACHER, *reads_of)}
        self.followers: dict[str, SSLNetwork] = {}
        for name, follower in self.rules.items():
            read = reads_of.get(follower, frozenset())
            if name in there:
                network = there[name]
            elif follower.make:
                with torch.random.fork_rng(devices=[]):  # what it draws changes nothing of the run
                    network = follower.make(config, attention_backend)
            else:  # what is saved has its heads, read or not
                heads = follower == TEACHER or bool(read & {"cls_scores", "masked_scores"})
                network = build_network(config, attention_backend, heads=heads)
            network.reads = read
            self.followers[name] = network.requires_grad_(False).eval()
        self.begin()

    @property
    def teacher(self) -> SSLNetwork:
        """The moving average, which is saved and scored."""
        return self.followers[TEACHER.name]

    def named(self) -> Iterator[tuple[str, SSLNetwork]]:
        """All by the names under which they are saved."""
        yield "student", self.student
        yield from self.followers.items()

    @torch.no_grad()
    def begin(self) -> None:
        """Give the student's weights to every follower that does not bring its own."""
        for name, network in self.followers.items():
            if self.rules[name].make is None:
                copy(self.student, network)

    @torch.no_grad()
    def follow(self, values: Mapping[str, float]) -> None:
        """Move every follower by its rule after the student's step of `values["iteration"]`."""
        for name, network in self.followers.items():
            RULES[self.rules[name].rule](self, network, self.rules[name], values)


def ema(networks: Networks, network: SSLNetwork, follower: Follower, values: Mapping[str, float]) -> None:
    """Towards the student: f = momentum * f + (1 - momentum) * s, backbone and heads, BatchNorm's averages too."""
    torch._foreach_lerp_(*common_parameters(network, networks.student), 1 - values["momentum"])
    averages = (running_averages(each.backbone) for each in (network, networks.student))
    for own, theirs in zip(*averages, strict=True):
        own.lerp_(theirs, 1 - values["momentum"])


def frozen(networks: Networks, network: SSLNetwork, follower: Follower, values: Mapping[str, float]) -> None:
    """As it was."""


def snapshot(networks: Networks, network: SSLNetwork, follower: Follower, values: Mapping[str, float]) -> None:
    """What the teacher is after every `period` iterations, within the follower's limits."""
    done = int(values["iteration"]) + 1
    due = done == follower.loads_at
    if follower.period and done % follower.period == 0 and done >= follower.first:
        with_this = done // follower.period - max(0, follower.first - 1) // follower.period
        due = due or follower.most is None or with_this <= follower.most
    if due:
        copy(networks.teacher, network)


RULES: dict[str, Callable[[Networks, SSLNetwork, Follower, Mapping[str, float]], None]]
RULES = {"ema": ema, "frozen": frozen, "snapshot": snapshot}


def copy(source: SSLNetwork, target: SSLNetwork) -> None:
    """The source's parameters and buffers into those of a network that is spread over processes in the same way."""
    for own, theirs in zip(*common_parameters(target, source), strict=True):
        own.copy_(theirs)
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        buffer.copy_(buffers[name])


def common_parameters(network: SSLNetwork, source: SSLNetwork) -> tuple[list[Tensor], list[Tensor]]:
    """What this process holds of a network's parameters, and of the source's with the same names, adapters merged."""
    own, theirs = plain_parameters(network), plain_parameters(source)
    return list(own.values()), [theirs[name] for name in own]


def build_network(
    config: Config,
    attention_backend: str = "sdpa",
    drop_path_rate: float = 0.0,
    reads: frozenset[str] = frozenset(),
    *,
    heads: bool = True,
) -> SSLNetwork:
    """Backbone and, unless asked for without, heads of the configured sizes with fresh weights."""
    backbone = build_backbone(config, attention_backend, drop_path_rate)
    dino_head = build_head(config.dino, backbone.embed_dim) if heads else None
    ibot_head = build_head(config.ibot, backbone.embed_dim) if heads and config.ibot.separate_head else None
    teacher, teacher_heads = frozen_teacher(config) if heads else None, None
    if teacher is not None:
        if isinstance(backbone, VisionTransformer):
            backbone.mask_token.requires_grad_(False)  # nothing is masked: it stays as it is
        if not teacher.heads:
            width = teacher.vit.embed_dim
            patches = build_head(config.ibot, width) if config.ibot.separate_head else None
            teacher_heads = Heads(build_head(config.dino, width), patches)
    return SSLNetwork(backbone, dino_head, ibot_head, reads, teacher_heads)


def build_frozen_teacher(config: Config, attention_backend: str = "sdpa") -> SSLNetwork:
    """The teacher of `distillation.teacher` with its weights, and its heads if it has any.

    Where sizes alone are asked for, on the meta device and among fake tensors, the weights are not read.

    Raises:
        ConfigError, WeightsError: as `frozen_teacher.check_fits`.
    """
    check_fits(config)
    known, ambient = frozen_teacher(config), torch.empty(0)
    assert known is not None
    if ambient.is_meta or type(ambient) is not Tensor:
        shaped = VisionTransformer(known.vit, attention_backend=attention_backend)
        heads = {name: DINOHead(*sizes) for name, sizes in known.heads.items()}
        return SSLNetwork(shaped, heads.get("dino_head"), heads.get("ibot_head"), frozenset())
    weights, found = read_teacher(config)
    backbone, heads = build_from(weights, attention_backend=attention_backend), {}
    for name, head in found.items():
        heads[name] = DINOHead(*head.sizes)
        heads[name].load_state_dict(head.state)
    return SSLNetwork(backbone, heads.get("dino_head"), heads.get("ibot_head"), frozenset())


FROZEN_TEACHER = Follower("frozen_teacher", "frozen", make=build_frozen_teacher, is_saved=False)
"""That of a distillation; the moving average, `TEACHER`, is then what is saved and scored alone."""


def build_backbone(config: Config, attention_backend: str = "sdpa", drop_path_rate: float = 0.0) -> Backbone:
    """The configured vision transformer, or backbone of another library, with fresh weights."""
    wanted = config.backbone()
    if isinstance(wanted, LibraryConfig):
        of_library = LibraryBackbone(wanted)
        of_library.images = config.images()
        return of_library
    backbone = VisionTransformer(
        wanted,
        drop_path_rate=drop_path_rate,
        drop_path_uniform=config.student.drop_path_uniform,
        attention_backend=attention_backend,
        activation_checkpointing=config.train.activation_checkpointing,
        rope_augmentation=RopeAugmentation(
            *(getattr(config.student, f"pos_embed_rope_{name}_coords") for name in RopeAugmentation._fields)
        ),
    )
    backbone.images = config.images()
    return backbone


def build_head(sizes: Dino | Ibot, in_dim: int) -> DINOHead:
    return DINOHead(
        in_dim, sizes.head_n_prototypes, sizes.head_nlayers, sizes.head_hidden_dim, sizes.head_bottleneck_dim
    )
