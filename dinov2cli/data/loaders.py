"""Batches in the background: what a training or an evaluation iterates over."""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2cli.console import counted
from dinov2cli.data import workers
from dinov2cli.data.augmentations import Crops, MultiCropAugmentation, render_crops, render_regions, shrink_for, shrunk
from dinov2cli.data.collate import CropBuffers, MultiCropBatch, collate
from dinov2cli.data.crop_parameters import CropParameters
from dinov2cli.data.datasets import ImageDataset, UnreadableImage, make_dataset
from dinov2cli.data.decoding import USUAL, Reading
from dinov2cli.data.masking import masks_of_batches
from dinov2cli.data.randomness import mask_rng, place_drawn, sample_rng
from dinov2cli.data.regions import LargeImage
from dinov2cli.data.sampler import Order
from dinov2cli.errors import DataError, Dino2Error

Batch = TypeVar("Batch")
Sample = TypeVar("Sample")

MAX_REPLACEMENTS = 100
"""So many unreadable images in a row end a run: the data are not there any more."""


def make_train_loader(
    config: Any,
    *,
    start: int,
    stop: int,
    first_sample: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    dataset: ImageDataset | None = None,
) -> "Loader[MultiCropBatch]":
    """Batches of process `rank` for micro steps `start` to `stop` - 1.

    The processes' batches of a step are consecutive samples of the run's one order, and the steps follow each other in
    it. So their content depends on the config's seed, the step, `rank` and `world_size` alone, not on the number of
    workers or on where the run was interrupted.

    Args:
        first_sample: place in the order of step `start`'s first sample; by default, what earlier steps of the same
            sizes have used up. Another one is needed after a change of the sizes.
        dataset: instead of the one that `config.train.dataset_path` names.

    Raises:
        DataError: no readable dataset.
        EnvironmentProblem: while iterating, if a worker process died.
    """
    dataset = dataset if dataset is not None else make_dataset(config.train.dataset_path)
    batches = _TrainBatches(dataset, config, rank=rank, world_size=world_size)
    if first_sample is not None:
        batches.sample_of_step_0 = first_sample - start * world_size * batches.batch_size
    return Loader(dataset, batches.batch, range(start, stop), config.train.num_workers, pin_memory)


