"""DINOv2's objective: student and teacher networks and the losses between them (DINOv2 paper, section 4).

Shape legend: B images, n_local local crops of each, N patches of a global crop, M masked patches in the batch,
D embedding dimension, K prototypes. Crops are in crop-major order: all images' first crops, then their second ones.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2cli.config import Config
from dinov2cli.data.augmentations import normalize
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.losses import DINOLoss, KoLeoLoss, SinkhornKnoppCentering, SoftmaxCentering, iBOTPatchLoss
from dinov2cli.models.dino_head import DINOHead
from dinov2cli.models.vision_transformer import VisionTransformer

N_GLOBAL = 2


class SSLLosses(NamedTuple):
    """The terms as the reference logs them, float32 scalars, and their weighted sum, which is minimised."""

    dino_local: Tensor
    dino_global: Tensor
    ibot: Tensor
    koleo: Tensor
    total: Tensor


class NetworkOutputs(NamedTuple):
    """Class tokens [crops, D], their prototype scores [crops, K], and the masked patches' scores [M, K']."""

    cls: Tensor
    cls_scores: Tensor
    patch_scores: Tensor


class TeacherTargets(NamedTuple):
    """Class tokens [2B, D] and target distributions for class tokens [2B, K] and masked patches [M, K']."""

    cls: Tensor
    cls_targets: Tensor
    patch_targets: Tensor


class SSLNetwork(nn.Module):
    """A backbone with its projection heads: what the student is, and the teacher. Keys as in teacher checkpoints."""

    def __init__(self, backbone: VisionTransformer, dino_head: DINOHead, ibot_head: DINOHead | None) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        if ibot_head is not None:
            self.ibot_head = ibot_head
        self.separate_head = ibot_head is not None

    def forward(
        self,
        crops: list[Tensor],
        masks: list[Tensor | None],
        mask_indices: Tensor,
        drop_generator: torch.Generator | None = None,
    ) -> NetworkOutputs:
        """All crops in one packed pass; see `VisionTransformer.forward_tokens` for the arguments."""
        cls, patches = self.backbone.forward_tokens(crops, masks, mask_indices, drop_generator)
        if self.separate_head:
            return NetworkOutputs(cls, self.dino_head(cls), self.ibot_head(patches))
        scores = self.dino_head(torch.cat([cls, patches])).split([cls.shape[0], patches.shape[0]])
        return NetworkOutputs(cls, *scores)


class SSLMetaArch(nn.Module):
    """Student, teacher, centers and losses.

    Args:
        config: sizes, loss weights and centering.
        attention_backend: a key of `models.attention.ATTENTION_BACKENDS`.
    """

    def __init__(self, config: Config, attention_backend: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.attention_backend = attention_backend
        self.student = build_network(config, attention_backend, drop_path_rate=config.student.drop_path_rate)
        self.teacher = build_network(config, attention_backend, drop_path_rate=0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False).eval()
        self.dino_centering = build_centering(config, config.dino.head_n_prototypes)
        ibot_prototypes = (config.ibot if config.ibot.separate_head else config.dino).head_n_prototypes
        self.ibot_centering = build_centering(config, ibot_prototypes)
        self.dino_loss = DINOLoss()
        self.ibot_patch_loss = iBOTPatchLoss()
        self.koleo_loss = KoLeoLoss()
        self.forward_student: Callable[..., NetworkOutputs] = self.student.__call__
        """Runs the student; `train.sharding` puts a wrapper here that averages gradients over processes."""
        self.last_targets: TeacherTargets | None = None
        """The teacher's view of the last batch's class tokens, which the monitors look at; without the patches."""

    def train(self, mode: bool = True) -> "SSLMetaArch":
        """As `nn.Module.train`, except that the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self, batch: MultiCropBatch, teacher_temp: float, drop_generator: torch.Generator | None = None
    ) -> SSLLosses:
        """Losses of one batch.

        Args:
            batch: crops and masks, on the model's device.
            teacher_temp: the teacher's temperature.
            drop_generator: CPU generator of the student's stochastic depth.
        """
        global_crops, local_crops = normalize(batch.global_crops), normalize(batch.local_crops)
        targets = self.teacher_targets(global_crops, batch.mask_indices, teacher_temp)
        # Those of the patches are by far the largest, and would stay in memory through the next step.
        self.last_targets = targets._replace(patch_targets=targets.patch_targets.new_empty(0))
        crops: list[Tensor] = [global_crops]
        masks: list[Tensor | None] = [batch.masks]
        if self.config.crops.local_crops_number:
            crops, masks = [global_crops, local_crops], [batch.masks, None]
        student = self.forward_student(crops, masks, batch.mask_indices, drop_generator)
        return self.losses(student, targets, batch.masks_weight)

    @torch.no_grad()
    def teacher_targets(self, global_crops: Tensor, mask_indices: Tensor, temperature: float) -> TeacherTargets:
        """What the student has to predict, from the unmasked global crops [2B, 3, H, W]."""
        teacher = self.teacher([global_crops], [None], mask_indices)
        return TeacherTargets(
            teacher.cls,
            self.dino_centering(teacher.cls_scores, temperature),
            self.ibot_centering(teacher.patch_scores, temperature),
        )

    def losses(self, student: NetworkOutputs, teacher: TeacherTargets, masks_weight: Tensor) -> SSLLosses:
        """The four terms. Each student crop is compared with the teacher's view of every *other* crop of its image."""
        config, n_local = self.config, self.config.crops.local_crops_number
        n_images = teacher.cls_targets.shape[0]  # global crops, 2B
        n_terms = N_GLOBAL * (N_GLOBAL - 1) + max(N_GLOBAL * n_local, 1)
        targets = teacher.cls_targets.unflatten(0, (N_GLOBAL, -1))
        global_scores, local_scores = student.cls_scores.split([n_images, student.cls_scores.shape[0] - n_images])

        dino_global = self.dino_loss(global_scores[None], targets.flip(0).flatten(0, 1)[None]) * N_GLOBAL / n_terms
        dino_local = torch.zeros_like(dino_global)
        if n_local:
            dino_local = self.dino_loss(local_scores.unflatten(0, (n_local, -1)), targets) / n_terms
        koleo = torch.stack([self.koleo_loss(cls) for cls in student.cls[:n_images].chunk(N_GLOBAL)]).sum()
        koleo = koleo * config.dino.koleo_loss_weight
        ibot = self.ibot_patch_loss(student.patch_scores, teacher.patch_targets, masks_weight, n_images)

        total = config.dino.loss_weight * (dino_global + dino_local) + koleo + config.ibot.loss_weight * ibot
        # The reference logs the KoLeo and iBOT terms for each global crop, that is halved.
        return SSLLosses(dino_local, dino_global, ibot / N_GLOBAL, koleo / N_GLOBAL, total)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student: t = momentum * t + (1 - momentum) * s, backbone and heads."""
        torch._foreach_lerp_(local_parts(self.teacher), local_parts(self.student), 1 - momentum)


def local_parts(module: nn.Module) -> list[Tensor]:
    """What this process holds of every parameter: all of it, or its shard."""
    return [each.to_local() if isinstance(each, DTensor) else each for each in module.parameters()]


def build_network(config: Config, attention_backend: str, drop_path_rate: float) -> SSLNetwork:
    """Backbone and heads of the configured sizes with fresh weights."""
    backbone = build_backbone(config, attention_backend, drop_path_rate)
    dino_head = build_head(config, backbone.embed_dim, separate_ibot=False)
    ibot_head = build_head(config, backbone.embed_dim, separate_ibot=True) if config.ibot.separate_head else None
    return SSLNetwork(backbone, dino_head, ibot_head)


def build_backbone(config: Config, attention_backend: str = "sdpa", drop_path_rate: float = 0.0) -> VisionTransformer:
    """The configured vision transformer with fresh weights."""
    student, arch = config.student, config.arch()
    backbone = VisionTransformer(
        img_size=config.crops.global_crops_size,
        patch_size=student.patch_size,
        embed_dim=arch.embed_dim,
        depth=arch.depth,
        num_heads=arch.num_heads,
        ffn_layer=student.ffn_layer,
        qkv_bias=student.qkv_bias,
        proj_bias=student.proj_bias,
        ffn_bias=student.ffn_bias,
        layerscale=student.layerscale or None,
        drop_path_rate=drop_path_rate,
        drop_path_uniform=student.drop_path_uniform,
        num_register_tokens=student.num_register_tokens,
        interpolate_antialias=student.interpolate_antialias,
        interpolate_offset=student.interpolate_offset,
        attention_backend=attention_backend,
    )
    backbone.activation_checkpointing = config.train.activation_checkpointing
    return backbone


def build_head(config: Config, embed_dim: int, *, separate_ibot: bool) -> DINOHead:
    """The projection head of the class tokens or, with `separate_ibot`, that of the patches."""
    sizes = config.ibot if separate_ibot else config.dino
    return DINOHead(
        embed_dim, sizes.head_n_prototypes, sizes.head_nlayers, sizes.head_hidden_dim, sizes.head_bottleneck_dim
    )


CENTERINGS: dict[str, Callable[[int], nn.Module]] = {
    "centering": SoftmaxCentering,
    "sinkhorn_knopp": lambda n_prototypes: SinkhornKnoppCentering(),
}


def build_centering(config: Config, n_prototypes: int) -> nn.Module:
    """The configured way to keep the teacher from collapsing."""
    return CENTERINGS[config.train.centering](n_prototypes)
