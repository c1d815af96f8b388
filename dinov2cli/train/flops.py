"""Floating-point operations of a training step, counted from the configuration."""

from itertools import pairwise
from typing import NamedTuple

from dinov2cli.config import Config
from dinov2cli.config.schema import Dino, Ibot
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.train.memory import crop_groups


class StepFlops(NamedTuple):
    """Of one batch, in FLOPs: a multiplication and an addition count as two."""

    teacher: float
    """Forward pass of backbone and heads on the global crops."""
    student: float
    """Forward pass of backbone and heads on all crops."""
    step: float
    """What the step needs: teacher + 3 x student."""
    whole: float
    """As if the last block were computed for every token, as elsewhere."""


def step_flops(config: Config, masked: int) -> StepFlops:
    """Matrix products that the losses and gradients of one batch need.

    Counted are linear layers, the two products of attention, the patch embedding and the prototypes; forward and
    backward of the student as 3 times its forward (the patch embedding, which passes no gradient on, 2 times). Not
    counted is what can be left out without changing a number: branches dropped by stochastic depth, and in the last
    block everything but keys and values for tokens that nothing uses (`StepFlops.whole` counts the latter). Nor are
    elementwise operations, softmaxes, normalisations, the optimizer and recomputation by activation checkpointing.

    Args:
        config: the run.
        masked: masked patches in the batch.
    """
    groups = list(crop_groups(config))
    rates = drop_rates(config)
    student, student_whole = _network(config, groups, masked, rates)
    teacher, teacher_whole = _network(config, groups[:1], masked, [0.0] * len(rates))
    embedding = _patch_embedding(config, groups)
    return StepFlops(
        teacher,
        student,
        teacher + 3 * student - embedding,
        teacher_whole + 3 * student_whole - embedding,
    )


def forward_flops(model: VisionTransformer, image_size: int) -> float:
    """FLOPs of the class token of one square image of `image_size` pixels, counted as in `step_flops`."""
    patches = (image_size // model.patch_size) ** 2
    length = patches + model.prefix_tokens
    of_block = model.blocks[0].named_parameters()
    mlp = sum(weight.numel() for name, weight in of_block if name.startswith("mlp.") and weight.ndim == 2)
    tokens = (model.depth - 1) * length + 1  # of the last block, the class token's output alone is used
    blocks = model.depth * _keys_values(model.embed_dim, length) + _used(model.embed_dim, mlp, length, tokens)
    return blocks + 2 * patches * model.patch_embed.proj.weight.numel()


def drop_rates(config: Config) -> list[float]:
    """Stochastic depth of every block."""
    rate, depth = config.student.drop_path_rate, config.arch().depth
    uniform = config.student.drop_path_uniform
    return [rate if uniform else rate * i / max(depth - 1, 1) for i in range(depth)]


def mlp_weights(config: Config) -> int:
    """Elements of a block's feed-forward matrices."""
    vit = config.vit()
    return (2 if vit.ffn_layer == "mlp" else 3) * vit.embed_dim * vit.hidden_dim


def _network(config: Config, groups: list[tuple[int, int]], masked: int, rates: list[float]) -> tuple[float, float]:
    """Forward FLOPs of a network on these crops: those needed, and with a whole last block."""
    dim, mlp = config.arch().embed_dim, mlp_weights(config)
    whole = needed = 0.0
    for i, rate in enumerate(rates):
        for group, (count, length) in enumerate(groups):
            kept = max(int(count * (1 - rate)), 1) if rate else count
            keys_values, every = kept * _keys_values(dim, length), kept * length
            whole += keys_values + _used(dim, mlp, length, every)
            used = (count + (masked if group == 0 else 0)) * kept / count if i == len(rates) - 1 else every
            needed += keys_values + _used(dim, mlp, length, used)
    outside = _patch_embedding(config, groups) + _heads(config, sum(count for count, _ in groups), masked)
    return needed + outside, whole + outside


def _keys_values(dim: int, length: int) -> float:
    return 4 * dim * dim * length


def _used(dim: int, mlp: int, length: int, tokens: float) -> float:
    """Of `tokens` in sequences of `length`: query, the two products of attention, projection, feed-forward."""
    return tokens * (4 * dim * dim + 4 * length * dim + 2 * mlp)


def _patch_embedding(config: Config, groups: list[tuple[int, int]]) -> float:
    special = 1 + config.student.num_register_tokens
    patches = sum(count * (length - special) for count, length in groups)
    return 2 * patches * 3 * config.student.patch_size**2 * config.arch().embed_dim


def _heads(config: Config, crops: int, masked: int) -> float:
    of_patches = config.ibot if config.ibot.separate_head else config.dino
    return _head(config, config.dino, crops) + _head(config, of_patches, masked)


def _head(config: Config, sizes: Dino | Ibot, rows: int) -> float:
    hidden = [sizes.head_hidden_dim] * (sizes.head_nlayers - 1)
    widths = [config.arch().embed_dim, *hidden, sizes.head_bottleneck_dim, sizes.head_n_prototypes]
    return 2 * rows * sum(a * b for a, b in pairwise(widths))