class Loader(Generic[Batch]):
    """Iterable over `batch(number)` for all `numbers`, made by worker processes; see `make_train_loader`."""

    def __init__(
        self,
        dataset: ImageDataset,
        batch: Callable[[int], Batch],
        numbers: range,
        num_workers: int | None,
        pinned: bool,
    ) -> None:
        self.dataset = dataset
        self.num_workers = workers.choose_workers(num_workers)
        if self.num_workers:
            workers.make_folder_for_sockets()
        self._loader = DataLoader(
            _Batches(batch),
            batch_size=None,  # an item is a whole batch, so nothing depends on which worker makes it
            sampler=numbers,
            num_workers=self.num_workers,
            pin_memory=pinned,
            worker_init_fn=workers.set_up_worker,
            multiprocessing_context=workers.start_method(self.num_workers),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Generator[Batch, None, None]:
        with workers.opencv_on_one_thread(self.num_workers == 0), workers.loader_errors():
            for batch in self._loader:
                if isinstance(batch, workers.WorkerError):
                    raise batch.error
                yield batch


class _Batches(Dataset[Any]):
    """Batches by number. An error comes as an item: raised in a worker, it would lose its type."""

    def __init__(self, batch: Callable[[int], Any]) -> None:
        self.batch = batch

    def __getitem__(self, number: int) -> Any:
        try:
            return self.batch(number)
        except Dino2Error as error:
            return workers.WorkerError(error)


class _TrainBatches:
    def __init__(self, dataset: ImageDataset, config: Any, *, rank: int, world_size: int) -> None:
        self.dataset = dataset
        self.rank, self.world_size = rank, world_size
        self.seed = config.train.seed
        self.batch_size = config.train.batch_size_per_gpu
        self.sample_of_step_0 = 0
        self.order = dataset.order(self.seed)
        self.images = config.images()
        self.reading = Reading.of(self.images, config)
        resolutions = config.crops.resolutions()
        self.shares, self.accumulation = [each.share for each in resolutions], config.train.gradient_accumulation
        configs = [config.at(each) for each in resolutions]
        self.augmentations = [MultiCropAugmentation.from_config(each) for each in configs]
        self.mask_makers = [masks_of_batches(each) for each in configs]
        self.device_augment = config.data.device_augment
        self.scaled_decode = config.data.scaled_decode
        self.normalize_here = not (config.data.normalize_on_device or config.data.device_augment)

    def batch(self, step: int) -> MultiCropBatch:
        first = self.sample_of_step_0 + (step * self.world_size + self.rank) * self.batch_size
        bad: list[str] = []
        drawn = place_drawn(self.seed, step // self.accumulation, self.shares)
        augmentation = self.augmentations[drawn]
        buffers = CropBuffers(augmentation.recipes, self.batch_size, self.images.in_chans)
        samples, parameters = [], []
        for image in range(self.batch_size):
            sample = self.sample(first + image, bad, augmentation)
            buffers.put(image, sample.crops)
            samples.append(sample.dataset_index)
            parameters.append(sample.parameters)
        batch = collate(
            buffers,
            self.mask_makers[drawn](mask_rng(self.seed, step, self.rank)),
            iteration=step,
            samples=samples,
            bad=bad,
            parameters=parameters if self.device_augment else None,
            statistics=self.images.statistics,
        )
        return batch.normalized() if self.normalize_here else batch

    def sample(self, k: int, bad: list[str], augmentation: MultiCropAugmentation) -> "_Sample":
        """The run's k-th sample.

        An unreadable image is replaced by the next in the run's order, and its path is added to `bad`.
        """
        return first_readable(self.order, k, lambda index: self.crops_of(index, k, augmentation), bad)

    def crops_of(self, index: int, k: int, augmentation: MultiCropAugmentation) -> "_Sample":
        """Image `index`, with the random decisions of sample `k`."""
        encoded = self.dataset.open(index, self.reading)
        height, width = encoded.size
        parameters = augmentation.draw(height, width, sample_rng(self.seed, k))
        if isinstance(encoded, LargeImage):
            return _Sample(index, render_regions(encoded, parameters, color=not self.device_augment), parameters)
        shrink = shrink_for(parameters) if self.scaled_decode and encoded.can_shrink else 1
        image = encoded.pixels(shrink)
        if shrink > 1:
            parameters = [shrunk(p, shrink, *image.shape[:2]) for p in parameters]
        return _Sample(index, render_crops(image, parameters, color=not self.device_augment), parameters)


class _Sample(NamedTuple):
    dataset_index: int
    crops: Crops
    parameters: list[CropParameters]


def first_readable(order: Order, k: int, read: Callable[[int], Sample], bad: list[str]) -> Sample:
    """What `read` makes of the k-th image of `order`, or of the next that can be read; adds to `bad` what cannot."""
    for replacement in range(MAX_REPLACEMENTS):
        try:
            return read(order.index(k + replacement))
        except UnreadableImage as error:
            bad.append(str(error))
    raise DataError(f"{MAX_REPLACEMENTS} images in a row could not be read, the last: {bad[-1]}")


def refuse_too_many_bad(bad: int, seen: int, allowed: float, named: Iterable[str], *, drawn: bool = False) -> None:
    """Raise `DataError` where more than the share `allowed` of the images seen cannot be read.

    Args:
        named: some of them with the reason; each is named once.
        drawn: by a training, which sees an image again and again.
    """
    if bad > allowed * seen:
        last = list(dict.fromkeys(named))[:20]
        if not allowed and not drawn:
            raise DataError(f"{bad} of {counted(seen, 'image')} cannot be read: {'; '.join(last)}")
        raise DataError(
            f"{bad} of {seen} images{' drawn' if drawn else ''} are unreadable, more than "
            f"train.max_bad_fraction={allowed} allows{'; the last' if drawn else ''}: {'; '.join(last)}",
            "Repair or remove them, or raise train.max_bad_fraction; the same command then resumes."
            if drawn
            else "Repair or remove them, or give a larger --max-bad-fraction.",
        )


class EvalBatch(NamedTuple):
    """The images of a batch that can be read, B of them, and the messages of those that cannot."""

    images: Tensor  # float32 [B, C, H, W]
    targets: Tensor  # int64 [B]
    indices: Tensor  # int64 [B], in the dataset
    bad: list[str]


def make_eval_loader(
    dataset: ImageDataset,
    transform: Callable[[np.ndarray], Tensor],
    batch_size: int,
    num_workers: int | None = None,
    indices: Sequence[int] | None = None,
    *,
    reading: Reading = USUAL,
    pin_memory: bool = False,
) -> "Loader[EvalBatch]":
    """Batches in the order of `indices`, by default all images in the dataset's order; the last may be smaller."""
    order = range(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
    batches = _EvalBatches(dataset, transform, order, batch_size, reading)
    return Loader(dataset, batches.batch, range(-(-len(order) // batch_size)), num_workers, pin_memory)


class _EvalBatches(NamedTuple):
    dataset: ImageDataset
    transform: Callable[[np.ndarray], Tensor]
    order: range | np.ndarray
    batch_size: int
    reading: Reading

    def batch(self, number: int) -> EvalBatch:
        images: dict[int, Tensor] = {}
        bad = []
        for index in map(int, self.order[number * self.batch_size : (number + 1) * self.batch_size]):
            try:
                images[index] = self.transform(self.dataset.image(index, self.reading))
            except UnreadableImage as error:
                bad.append(str(error))
        stacked = torch.stack(list(images.values())) if images else torch.empty(0, 3, 1, 1)
        targets = torch.tensor([self.dataset.target(index) for index in images], dtype=torch.int64)
        return EvalBatch(stacked, targets, torch.tensor(list(images), dtype=torch.int64), bad)
