"""Feature extraction: a frozen model runs over a dataset once, in its order, in one process or several.

Shapes: B images of a batch.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from dinov2cli import distributed
from dinov2cli.config.images import RGB
from dinov2cli.console import Interrupted, counting, few, logger
from dinov2cli.data.datasets import ImageDataset
from dinov2cli.data.decoding import Reading
from dinov2cli.data.loaders import EvalBatch, make_eval_loader, refuse_too_many_bad
from dinov2cli.data.transforms import RESIZE_RATIO, EvalTransform, WholeTransform, usual_size
from dinov2cli.device import Arriving, Precision, choose_device
from dinov2cli.errors import ConfigError, DataError, WeightsError
from dinov2cli.eval.features import TENSORS, FeatureCache, Features, Gathered, Recipe, part_of_this_process
from dinov2cli.train.allocator import keep_freed_memory

LAST_BLOCKS = 4  # the class tokens kept for linear probes
TOKENS_IN_CACHE = 4096


class Extractor:
    """Runs a frozen model over datasets: `extractor(dataset) -> Features`.

    Args:
        model: a vision transformer in eval mode; it is moved to `device`.
        image_size: side in pixels of the centre crop; None: `usual_size`.
        resize_ratio: the short side is resized to this times `image_size` first; 256/224 in the k-NN and linear
            protocols, 1 in that of logistic regression.
        num_workers: processes that decode images; None: from the number of cores.
        device: as in `choose_device`: None for this process's GPU where there is one, else the CPU.
        precision: that of matrix products, as `compute_precision.precision` says it.
        detailed: also keep `mean_patch` and `last_cls`.
        cache: where to look for and keep the features.
        max_bad_fraction: share of a dataset's images that may be unreadable; they are left out, and named in `notes`.
        reading: how files become pixels; None: as the model expects its images.
        whole: resize the long side to `image_size` and pad with black, in place of the centre crop.

    Raises:
        ConfigError: `image_size` does not fit the model's patches.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int | None = None,
        resize_ratio: float = RESIZE_RATIO,
        batch_size: int = 256,
        num_workers: int | None = None,
        device: torch.device | str | None = None,
        precision: str = "auto",
        detailed: bool = False,
        cache: FeatureCache | None = None,
        max_bad_fraction: float = 0.01,
        reading: Reading | None = None,
        whole: bool = False,
    ) -> None:
        self.device = choose_device(device)
        self.model = model.to(self.device)
        self.image_size = fitting_image_size(model, image_size)
        self.resize = round(self.image_size * resize_ratio)
        self.images = getattr(model, "images", RGB)
        kind, self.side = (WholeTransform, "long side ") if whole else (EvalTransform, "")
        self.transform: Callable[[np.ndarray], Tensor] = kind(self.resize, self.image_size, self.images)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.precision = Precision.resolve(precision, self.device, frozen=True)
        self.detailed = detailed
        self.cache = cache
        self.max_bad_fraction = max_bad_fraction
        self.reading = reading or Reading(self.images)
        self.notes: list[str] = []

    def with_model(self, model: nn.Module) -> Self:
        """One that does the same with another model, which has the patches and channels of this one's."""
        other = copy(self)
        vars(other).pop("weights_hash", None)
        other.model, other.notes = model.to(self.device), []
        return other

    def __call__(self, dataset: ImageDataset, description: str = "features") -> Features:
        """Features of all images of `dataset` that can be read, or of this process's part of them.

        Raises:
            DataError: the dataset has no image, or fewer than there are processes, or too many that cannot be read.
        """
        if len(dataset) < distributed.world_size():
            raise DataError(f"{dataset.describe()}: {len(dataset)} images, too few to evaluate.")
        cached = features = self.cache.load(self.recipe, dataset) if self.cache is not None else None
        if features is None:
            features = self._extract(dataset, description)
            if self.cache is not None:
                self.cache.save(self.recipe, dataset, features)
        if features.size < len(dataset):
            missing = np.setdiff1d(np.arange(len(dataset)), features.positions().numpy())
            paths = [dataset.path(int(i)) for i in missing]
            refuse_too_many_bad(len(paths), len(dataset), self.max_bad_fraction, paths)
            self.notes.append(f"{len(paths)} of {len(dataset)} images could not be read and are left out: {few(paths)}")
            if cached is not None:  # else each was named when it was met
                logger.warning(self.notes[-1])
        return features

    def _extract(self, dataset: ImageDataset, description: str) -> Features:
        if self.device.type == "cpu":
            keep_freed_memory()
        mine = part_of_this_process(len(dataset))
        gathered = Gathered() if self.cache is None else self.cache.unfinished(self.recipe, dataset)
        if gathered.done:
            logger.info("%s: %d of %d images are from an interrupted run", description, gathered.done, len(mine))
        try:
            for tensors, batch in self.stream(dataset, mine[gathered.done :], description, gathered.bad, gathered.done):
                gathered.append(tensors, batch.targets, batch.indices, batch.bad)
        except Interrupted:
            gathered.save()
            if gathered.folder is not None:
                logger.info("%d of %d images are kept: the same command goes on from there", gathered.done, len(mine))
            raise
        if gathered.done == len(gathered.bad):  # of several processes one whose few images are all damaged
            refuse_too_many_bad(gathered.done, gathered.done, 0.0, gathered.bad)
        features = gathered.features()
        if not all(tensor.isfinite().all() for tensor in features.tensors.values()):
            gathered.remove()
            raise WeightsError("The model gives features that are not finite: its weights are damaged or diverged.")
        return features

    def stream(
        self, dataset: ImageDataset, indices: Tensor, description: str, bad: Sequence[str] = (), done: int = 0
    ) -> Iterator[tuple[dict[str, Tensor], EvalBatch]]:
        """Batch by batch the features of some images, as in `Features.tensors`, in main memory, and the batch; no
        tensors where none of it could be read. After Ctrl-C, those of what has begun, and then `Interrupted`.

        Args:
            indices: int64, ascending, in the dataset.
            bad: what was said of the unreadable ones among the `done` images before these.

        Raises:
            DataError: more than the share `max_bad_fraction` of the dataset cannot be read.
        """
        named = list(bad)
        # While the GPU works on a batch, the features of the one before it arrive.
        arriving: deque[tuple[Arriving | None, EvalBatch]] = deque()

        def oldest() -> tuple[dict[str, Tensor], EvalBatch]:
            features, batch = arriving.popleft()
            # Page-locked memory is scarce: copies.
            return {name: tensor.clone() for name, tensor in features.read().items()} if features else {}, batch

        try:
            for batch in self._batches(dataset, indices, done, description):
                for message in batch.bad:
                    logger.warning("unreadable image left out: %s", message)
                named += batch.bad
                arriving.append((Arriving(self.features_of(batch.images)) if len(batch.images) else None, batch))
                while len(arriving) > 1:
                    yield oldest()
                refuse_too_many_bad(len(named), len(dataset), self.max_bad_fraction, named)
        except Interrupted:
            while arriving:
                yield oldest()
            raise
        while arriving:
            yield oldest()

    @property
    def dim(self) -> int:
        """D of the features."""
        return int(self.model.embed_dim)  # type: ignore[arg-type]

    def used(self) -> dict[str, Any]:
        """What it was made with, for reports."""
        return {"image_size": self.image_size, "resize": self.resize, "precision": str(self.precision.dtype)}

    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the model: what tells its features from those of another."""
        return weights_hash(self.model)

    def at_once(self, height: int, width: int) -> int:
        """Images of that size whose activations stay in the caches of a CPU."""
        patch = int(self.model.patch_size)  # type: ignore[arg-type]
        return max(1, TOKENS_IN_CACHE // ((height // patch) * (width // patch) + 1))

    @property
    def recipe(self) -> Recipe:
        """What the features depend on, beside the images."""
        transform = f"resize {self.side}{self.resize}, crop {self.image_size}, {self.reading}"
        return Recipe(self.weights_hash, str(self.precision.dtype), transform, TENSORS[self.detailed])

    @torch.no_grad()  # not inference mode: heads are trained on these
    def features_of(self, images: Tensor) -> dict[str, Tensor]:
        """Features of one batch of normalised images [B, C, H, W], as in `Features.tensors`, on this device."""
        images = images.to(self.device, non_blocking=True)
        at_once = self.at_once(*images.shape[-2:]) if self.device.type == "cpu" else len(images)
        with self.precision.autocast():
            parts = [self._forward(part) for part in images.split(max(1, at_once))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        model: Any = self.model
        if not self.detailed:
            return {"cls": model.class_tokens(images).float()}
        # Where it has fewer than four blocks, all of them are kept.
        layers = model.get_intermediate_layers(images, n=min(LAST_BLOCKS, model.n_blocks), return_class_token=True)
        last_cls = torch.stack([cls for _, cls in layers], dim=1).float()
        return {"cls": last_cls[:, -1], "mean_patch": layers[-1][0].float().mean(1), "last_cls": last_cls}

    def _batches(self, dataset: ImageDataset, indices: Tensor, done: int, description: str) -> Iterator[EvalBatch]:
        """Batches of these images, which follow `done` others; on a CPU small ones, so that the bar moves, and little
        is lost where it ends."""
        size = self.batch_size
        if self.device.type == "cpu":
            size = min(size, self.at_once(self.image_size, self.image_size))
        how = self.transform, size, self.num_workers
        on_gpu = self.device.type == "cuda"
        loader = make_eval_loader(dataset, *how, indices=indices.tolist(), reading=self.reading, pin_memory=on_gpu)
        with counting(description, done + len(indices), done) as advance:
            for batch in loader:
                yield batch
                advance(len(batch.images) + len(batch.bad))


def fitting_image_size(model: Any, image_size: int | None) -> int:
    """The side to evaluate at: what was asked for, else the model's own, at most 224.

    Raises:
        ConfigError: not a multiple of the patch size.
    """
    patch, size = model.config.patch_size, usual_size(model.config) if image_size is None else image_size
    if size < patch or size % patch:
        lower = max(1, size // patch) * patch
        raise ConfigError(
            f"image size {size} is not a multiple of the model's patch size {patch}; "
            f"the nearest that fit are {lower} and {lower + patch}."
        )
    return size


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over what a model computes with: its layout and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
