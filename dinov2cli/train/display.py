"""What a person sees of a training run: the plan before it, and its progress."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text
from torch import nn

from dinov2cli import distributed
from dinov2cli.config import Config
from dinov2cli.console import Manner, clock, counted, err, logger, shows_bars
from dinov2cli.data.collate import MultiCropBatch
from dinov2cli.data.decoding import Reading
from dinov2cli.data.loaders import Loader
from dinov2cli.data.look import look_at
from dinov2cli.models.library_backbone import Backbone, LibraryBackbone
from dinov2cli.train import frozen_teacher, gram_teacher
from dinov2cli.train.cost import step_flops
from dinov2cli.train.forewarnings import forewarnings
from dinov2cli.train.judgement import judge
from dinov2cli.train.networks import FROZEN_TEACHER, SSLNetwork
from dinov2cli.train.run_folder import RunFolder
from dinov2cli.train.verdicts import baselines_of, json_lines


def plan_rows(
    config: Config, loader: Loader[MultiCropBatch], student: SSLNetwork, iteration: int, choices: Mapping[str, str]
) -> list[tuple[str, str]]:
    """(what, value) of the data, the model, the schedule, and `choices` that were made for the machine."""
    crops, total, world = config.crops, config.iterations(), distributed.world_size()
    batch = config.effective_batch(world)
    factors = f"{config.train.batch_size_per_gpu} per process x {world} process{'es' if world > 1 else ''}"
    if config.train.gradient_accumulation > 1:
        factors += f" x {config.train.gradient_accumulation} accumulated"
    epochs = total * batch / max(len(loader.dataset), 1)
    workers = f"{loader.num_workers} loader worker{'s' if loader.num_workers != 1 else ''}"
    resumed = f", resumed after {counted(iteration, 'iteration')}" if iteration else ""
    shape = _shape_of(student.backbone, config)
    head_sizes = " + ".join(count_parameters(head) for head in student.heads())
    trained = count_parameters(student.backbone, trained=True)
    part = "" if config.student.train == "all" else f", of which {trained} are trained ({config.student.train})"
    each = [f"2 of {r.global_size} and {crops.local_crops_number} of {r.local_size}" for r in crops.resolutions()]
    shares = [f", {r.share:.0%} of iterations" if len(each) > 1 else "" for r in crops.resolutions()]
    sizes = "; ".join(f"{sides} pixels{share}" for sides, share in zip(each, shares, strict=True))
    peak = config.scaled_lr(world)
    look = look_at(loader.dataset, Reading.of(config.images(), config))
    for warning in (*look.mixtures(), *forewarnings(config, batch)):
        logger.warning("%s", warning)
    return [
        ("run", f"{Path(config.train.output_dir)}{resumed}"),
        ("data", f"{loader.dataset.describe()}; {workers}"),
        ("images", str(look)),
        ("crops", f"{sizes}, patches of {config.student.patch_size}"),
        ("student", f"{shape}: {count_parameters(student.backbone)} parameters{part}; heads {head_sizes}"),
        ("length", f"{total:,} iterations, {epochs:,.1f} passes over the data"),
        ("batch", f"{batch} images ({factors})"),
        ("learning rate", f"{peak:.3g} at its peak (base_lr {config.optim.base_lr:g} at 1024 images)"),
        *choices.items(),
    ]


def _shape_of(backbone: Backbone, config: Config) -> str:
    if isinstance(backbone, LibraryBackbone):
        return f"{config.student.arch}, {backbone.embed_dim} wide"
    arch = config.arch()
    shape = f"ViT {arch.embed_dim} wide, {arch.depth} deep, {arch.num_heads} heads, {config.student.ffn_layer}"
    if backbone.rope_embed is not None:
        changed = backbone.rope_embed.augmentation._asdict().items()
        shape += ", RoPE" + "".join(f", {name} {value:g}" for name, value in changed if value)
    if config.student.n_storage_tokens:
        shape += f", {config.student.n_storage_tokens} storage tokens"
    return shape


def teacher_rows(config: Config) -> dict[str, str]:
    """For the plan: what a distillation and Gram anchoring learn from, and what it costs; empty without them."""
    rows: dict[tuple[str, str], str] = {}
    if config.distillation.teacher:
        rows["teacher", FROZEN_TEACHER.name] = frozen_teacher.describe(config)
    if config.gram.use_loss:
        rows["Gram teacher", gram_teacher.NAME] = gram_teacher.describe(config)
    flops = step_flops(config) if rows else None
    told = {}
    for (title, name), words in rows.items():
        assert flops is not None
        of_step = f"; {flops.passes[name] / flops.step:.0%} of a step's operations" if name in flops.passes else ""
        told[title] = words + of_step
    return told


def count_parameters(module: nn.Module, trained: bool = False) -> str:
    """Such as `21.6 M` or `24 k`; those alone that are trained, if asked for."""
    number = sum(each.numel() for each in module.parameters() if each.requires_grad or not trained)
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"


def print_plan(rows: Iterable[tuple[str, str]], deviations: Iterable[str]) -> None:
    """Print what will be run, and every switch that departs from the reference; not with `--quiet`."""
    if Manner.quiet:
        return
    table = Table.grid("what", Column("value", overflow="fold"), padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(Text(name, "bold"), Text(value))
    err.print(table)
    if listed := list(deviations):
        err.print("Departures from the reference's published code:")
        departures = Table.grid("", Column(overflow="fold"), padding=(0, 1, 0, 0))
        for line in listed:
            departures.add_row("  -", Text(line))
        err.print(departures)


def ending(folder: RunFolder, total: int) -> Iterator[str]:
    """What to know when training has ended: where the weights are, the score so far, what can be done next."""
    yield f"trained for {counted(total, 'iteration')}; the weights are in {folder.teacher(total - 1)}"
    if scores := [(line["iteration"], line["knn_top1"]) for line in json_lines(folder.knn_metrics)]:
        best = max(scores, key=lambda score: score[1])
        before = f", {scores[0][1]:.1f} % untrained" if scores[0][0] == 0 else ""
        peak = f", {best[1]:.1f} % at its best after {best[0]}" if best[1] > scores[-1][1] else ""
        yield f"k-NN top-1 while training: {scores[-1][1]:.1f} % at the end{before}{peak}"
        if baselines := baselines_of(folder.path).top1:
            rows = [*baselines.items(), ("trained", scores[-1][1])]
            yield "beside what takes no training:" + "".join(f"\n  {name:<17}{top1:5.1f} %" for name, top1 in rows)
    if judgement := judge(folder.path):
        yield "\n  ".join(judgement.lines())
    yield f"next: dino2 eval knn {folder.path}; dino2 pca-image PHOTO OUT.png --model {folder.path}"


class TrainingDisplay:
    """A live line on a terminal; elsewhere a line in the log at each update of the metrics.

    Args:
        total: iterations of the run.
        done: iterations done before this process started.
        images_per_iteration: over all processes.
        quiet: show nothing (processes other than the first).
    """

    def __init__(self, total: int, done: int, images_per_iteration: int, *, quiet: bool = False) -> None:
        self.total, self.first, self.images_per_iteration, self.quiet = total, done, images_per_iteration, quiet
        self.started, self.waited = time.perf_counter(), 0.0
        self.live = shows_bars(err) and not quiet
        # At 80 columns what stands right is cut off first.
        status = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self.progress = Progress(
            TextColumn(f"[bold]{Manner.speaker or 'training'}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("left {task.fields[left]}"),
            TextColumn("{task.fields[status]}", table_column=status),
            console=err,
            disable=not self.live,
            refresh_per_second=4,
            expand=True,
        )
        self.task = self.progress.add_task("training", total=total, completed=done, status="", left="-:--:--")

    def __enter__(self) -> "TrainingDisplay":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def update(self, iteration: int, losses: dict[str, float], data_time: float, *, log: bool) -> None:
        """Show the state after `iteration` iterations; `log` writes a line where there is no terminal."""
        self.waited += data_time
        elapsed = time.perf_counter() - self.started
        rate = (iteration - self.first) / max(elapsed, 1e-9)
        of_terms: dict[str, float] = defaultdict(float)
        for name, value in losses.items():
            of_terms[name.partition("_")[0]] += value  # what is logged of a term begins with its name
        total = of_terms.pop("total")
        left = clock((self.total - iteration) / max(rate, 1e-9))
        pace = f"{rate * self.images_per_iteration:.1f} images/s  data wait {self.waited / elapsed:.0%}"
        terms = f"({'  '.join(f'{term} {value:.3f}' for term, value in of_terms.items())})"
        if self.live:
            status = f"loss {total:.4f}  {pace}  {terms}"
            self.progress.update(self.task, completed=iteration, status=status, left=left)
        elif log and not self.quiet:
            logger.info("iteration %d/%d  loss %.4f  %s  %s  left %s", iteration, self.total, total, terms, pace, left)
