"""`dino2 train`: pretrain a vision transformer."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov2cli.cli.completion import complete_override, complete_preset
from dinov2cli.cli.slurm_options import (
    LAUNCH,
    Account,
    Comment,
    Constraint,
    CpusPerTask,
    Exclude,
    Mem,
    Nodes,
    Partition,
    Qos,
    Setup,
    Slurm,
    TimeoutMin,
    given_slurm_options,
    say_submitted,
    words_of,
)
from dinov2cli.errors import ConfigError, EnvironmentProblem
from dinov2cli.launch.environment import RUN_TOKEN, is_supervised, is_worker
from dinov2cli.launch.notes import mark, reported

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from dinov2cli.config import Config
    from dinov2cli.launch.slurm import SlurmOptions
    from dinov2cli.train.trainer import OnlineKnn


def train(
    context: typer.Context,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[a.b=value ...]",
            help="Changes of single keys, such as optim.epochs=10.",
            autocompletion=complete_override,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="A ready configuration; see dino2 presets list.",
            autocompletion=complete_preset,
        ),
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config-file", metavar="YAML", help="A configuration file instead of a preset.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATASET",
            help="A folder of images, or a string such as "
            "ImageNet:split=TRAIN:root=/data:extra=/data. Short for train.dataset_path.",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", metavar="DIR", help="The run folder. If it holds a run, that run is resumed."),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            min=1,
            metavar="N",
            help="GPUs to use on each machine, a process for each [all; with Slurm 8]; with --cpu, processes [1].",
        ),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Train on the CPU even if there is a GPU.")] = False,
    init_from: Annotated[
        str | None,
        typer.Option(
            "--init-from",
            metavar="WEIGHTS",
            help="Start student and teacher from these backbone weights: a "
            "run, a file, a URL or a released name. Short for student.pretrained_weights.",
        ),
    ] = None,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Start over; an earlier run's files move to previous_1/ and so on.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything, estimate time and memory; do not train. With Slurm options: print the script.",
        ),
    ] = False,
    nodes: Nodes = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    constraint: Constraint = None,
    exclude: Exclude = None,
    comment: Comment = None,
    timeout_min: TimeoutMin = None,
    cpus_per_task: CpusPerTask = None,
    mem: Mem = None,
    slurm: Slurm = None,
    setup: Setup = None,
) -> None:
    """Pretrain a vision transformer with DINOv2 on a set of images.

    Ctrl-C saves; the same command resumes, with the same losses as if it had never stopped. The run folder gets
    config.yaml, training_metrics.json, checkpoints/ and eval/training_*/teacher_checkpoint.pth.

    Several processes, on this machine or as a Slurm job, start again from the last checkpoint when one of them dies.
    `dino2 status RUN` shows how they are doing.

    Example:

        dino2 train --preset demo --output-dir runs/demo

        dino2 train --preset vits14 --data ~/photos --output-dir runs/photos optim.epochs=30

        dino2 train --preset vitb14 --data ~/photos --output-dir runs/photos --gpus 4

        dino2 train --preset vitl14 --output-dir runs/vitl14 --nodes 12 --gpus 8 --partition gpu --timeout-min 1440
    """  # fmt: skip
    from dinov2cli.console import set_up_logging

    set_up_logging()
    arguments = (overrides or [], preset, config_file, data, output_dir, init_from)
    if not is_worker():
        options = given_slurm_options(context, gpus=gpus, cpu=cpu)
        if options is not None:
            # What the weights say of the model is left to the job: reading them needs torch.
            submit(context, resolve_config(*arguments, read_weights=False), options, dry_run=dry_run)
            return
    config = resolve_config(*arguments, resume=not no_resume)
    if not is_worker():
        from dinov2cli.launch.local import launch_local, processes_here

        if (processes := processes_here(gpus, cpu=cpu)) > 1:
            run_folder = None if dry_run else Path(config.train.output_dir)
            launch_local(words_of(context, without={*LAUNCH, "gpus"}), processes, run_folder)
            return
    run(config, cpu=cpu, resume=not no_resume, dry_run=dry_run)


def submit(context: typer.Context, config: "Config", options: "SlurmOptions", *, dry_run: bool) -> None:
    """Hand the command to Slurm; with `dry_run`, print the script instead."""
    from dinov2cli.launch import slurm

    run_folder = Path(config.train.output_dir)
    name, folder = f"dino2-{run_folder.absolute().name}", run_folder.absolute() / "slurm"
    words = words_of(context, without={*LAUNCH, "gpus", "dry_run"})
    if dry_run:
        print(slurm.script(words, options, folder=folder, name=name))
        return
    slurm.need_slurm()
    make_run_folder(run_folder)
    say_submitted(slurm.submit(words, options, folder=folder, name=name, run=run_folder), run_folder)


def resolve_config(
    overrides: list[str],
    preset: str | None,
    config_file: Path | None,
    data: str | None,
    output_dir: Path | None,
    init_from: str | None,
    *,
    read_weights: bool = True,
    resume: bool = True,
) -> "Config":
    """The configuration that the options say: options that stand for a key are overrides of it.

    With `read_weights`, keys that nobody has set follow the weights that the student starts from.
    """
    from dinov2cli.config import load_config

    if preset and config_file:
        raise ConfigError("--preset and --config-file are both given; choose one and change single keys with a.b=value")
    options = {
        "train.dataset_path": data,
        "train.output_dir": str(output_dir) if output_dir else None,
        "student.pretrained_weights": init_from,
    }
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    config = load_config(preset=preset, config_file=config_file, overrides=[*overrides, *given])
    if config.student.pretrained_weights and read_weights:
        follow = keys_that_follow_weights(config, Path(config.train.output_dir) if resume else None)
        config = load_config(preset=preset, config_file=config_file, overrides=[*follow, *overrides, *given])
    if config.train.output_dir == ".":
        raise ConfigError("no run folder given", "Add --output-dir DIR; the run can be resumed from it.")
    return config


def keys_that_follow_weights(config: "Config", run_folder: Path | None) -> list[str]:
    """Overrides that make the student like the weights it starts from, for the keys that nobody has set.

    A run that is resumed in `run_folder` already says them in its `config.yaml`: the weights may be gone by then.
    """
    from dinov2cli.models.weights import read_weights, spell, student_settings

    settings = settings_of_run(run_folder) if run_folder is not None else {}
    settings = settings or student_settings(read_weights(config.student.pretrained_weights).architecture)
    chosen = set(config.student.model_fields_set)
    size = {"arch", "embed_dim", "depth", "num_heads"}
    if chosen & size:  # these describe one thing together: whoever sets one has chosen
        chosen |= size
    return [f"student.{key}={spell(value)}" for key, value in settings.items() if key not in chosen]


def settings_of_run(run_folder: Path) -> dict[str, object]:
    """The student's architecture in a run that has something to resume from; empty otherwise."""
    from dinov2cli.config import load_config
    from dinov2cli.train.run_folder import RunFolder

    folder = RunFolder(run_folder)
    if not folder.config.exists() or not any(folder.checkpoints.glob("iteration_*")):
        return {}
    settings = load_config(config_file=folder.config).student.model_dump()
    return {key: value for key, value in settings.items() if key != "pretrained_weights"}


