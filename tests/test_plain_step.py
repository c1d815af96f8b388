"""Whole trainings with the step written out plainly here, and with ours: the same losses.

The plain step computes every token of every block, with attention, log-softmax, weight normalisation and Sinkhorn-Knopp
as they are defined.
"""

from collections.abc import Callable
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2cli.config import Config, load_config
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.data.loaders import make_train_loader
from dinov2cli.models.attention import TokenLayout
from dinov2cli.models.dino_head import DINOHead
from dinov2cli.models.layers import Block
from dinov2cli.models.stochastic_depth import KeptSequences, draw_by_block
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.train.networks import SSLNetwork
from dinov2cli.train.objective import SSLMetaArch
from dinov2cli.train.optimizer import build_optimizer, clip_gradients
from dinov2cli.train.parameter_groups import apply_schedules
from dinov2cli.train.schedules import Schedules

Losses = Callable[[SSLMetaArch, MultiCropBatch, float, torch.Generator], Tensor]


@pytest.mark.slow
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_fifty_iterations_equal_those_of_the_plain_step(drop_rate: float) -> None:
    config = load_config(
        preset="demo",
        overrides=[
            "train.batch_size_per_gpu=6",
            "train.num_workers=0",
            "student.embed_dim=64",
            "dino.head_hidden_dim=64",
            f"student.drop_path_rate={drop_rate}",
            # With nearly equal features, rounding would decide which is KoLeo's nearest neighbour.
            "student.layerscale=0.5",
        ],
    )
    batches = list(islice(make_train_loader(config, start=0, stop=50), 50))
    plain, ours = (losses_of_a_run(config, batches, step) for step in (plain_step, our_step))
    assert ours == pytest.approx(plain, rel=1e-4)
    assert abs(plain[0] - plain[-1]) > 0.01  # it has learned something on the way


def losses_of_a_run(config: Config, batches: list[MultiCropBatch], total_loss: Losses) -> list[float]:
    torch.manual_seed(0)
    objective = SSLMetaArch(config).train()
    optimizer, schedules = build_optimizer(objective.student, config), Schedules(config, 1)
    totals = []
    for batch in batches:
        values = schedules.at(batch.iteration)
        apply_schedules(optimizer.param_groups, values)
        total = total_loss(objective, batch, values["teacher_temp"], torch.Generator().manual_seed(batch.iteration))
        total.backward()
        clip_gradients(objective.student, config.optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        for teacher, student in zip(objective.teacher.parameters(), objective.student.parameters(), strict=True):
            teacher.data = values["momentum"] * teacher.data + (1 - values["momentum"]) * student.data
        totals.append(total.item())
    return totals


def our_step(objective: SSLMetaArch, batch: MultiCropBatch, temperature: float, drop: torch.Generator) -> Tensor:
    return objective(batch, {"iteration": batch.iteration, "teacher_temp": temperature}, drop).total


def plain_step(objective: SSLMetaArch, batch: MultiCropBatch, temperature: float, drop: torch.Generator) -> Tensor:
    global_crops, local_crops = batch.normalized().global_crops, batch.normalized().local_crops
    with torch.no_grad():
        _, teacher_cls, teacher_patches = plain_network(objective.teacher, [global_crops], [None], batch, drop)
        cls_targets = plain_sinkhorn(teacher_cls, temperature)
        patch_targets = plain_sinkhorn(teacher_patches, temperature)
    features, cls, patches = plain_network(
        objective.student, [global_crops, local_crops], [batch.masks, None], batch, drop
    )
    images = len(batch.samples)
    student = [F.log_softmax(scores / 0.1, -1) for scores in cls.split(images)]
    teacher = cls_targets.split(images)
    terms = 2 + 2 * (len(student) - 2)

    def cross_entropy(log_probabilities: Tensor, targets: Tensor) -> Tensor:
        return -(targets * log_probabilities).sum(-1).mean()

    # Pairs of the same crop are left out; the two other global pairs count as one term each.
    dino = cross_entropy(student[0], teacher[1]) + cross_entropy(student[1], teacher[0])
    dino = dino + sum(cross_entropy(local, target) for local in student[2:] for target in teacher)
    of_patches = -(patch_targets * F.log_softmax(patches / 0.1, -1)).sum(-1) * batch.masks_weight
    koleo = plain_koleo(features[:images]) + plain_koleo(features[images : 2 * images])
    return dino / terms + of_patches.sum() / (2 * images) + objective.config.dino.koleo_loss_weight * koleo


def plain_network(
    network: SSLNetwork,
    crops: list[Tensor],
    masks: list[Tensor | None],
    batch: MultiCropBatch,
    drop: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Class tokens, their scores, and the scores of the masked patches."""
    model: VisionTransformer = network.backbone
    tokens = [model.prepare_tokens_with_masks(images, mask) for images, mask in zip(crops, masks, strict=True)]
    layout = TokenLayout(tuple((x.shape[0], x.shape[1]) for x in tokens))
    stream = torch.cat([x.flatten(0, 1) for x in tokens])
    rates = model.drop_path_rates if model.training else [0.0] * model.depth
    for block, kept in zip(model.blocks, draw_by_block(rates, layout, drop, stream.device), strict=True):
        stream = plain_block(block, stream, layout, kept)
    stream = model.norm(stream)
    whole = list(layout.split(stream))
    cls = torch.cat([x[:, 0] for x in whole])
    patches = whole[0][:, 1 + model.num_register_tokens :].flatten(0, 1)[batch.mask_indices]
    return cls, plain_head(network.dino_head, cls), plain_head(network.dino_head, patches)


def plain_block(
    block: Block, x: Tensor, layout: TokenLayout, kept: tuple[KeptSequences, KeptSequences] | None
) -> Tensor:
    """Both branches on all tokens; what is dropped is multiplied by 0 afterwards."""
    for number, branch in enumerate((plain_attention, plain_mlp)):
        factor = torch.ones(len(x), 1)
        if kept is not None:
            factor = torch.zeros(len(x), 1).index_put((kept[number].index,), kept[number].factor)
        x = x + factor * branch(block, x, layout)
    return x


def plain_attention(block: Block, x: Tensor, layout: TokenLayout) -> Tensor:
    outputs = []
    for sequences in layout.split(block.norm1(x)):  # [count, length, D] of each length
        q, k, v = block.attn.qkv(sequences).unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
        outputs.append((weights @ v).transpose(1, 2).reshape(-1, x.shape[1]))
    return block.ls1.gamma * block.attn.proj(torch.cat(outputs))


def plain_mlp(block: Block, x: Tensor, layout: TokenLayout) -> Tensor:
    return block.ls2.gamma * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def plain_head(head: DINOHead, x: Tensor) -> Tensor:
    x = F.normalize(head.mlp(x), dim=-1)
    directions = head.last_layer.weight_v
    return x @ (head.last_layer.weight_g * directions / directions.norm(dim=1, keepdim=True)).T


def plain_sinkhorn(scores: Tensor, temperature: float) -> Tensor:
    q = torch.exp(scores.double() / temperature).T  # [prototypes, samples]
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True) * q.shape[0]
        q /= q.sum(0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).T.float()


def plain_koleo(features: Tensor) -> Tensor:
    x = F.normalize(features, dim=-1)
    nearest = (x @ x.T).fill_diagonal_(-1).argmax(1)
    return -torch.log((x - x[nearest] + 1e-8).norm(dim=-1) + 1e-8).mean()
