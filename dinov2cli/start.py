"""What a request to train does: the configuration, the checks, the trainer, and evaluations on the way."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from dinov2cli import cluster, distributed
from dinov2cli.config import Config
from dinov2cli.console import logger, set_up_logging, signals_as_exceptions, speaking
from dinov2cli.data.datasets import make_dataset
from dinov2cli.data.decoding import Reading
from dinov2cli.device import choose_device
from dinov2cli.doctor.report import preflight
from dinov2cli.errors import EnvironmentProblem
from dinov2cli.eval import knn
from dinov2cli.eval.first_look import datasets_for
from dinov2cli.eval.protocol import evaluate_teacher
from dinov2cli.files import write_text, writing
from dinov2cli.launch import slurm
from dinov2cli.launch.environment import RUN_TOKEN, is_supervised
from dinov2cli.launch.notes import mark, reported
from dinov2cli.launch.owner import owning
from dinov2cli.launch.training import completed, resolve_students
from dinov2cli.models.library_backbone import Backbone
from dinov2cli.models.load import load_backbone_into
from dinov2cli.models.load.locate import locate_together
from dinov2cli.requests.train import TrainRequest
from dinov2cli.train.allocator import grow_segments
from dinov2cli.train.display import ending
from dinov2cli.train.dry_run import rehearse
from dinov2cli.train.run_folder import RunFolder
from dinov2cli.train.students import train_students
from dinov2cli.train.trainer import OnlineKnn, Trainer
from dinov2cli.train.verdicts import collapse_of
from dinov2cli.train.watch import watched_start


def run(request: TrainRequest) -> None:
    """Train as the request says, in this process, alone or as one of those that a launcher started.

    Raises:
        Dino2Error: a wrong configuration, data or weights, and what training may end with.
    """
    request = completed(request)
    config, *others = resolve_students(request)
    train(config, request, *others)


def train(config: Config, request: TrainRequest, *others: Config) -> None:
    """Train with this configuration; of the request, `cpu`, `no_resume` and `dry_run` count.

    `others` are those of further students, which learn from the same passes of the same teacher.
    """
    mark("joining")
    if not request.cpu:
        grow_segments()
    alone = config.train.sharding in ("ddp", "fsdp")
    with distributed.process_group(alone=alone), reported(), ExitStack() as until_the_end:
        mark("joined")
        _train_in_group([config, *others], request, until_the_end)


def _train_in_group(configs: Sequence[Config], request: TrainRequest, until_the_end: ExitStack) -> None:
    folders = [RunFolder(Path(config.train.output_dir)) for config in configs]
    until_the_end.enter_context(signals_as_exceptions())
    with watched_start(folders[0], configs[0].train.hang_timeout):
        runs = _prepare(configs, request, folders, until_the_end)
    if request.dry_run:
        rehearse(runs)
        if not request.cpu and distributed.is_main():
            from dinov2cli.bench.rehearse import short_form
            from dinov2cli.train.display import print_plan

            for config in configs:
                print_plan([("on a GPU", short_form(config))], [])
    else:
        train_students(runs)
        for run in runs if distributed.is_main() else ():
            with speaking(run.folder.path.name if len(runs) > 1 else ""):
                if collapse := collapse_of(run.folder.path):
                    logger.warning("the run looked collapsed %s", collapse)
                for line in ending(run.folder, run.total):
                    logger.info(line)


def _prepare(
    configs: Sequence[Config], request: TrainRequest, folders: Sequence[RunFolder], until_the_end: ExitStack
) -> list[Trainer]:
    """The trainers, with their run folders taken until the end."""
    # Read first, so that a wrong one is found before anything is written.
    with distributed.same_error_everywhere():
        dataset = make_dataset(configs[0].train.dataset_path)
        scores = [make_online_knn(config) for config in configs]
    with distributed.same_error_everywhere():
        for folder in folders if distributed.is_main() else ():
            _take(folder, request, until_the_end)
    if not request.dry_run:
        # Every process keeps a log; the first one's is that of the run, and alone speaks of what is well.
        logs = [folder.log_of(distributed.rank()) for folder in folders]
        set_up_logging(*logs, quiet=not distributed.is_main())
    with distributed.same_error_everywhere():
        device = choose_device("cpu" if request.cpu else request.device)
    runs: list[Trainer] = []
    for config, folder, online_knn in zip(configs, folders, scores, strict=True):
        with speaking(folder.path.name if len(configs) > 1 else ""):
            preflight(config, device, dataset=dataset)
            with distributed.same_error_everywhere():
                on_teacher = teacher_tasks(config, device)
            run = Trainer(
                config,
                device,
                dataset=dataset,
                resume=not request.no_resume,
                init_backbone=_start_from_weights(config, folder),
                online_knn=online_knn,
                on_teacher=on_teacher,
                beside=runs[0] if runs else None,
            )
        runs.append(run)
    return runs


def _take(folder: RunFolder, request: TrainRequest, until_the_end: ExitStack) -> None:
    """Make the run folder and own it, in the first process."""
    folder.make()
    # What is typed holds for the first start, not for those after a crash or a requeue.
    first = not request.dry_run and (request.no_resume or request.take_over) and not is_restart(folder.path)
    if not request.dry_run:
        until_the_end.enter_context(owning(folder.path, take_over=request.take_over and first))
        folder.clear_leftovers()
    anew = request.no_resume and first
    if anew and (moved := folder.set_aside()):
        logger.info("the earlier run is now in %s", moved)


def _start_from_weights(config: Config, folder: RunFolder) -> Callable[[Backbone], None] | None:
    """What loads `student.pretrained_weights`; None without any. Collective."""
    given = config.student.pretrained_weights
    # Those of a run that goes on may be gone, and nobody loads them.
    weights = locate_together(given) if given and not folder.has_checkpoints() else given

    def load(backbone: Backbone) -> None:
        student = config.student
        report = load_backbone_into(backbone, weights, student.pretrained_channels, student.pretrained_patches)
        if distributed.is_main():
            logger.info("%s", report)

    return load if weights else None


def make_online_knn(config: Config) -> OnlineKnn | None:
    """The score that `evaluation.knn_period` asks for; the first one leaves the baselines in the run folder, too."""
    evaluation, precision = config.evaluation, config.compute_precision.precision
    if not evaluation.knn_period:
        return None
    train_images, val_images = make_dataset(evaluation.knn_train_dataset), make_dataset(evaluation.knn_val_dataset)
    bad = config.train.max_bad_fraction
    options = {"precision": precision, "max_bad_fraction": bad, "reading": Reading.of(config.images(), config)}
    baselines = RunFolder(Path(config.train.output_dir)).knn_baselines

    def score(backbone: Backbone) -> float:
        if not distributed.broadcast_object(baselines.exists()):
            found = knn.online_baselines(backbone, train_images, val_images, **options)
            if distributed.is_main():
                with writing(baselines):
                    write_text(baselines, json.dumps(found))
        return knn.online_knn(backbone, train_images, val_images, **options)

    return score


def teacher_tasks(config: Config, device: torch.device) -> Callable[[Path], object] | None:
    """What `evaluation.tasks` asks for of every teacher checkpoint. Fails at once where it has no data."""
    evaluation = config.evaluation
    if not evaluation.tasks:
        return None
    for task in evaluation.tasks:
        request = evaluation.request(task, "a teacher")
        datasets_for(config, request.train_dataset, request.val_dataset, request.labels)
    if not evaluation.tasks_as_jobs:
        return lambda checkpoint: evaluate_teacher(checkpoint, config, evaluation.tasks, device=str(device))
    cluster.need_slurm()
    for word in evaluation.slurm:
        cluster.split_parameter(word)
    return lambda checkpoint: submit_tasks(checkpoint, config, cpu=device.type == "cpu")


def submit_tasks(checkpoint: Path, config: Config, *, cpu: bool) -> None:
    """Submit the evaluations of a teacher checkpoint; a queue that does not take them does not end the training."""
    if not distributed.is_main():
        return
    wanted = slurm.Wanted(slurm.slurm_of_this_job(*config.evaluation.slurm), 1, cpu)
    folder = Path(config.train.output_dir).absolute() / "slurm"
    for task in config.evaluation.tasks:
        request = config.evaluation.request(task, str(checkpoint.absolute()), "cpu" if cpu else None)
        try:
            job = slurm.submit(request, wanted, folder=folder, name=f"dino2-{task}")
        except EnvironmentProblem as error:
            logger.error("evaluation %s of %s: %s", task, checkpoint.parent.name, error.message)
        else:
            logger.info("evaluation %s of %s is job %s", task, checkpoint.parent.name, job.job_id)


def is_restart(run: Path) -> bool:
    """Whether this process is started again by its supervisor, so that --no-resume has been obeyed; notes it if not."""
    if not is_supervised():
        return False
    token, noted = os.environ[RUN_TOKEN], run / ".started-by"
    if noted.exists() and noted.read_text() == token:
        return True
    noted.write_text(token)
    return False