def run(config: "Config", *, cpu: bool, resume: bool, dry_run: bool) -> None:
    """Train in this process, alone or as one of those that a launcher started."""
    from dinov2cli import distributed

    mark("joining")
    with distributed.process_group(alone=config.train.sharding in ("ddp", "fsdp")), reported():
        mark("joined")
        _run_in_group(config, cpu=cpu, resume=resume, dry_run=dry_run)


def _run_in_group(config: "Config", *, cpu: bool, resume: bool, dry_run: bool) -> None:
    from dinov2cli import distributed
    from dinov2cli.console import logger, set_up_logging
    from dinov2cli.data.datasets import make_dataset
    from dinov2cli.device import choose_device
    from dinov2cli.doctor.report import preflight
    from dinov2cli.models.vision_transformer import VisionTransformer
    from dinov2cli.train.rehearsal import rehearse
    from dinov2cli.train.run_folder import RunFolder
    from dinov2cli.train.trainer import Trainer

    folder = RunFolder(Path(config.train.output_dir))
    # Read first, so that a wrong one is found before anything is written.
    with distributed.same_error_everywhere():
        dataset, knn = make_dataset(config.train.dataset_path), online_knn(config)

    def init_backbone(backbone: VisionTransformer) -> None:
        from dinov2cli.models.weights import load_backbone_into

        message = load_backbone_into(backbone, config.student.pretrained_weights)
        if distributed.is_main():
            logger.info("%s", message)

    with distributed.same_error_everywhere():
        if distributed.is_main():
            make_run_folder(folder.path)
            if not resume and not dry_run and not is_restart(folder.path) and (moved := folder.set_aside()):
                logger.info("the earlier run is now in %s", moved)
    if not dry_run:
        # Every process keeps a log; the first one's is that of the run, and alone speaks of what is well.
        set_up_logging(folder.log_of(distributed.rank()), quiet=not distributed.is_main())
    with distributed.same_error_everywhere():
        device = choose_device("cpu" if cpu else "auto")
    preflight(config, device, dataset=dataset)
    with distributed.same_error_everywhere():
        on_teacher = teacher_tasks(config, device)
    trainer = Trainer(
        config,
        device,
        dataset=dataset,
        resume=resume,
        init_backbone=init_backbone if config.student.pretrained_weights else None,
        online_knn=knn,
        on_teacher=on_teacher,
    )
    if dry_run:
        rehearse(trainer)
    else:
        trainer.train()


