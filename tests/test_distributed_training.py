"""Training on several processes: the same numbers as on one, in any way of sharing, and on changing numbers of them."""

import os
import shutil
import signal
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_in_processes
from tiny_run import AUGMENTED_ROPE, DINOV3, GRAM, LIBRARY, TINY, metrics_of, write_images, write_teacher
from torch.distributed.tensor import DTensor

from dinov2cli import distributed
from dinov2cli.config import Config, load_config
from dinov2cli.console import Interrupted
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.data.loaders import make_train_loader
from dinov2cli.device import Precision
from dinov2cli.errors import DataError
from dinov2cli.train.step import random_numbers_of
from dinov2cli.train.trainer import Trainer

CPU = torch.device("cpu")
# What is per process by definition is switched off or given: stochastic depth, KoLeo, and masks (see `WholeBatches`).
COMPARABLE = ["student.drop_path_rate=0", "dino.koleo_loss_weight=0"]
VARIANTS = {
    "centering": [],
    "sinkhorn_knopp": ["train.centering=sinkhorn_knopp", "ibot.separate_head=true", "ibot.head_n_prototypes=24",
                       "ibot.head_hidden_dim=32", "ibot.head_bottleneck_dim=16", *DINOV3],
    "adapters": ["student.train=lora:2", "student.pretrained_weights=some"],
}  # fmt: skip
DISTILLED = [
    pytest.param("", id="plain"),
    *(pytest.param(name, marks=pytest.mark.long) for name in ("own", "fresh", "gram")),
]
"""A run without another teacher, with a frozen one that has heads, or for which heads are trained, with a Gram one."""
COMPARED = ("total_loss", "dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss", "grad_norm_backbone")
WHOLE = 8
"""Images of an iteration, however many processes share them."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


def distilling(kind: str, folder: Path, *overrides: str) -> list[str]:
    """Overrides that give the run the teacher of this kind."""
    if kind == "gram":
        return GRAM
    return [f"distillation.teacher={write_teacher(folder, *overrides, heads=kind == 'own')}"] if kind else []


def configure(images: Path, run: Path, *overrides: str) -> Config:
    paths = [f"train.dataset_path={images}", f"train.output_dir={run}"]
    return load_config(overrides=[*TINY, *COMPARABLE, *paths, *overrides])


class WholeBatches:
    """The batches that one process would have, of which every process takes its part, with its part of the masks."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.dataset, self.num_workers = trainer.dataset, 0
        self.seen: list[list[int]] = []

    def __iter__(self) -> Iterator[MultiCropBatch]:
        trainer, world, rank = self.trainer, self.trainer.world_size, distributed.rank()
        alone = trainer.config.model_copy(
            update={"train": trainer.config.train.model_copy(update={"batch_size_per_gpu": WHOLE})}
        )
        for batch in make_train_loader(
            alone, start=trainer.iteration, stop=trainer.total, first_sample=trainer.record.samples_seen
        ):
            for part in range(trainer.accumulation):
                cut = part_of(batch, part * world + rank, world * trainer.accumulation)
                self.seen.append(cut.samples.tolist())
                yield cut


