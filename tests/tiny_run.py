"""A training small enough for tests: seconds, on a few generated images."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinov2cli.checkpoint import save_teacher
from dinov2cli.config import load_config
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.train.networks import build_network

TINY = [
    "student.arch=vit_tiny", "student.embed_dim=24", "student.depth=2", "student.num_heads=2", "student.patch_size=8",
    "student.drop_path_rate=0.3", "crops.global_crops_size=32", "crops.local_crops_size=16",
    "crops.local_crops_number=2", "dino.head_n_prototypes=32", "dino.head_hidden_dim=32", "dino.head_bottleneck_dim=16",
    "train.batch_size_per_gpu=8", "train.OFFICIAL_EPOCH_LENGTH=4", "train.log_period=1", "train.num_workers=0",
    "train.checkpoint_period=4", "optim.epochs=3", "optim.warmup_epochs=1", "evaluation.eval_period_iterations=4",
]  # fmt: skip
"""Overrides: 12 iterations of 8 images."""

DINOV3 = [
    "student.pos_embed_type=rope", "student.n_storage_tokens=2", "student.mask_k_bias=true",
    "student.norm_layer=layernormbf16", "student.ffn_layer=swiglu64", "student.untie_cls_and_patch_norms=true",
    "student.untie_global_and_local_cls_norm=true",
]  # fmt: skip
"""Overrides: all that DINOv3's architecture has added."""
AUGMENTED_ROPE = [f"student.pos_embed_rope_{key}_coords={value}"
                  for key, value in (("shift", 0.2), ("jitter", 1.3), ("rescale", 2.0))]  # fmt: skip


def write_images(folder: Path, classes: int = 2, per_class: int = 8, size: int = 40) -> Path:
    """A class is a colour and a texture; each image adds noise of its own."""
    rng = np.random.default_rng(0)
    for number in range(classes):
        (folder / f"class{number}").mkdir(parents=True)
        base = np.kron(rng.integers(0, 256, (5, 5, 3)), np.ones((size // 5, size // 5, 1)))
        for image in range(per_class):
            pixels = np.clip(base + rng.normal(0, 25, base.shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{number}" / f"{image}.png")
    return folder


def write_weights(folder: Path) -> Path:
    """Weights of four small blocks, and the config.yaml of their run beside them."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, layerscale=1.0)
    torch.save(model.state_dict(), folder / "weights.pth")
    size = "arch: vit_tiny, embed_dim: 24, depth: 4, num_heads: 2, patch_size: 8, layerscale: 1.0"
    crops = "global_crops_size: 32, local_crops_size: 16"
    (folder / "config.yaml").write_text(f"student: {{{size}}}\ncrops: {{{crops}}}")
    return folder / "weights.pth"


def write_teacher(folder: Path, *overrides: str, heads: bool = True) -> Path:
    """A larger network than the tiny run's, as a training leaves it, or its backbone alone."""
    torch.manual_seed(1)
    config = load_config(overrides=[*TINY, "student.embed_dim=48", "student.layerscale=1.0", *overrides])
    state = build_network(config).state_dict()
    run = folder / ("teacher" if heads else "backbone")
    kept = {name: value for name, value in state.items() if heads or name.startswith("backbone.")}
    save_teacher(run / "eval" / "training_3" / "teacher_checkpoint.pth", kept)
    config.save(run / "config.yaml")
    return run


GRAM = ["gram.use_loss=true", "gram.img_level=true", "gram.it_load_ema_teacher=3", "gram.update_frequency=4",
        "crops.gram_teacher_crops_size=48"]  # fmt: skip
"""Overrides: anchored to what the teacher was after 3, 4, 8 and 12 iterations, with larger crops."""

MIXED = ["crops.global_crops_size=[32, 48]", "crops.local_crops_size=[16, 24]",
         "crops.gram_teacher_crops_size=[48, 64]", "crops.global_local_crop_pairs_ratios=[0.6, 0.4]"]  # fmt: skip
"""Overrides, beside GRAM: iterations of two resolutions."""

TIMES = {"iter_time", "data_time"}


def metrics_of(run: Path) -> list[dict[str, float]]:
    """Lines of training_metrics.json without the times, which are never the same."""
    lines = [json.loads(line) for line in (run / "training_metrics.json").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


NO_VIT = ["student.embed_dim=null", "student.depth=null", "student.num_heads=null", "student.drop_path_rate=0.0"]
LIBRARY = {
    "resnet": ["student.arch=hf:resnet", "student.backbone_config={depths: [1, 1], hidden_sizes: [16, 24], "
               "embedding_size: 8, layer_type: basic}", *NO_VIT],
    "convnext": ["student.arch=hf:convnext", "student.backbone_config={depths: [1, 1], hidden_sizes: [16, 24], "
                 "num_stages: 2, layer_scale_init_value: 1.0}", *NO_VIT],
    "swin": ["student.arch=hf:swin", "student.backbone_config={depths: [1, 1], num_heads: [1, 2], embed_dim: 16, "
             "window_size: 2, patch_size: 4, drop_path_rate: 0.0}", *NO_VIT],
}  # fmt: skip
"""Overrides, beside a teacher: students that are small networks of transformers."""