def online_knn(config: "Config") -> "OnlineKnn | None":
    """The score that `evaluation.knn_period` asks for."""
    if not config.evaluation.knn_period:
        return None
    from dinov2cli.data.datasets import make_dataset
    from dinov2cli.eval import knn

    train_dataset = make_dataset(config.evaluation.knn_train_dataset)
    val_dataset = make_dataset(config.evaluation.knn_val_dataset)
    precision = config.compute_precision.precision
    return lambda backbone: knn.online_knn(backbone, train_dataset, val_dataset, precision=precision)


def teacher_tasks(config: "Config", device: "torch.device") -> "Callable[[Path], object] | None":
    """What `evaluation.tasks` asks for of every teacher checkpoint. Fails at once where it has no data."""
    if not config.evaluation.tasks:
        return None
    from dinov2cli.eval.protocol import evaluate_teacher
    from dinov2cli.eval.subject import datasets_for

    datasets_for(config, None, None)
    if config.evaluation.tasks_as_jobs:
        from dinov2cli.launch.slurm import need_slurm, split_parameter

        need_slurm()
        for word in config.evaluation.slurm:
            split_parameter(word)
        return lambda checkpoint: submit_tasks(checkpoint, config, cpu=device.type == "cpu")
    return lambda checkpoint: evaluate_teacher(checkpoint, config, config.evaluation.tasks, device=str(device))


def submit_tasks(checkpoint: Path, config: "Config", *, cpu: bool) -> None:
    """Submit the evaluations of a teacher checkpoint; a queue that does not take them does not end the training."""
    from dinov2cli import distributed
    from dinov2cli.console import logger
    from dinov2cli.launch import slurm

    if not distributed.is_main():
        return
    options = slurm.options_of_this_job(nodes=1, gpus=1, cpu=cpu).with_parameters(config.evaluation.slurm)
    for task in config.evaluation.tasks:
        words = ["eval", task, str(checkpoint.absolute()), *(["--device", "cpu"] if cpu else [])]
        folder = Path(config.train.output_dir).absolute() / "slurm"
        try:
            job = slurm.submit(words, options, folder=folder, name=f"dino2-{task}")
        except EnvironmentProblem as error:
            logger.error("evaluation %s of %s: %s", task, checkpoint.parent.name, error.message)
        else:
            logger.info("evaluation %s of %s is job %s", task, checkpoint.parent.name, job.job_id)


def is_restart(run: Path) -> bool:
    """Whether this process is started again by its supervisor, so that --no-resume has been obeyed; notes it if not."""
    if not is_supervised():
        return False
    token, mark = os.environ[RUN_TOKEN], run / ".started-by"
    if mark.exists() and mark.read_text() == token:
        return True
    mark.write_text(token)
    return False


def make_run_folder(path: Path) -> None:
    """Create the run folder, or say why that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".dino2-write-test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--output-dir {path}: cannot be written to ({error.strerror})") from error