def part_of(batch: MultiCropBatch, part: int, parts: int) -> MultiCropBatch:
    def cut(views: torch.Tensor) -> torch.Tensor:
        return views.unflatten(0, (-1, parts, WHOLE // parts))[:, part].flatten(0, 1)

    masks = cut(batch.masks)
    masked = masks.sum(1, keepdim=True).clamp(min=1)
    return MultiCropBatch(
        cut(batch.global_crops), cut(batch.local_crops), masks, masks.flatten().nonzero().flatten(),
        (1 / masked.float()).expand_as(masks)[masks], batch.iteration, cut(batch.samples),
        gram_teacher_crops=None if batch.gram_teacher_crops is None else cut(batch.gram_teacher_crops),
    )  # fmt: skip


def train_on_parts(config: Config, stop_after: int | None = None) -> dict[str, Any]:
    """A session of a run, which a signal to its last process ends; what it started from, saw and ended with."""
    trainer = Trainer(config, CPU)
    batches = WholeBatches(trainer)
    trainer.make_loader = lambda: batches  # type: ignore[method-assign, return-value, assignment]
    if stop_after is not None and distributed.rank() == trainer.world_size - 1:
        step = trainer.train_step

        def interrupting(batches: Any) -> Any:
            if trainer.iteration + 1 == stop_after:
                os.kill(os.getpid(), signal.SIGUSR2)
            return step(batches)

        trainer.train_step = interrupting  # type: ignore[method-assign]
    start = state_of(trainer)
    try:
        trainer.train()
        assert stop_after is None
    except Interrupted as stop:
        assert stop_after is not None and stop.signal == signal.SIGUSR2
    used = batches.seen[: (trainer.iteration - start["iteration"]) * trainer.accumulation]
    return {"start": start, "end": state_of(trainer), "samples": used, "batch": trainer.config.effective_batch(1)}


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Whole tensors of everything that is saved, by name."""
    flat: dict[str, Any] = {"iteration": trainer.iteration}
    state = trainer.state()
    for name, value in state["model"].items():
        flat[f"model.{name}"] = whole(value)
    for name, moments in state["optimizer"].items():
        flat.update({f"optimizer.{name}.{key}": whole(value) for key, value in moments.items()})
    flat["counters"] = whole(state["counters"])
    return flat


def whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), name


def assert_losses_agree(run: Path, other: Path) -> None:
    """Within 1e-5 relative at every iteration."""
    lines, others = metrics_of(run), metrics_of(other)
    assert [line["iteration"] for line in lines] == [line["iteration"] for line in others] == list(range(12))
    for line, there in zip(lines, others, strict=True):
        for name in COMPARED:
            assert line[name] == pytest.approx(there[name], rel=1e-5), (line["iteration"], name)


def all_ways(images: str, folder: str, variant: list[str]) -> None:
    for mode in ("ddp", "fsdp"):
        extra = ["train.batch_size_per_gpu=4", f"train.sharding={mode}", *variant]
        train_on_parts(configure(Path(images), Path(folder) / mode, *extra))


@pytest.mark.parametrize("kind", DISTILLED)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_halves_equal_the_whole(images: Path, tmp_path: Path, variant: str, kind: str) -> None:
    words = [*VARIANTS[variant], *distilling(kind, tmp_path, *VARIANTS[variant])]
    train_on_parts(configure(images, tmp_path / "one", *words))
    run_in_processes(2, all_ways, str(images), str(tmp_path), words)
    for mode in ("ddp", "fsdp"):
        assert_losses_agree(tmp_path / "one", tmp_path / mode)
        one, other = (
            torch.load(tmp_path / name / "eval/training_11/teacher_checkpoint.pth", weights_only=True)["teacher"]
            for name in ("one", mode)
        )
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def ends_of(images: str, folder: str, words: list[str]) -> list[dict[str, Any]]:
    """The state that a run by DDP, and one by FSDP, ends with."""
    halves = ["train.batch_size_per_gpu=4", *words]
    return [
        train_on_parts(configure(Path(images), Path(folder) / mode, f"train.sharding={mode}", *halves))["end"]
        for mode in ("ddp", "fsdp")
    ]


@pytest.mark.long
@pytest.mark.parametrize("kind", LIBRARY)
def test_a_student_of_another_library_is_shared(images: Path, tmp_path: Path, kind: str) -> None:
    """All processes end with the same weights and running averages, by DDP and FSDP; without BatchNorm, with those of
    one process that has the whole batch."""
    words = [*LIBRARY[kind], *distilling("own", tmp_path)]
    train_on_parts(configure(images, tmp_path / "one", *words))
    one, other = run_in_processes(2, ends_of, str(images), str(tmp_path), words)
    for mine, of_other, mode in zip(one, other, ("ddp", "fsdp"), strict=True):
        assert_same(mine, of_other)
        if kind != "resnet":
            assert_losses_agree(tmp_path / "one", tmp_path / mode)
    for name, value in one[0].items():  # the two ways are the same, but for rounding
        torch.testing.assert_close(value, one[1][name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def two_sessions(images: str, run: str, words: list[str]) -> list[dict[str, Any]]:
    """DDP to iteration 5, then FSDP to iteration 8, both with the batch size that one process was given."""
    return [
        train_on_parts(configure(Path(images), Path(run), f"train.sharding={mode}", *words), stop_after=until)
        for mode, until in (("ddp", 5), ("fsdp", 8))
    ]


@pytest.mark.parametrize("kind", DISTILLED)
def test_a_run_moves_between_one_and_two_processes(images: Path, tmp_path: Path, kind: str) -> None:
    """1 -> 2 (DDP) -> 2 (FSDP) -> 1: each starts from the state that the last ended with, and sees its samples."""
    words = distilling(kind, tmp_path)
    whole_run = train_on_parts(configure(images, tmp_path / "whole", *words))
    first = train_on_parts(configure(images, tmp_path / "moved", *words), stop_after=2)
    (second, third), others = run_in_processes(2, two_sessions, str(images), str(tmp_path / "moved"), words)
    last = train_on_parts(configure(images, tmp_path / "moved", *words))
    sessions = [first, second, third, last]
    assert [session["end"]["iteration"] for session in sessions] == [2, 5, 8, 12]
    for earlier, later in pairwise(sessions):
        assert_same(earlier["end"], later["start"])
    for mine, of_other in zip((second, third), others, strict=True):
        assert_same(mine["end"], of_other["end"])  # whole tensors, so the same in both processes
    # Half the images in each process, so that an iteration still has as many: said on resuming.
    assert [session["batch"] for session in sessions] == [8, 4, 4, 8]
    seen = [*first["samples"]]
    for mine, of_other in zip((second, third), others, strict=True):
        seen += [one + other for one, other in zip(mine["samples"], of_other["samples"], strict=True)]
    assert seen + last["samples"] == whole_run["samples"]
    assert_losses_agree(tmp_path / "whole", tmp_path / "moved")


@pytest.mark.parametrize("kind", DISTILLED)
def test_fewer_processes_accumulate(images: Path, tmp_path: Path, kind: str) -> None:
    """A run of two processes goes on in one: two batches of half the size make an iteration."""
    halves = ["train.batch_size_per_gpu=4", *distilling(kind, tmp_path)]
    whole_run = run_in_processes(2, session_of_two, str(images), str(tmp_path / "whole"), None, halves)
    moved = run_in_processes(2, session_of_two, str(images), str(tmp_path / "moved"), 6, halves)
    alone = train_on_parts(configure(images, tmp_path / "moved", *halves))
    assert alone["batch"] == 8 and alone["start"]["iteration"] == 6
    assert_same(moved[0]["end"], alone["start"])
    rest = [samples for pair in zip(whole_run[0]["samples"][6:], whole_run[1]["samples"][6:], strict=True)
            for samples in pair]  # fmt: skip
    assert alone["samples"] == rest


def session_of_two(images: str, run: str, stop_after: int | None, words: list[str]) -> dict[str, Any]:
    return train_on_parts(configure(Path(images), Path(run), *words), stop_after=stop_after)


def koleo_and_masks(images: str, run: str) -> tuple[float, list[int], list[float]]:
    """This process's own KoLeo of the first batch and its masked patches; the KoLeo that is logged."""
    config = configure(Path(images), Path(run), "dino.koleo_loss_weight=0.1", "student.drop_path_rate=0.3",
                       "train.batch_size_per_gpu=4")  # fmt: skip
    trainer = Trainer(config, CPU)
    batch = next(iter(trainer.make_loader()))
    values = {"iteration": 0, "teacher_temp": 0.04}
    own = trainer.objective(batch, values, random_numbers_of(trainer.config, 0)).logged["koleo_loss"].item()
    draws = torch.rand(3, generator=random_numbers_of(trainer.config, 0)).tolist()
    reported = trainer.train_step([batch]).losses.logged["koleo_loss"].item()
    assert reported == pytest.approx(distributed.all_reduce_mean(torch.tensor(own)).item(), rel=1e-5)
    return own, batch.mask_indices.tolist(), draws


def test_koleo_masks_and_stochastic_depth_are_each_process_own(images: Path, tmp_path: Path) -> None:
    (koleo, masks, draws), (other_koleo, other_masks, other_draws) = run_in_processes(
        2, koleo_and_masks, str(images), str(tmp_path / "run")
    )
    assert koleo != other_koleo and masks != other_masks and draws != other_draws


def fail_in_one(images: str, run: str) -> tuple[list[str], bool]:
    """Errors that only process 1 runs into; whether weights stay finite after a loss of its own that is not."""
    said = []
    trainer = Trainer(configure(Path(images), Path(run) / "broken", "train.batch_size_per_gpu=4"), CPU)
    if distributed.rank() == 1:
        trainer.make_loader = lambda: Broken(trainer)  # type: ignore[method-assign, return-value, assignment]
    try:
        trainer.train()
    except DataError as error:
        said.append(str(error))
    finite = True
    for mode in ("ddp", "fsdp"):
        config = configure(Path(images), Path(run) / mode, "train.batch_size_per_gpu=4", f"train.sharding={mode}")
        trainer = Trainer(config, CPU)
        batch = next(iter(trainer.make_loader()))
        before = state_of(trainer)
        if distributed.rank() == 1:
            batch = batch.normalized()
            batch.global_crops[0] = float("nan")
        result = trainer.train_step([batch])
        assert not result.losses.total.isfinite()
        after = state_of(trainer)
        finite &= all(torch.equal(before[name], after[name]) for name in before if name.startswith("model.student"))
    return said, finite


class Broken:
    """A loader whose second batch cannot be read."""

    def __init__(self, trainer: Trainer) -> None:
        self.dataset, self.num_workers = trainer.dataset, 0
        self.loader = make_train_loader(trainer.config, start=0, stop=12, rank=1, world_size=2)

    def __iter__(self) -> Iterator[MultiCropBatch]:
        yield next(iter(self.loader))
        raise DataError("the disk of node 2 is gone")


def test_what_befalls_one_process_ends_both(images: Path, tmp_path: Path) -> None:
    (said, unchanged), (said_there, unchanged_there) = run_in_processes(
        2, fail_in_one, str(images), str(tmp_path / "run")
    )
    assert said == said_there == ["the disk of node 2 is gone"]
    assert unchanged and unchanged_there


def losses_in_bfloat16(images: str, run: str, words: list[str]) -> dict[str, list[float]]:
    """Three iterations of each way of sharing, with matrix products in bfloat16 as on a GPU."""
    found = {}
    Precision.resolve = classmethod(  # type: ignore[method-assign, assignment]
        lambda cls, asked, device, **_: cls(device, torch.bfloat16, False, "for this test")
    )
    for mode in ("ddp", "fsdp"):
        config = configure(Path(images), Path(run) / mode, "train.batch_size_per_gpu=4", f"train.sharding={mode}",
                           "ibot.separate_head=true", "ibot.head_n_prototypes=24",
                           "optim.warmup_epochs=0", *words)  # fmt: skip
        trainer = Trainer(config, CPU)
        batches = iter(trainer.make_loader())
        found[mode] = [trainer.train_step([next(batches)]).losses.total.item() for _ in range(3)]
        backbone = trainer.sharding.teacher_backbone()
        assert not any(isinstance(value, DTensor) for value in backbone.parameters())
        found[f"{mode} features"] = backbone(torch.ones(1, 3, 32, 32)).flatten().tolist()
    return found


@pytest.mark.parametrize(
    "words",
    [
        [*DINOV3, *AUGMENTED_ROPE, "train.activation_checkpointing=selective"],
        *(
            pytest.param([*VARIANTS["adapters"], f"train.activation_checkpointing={how}"], marks=pytest.mark.long)
            for how in ("selective", "true")
        ),
    ],
)
def test_half_precision_and_checkpointed_activations_combine_with_both(
    images: Path, tmp_path: Path, words: list[str]
) -> None:
    found, other = run_in_processes(2, losses_in_bfloat16, str(images), str(tmp_path), words)
    assert found == other  # each the mean over both
    assert found["ddp"] == pytest.approx(found["fsdp"], rel=2e-2)
    assert found["ddp"][0] != found["ddp"][1]
    torch.testing.assert_close(
        torch.tensor(found["ddp features"]), torch.tensor(found["fsdp features"]), rtol=0.05, atol=0.05
    )


def steps_in_bfloat16(images: str, run: str, modes: list[str], overrides: list[str]) -> dict[str, torch.Tensor]:
    """Losses, then gradient norms, of ten iterations [10, numbers], by the way of sharing; products in bfloat16."""
    Precision.resolve = classmethod(  # type: ignore[method-assign, assignment]
        lambda cls, asked, device, **_: cls(device, torch.bfloat16, False, "for this test")
    )
    found = {}
    for mode in modes:
        config = configure(Path(images), Path(run) / mode, f"train.sharding={mode}", "optim.warmup_epochs=0",
                           f"train.batch_size_per_gpu={WHOLE // distributed.world_size()}", *overrides)  # fmt: skip
        trainer = Trainer(config, CPU)
        rows = []
        for batch in islice(WholeBatches(trainer), 10):
            losses, norms = trainer.record.take(trainer.train_step([batch])).numbers()
            rows.append([*losses.values(), *norms.values()])
            trainer.iteration += 1
        found[mode] = torch.tensor(rows)
    return found


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_ten_steps_in_bfloat16_are_the_same_however_they_are_shared(
    images: Path, tmp_path: Path, drop_path: float
) -> None:
    """FSDP gathers parameters and sums the blocks' gradients in bfloat16, DDP in float32: a few percent between them.

    KoLeo and stochastic depth are per process by definition, so that one process is compared without them.
    """
    arguments = [f"student.drop_path_rate={drop_path}", "dino.koleo_loss_weight=0.1"]
    shared, _ = run_in_processes(2, steps_in_bfloat16, str(images), str(tmp_path), ["ddp", "fsdp"], arguments)
    torch.testing.assert_close(shared["fsdp"], shared["ddp"], rtol=0.08, atol=0.01)
    if not drop_path:
        (alone,) = run_in_processes(1, steps_in_bfloat16, str(images), str(tmp_path / "1"), ["ddp"], COMPARABLE)
        two, _ = run_in_processes(2, steps_in_bfloat16, str(images), str(tmp_path / "2"), ["ddp", "fsdp"], COMPARABLE)
        for mode in ("ddp", "fsdp"):
            torch.testing.assert_close(two[mode], alone["ddp"], rtol=0.05, atol=0.01)


def losses_when_compiled(images: str, run: str) -> dict[str, list[float]]:
    found = {}
    for name, mode, compiled in (("plain", "ddp", False), ("ddp", "ddp", True), ("fsdp", "fsdp", True)):
        config = configure(
            Path(images), Path(run) / name, "train.batch_size_per_gpu=4", f"train.sharding={mode}",
            f"train.compile={str(compiled).lower()}", "train.activation_checkpointing=selective",
            "optim.warmup_epochs=0", "student.depth=3",
        )  # fmt: skip
        trainer = Trainer(config, CPU)
        batches = iter(trainer.make_loader())
        found[name] = [trainer.train_step([next(batches)]).losses.total.item() for _ in range(3)]
    return found


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles for the CPU with g++")
def test_compiled_blocks_combine_with_both(images: Path, tmp_path: Path) -> None:
    found, _ = run_in_processes(2, losses_when_compiled, str(images), str(tmp_path))
    assert found["ddp"] == pytest.approx(found["plain"], rel=1e-4)
    assert found["fsdp"] == pytest.approx(found["plain"], rel=1e-4)
