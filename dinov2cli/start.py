"""What a request to train does: the configuration, the checks, the trainer, and evaluations on the way."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dinov2cli.config import Config, load_config
from dinov2cli.errors import ConfigError, EnvironmentProblem
from dinov2cli.launch.environment import RUN_TOKEN, is_supervised
from dinov2cli.launch.local import Elsewhere, launch_local, processes_here
from dinov2cli.launch.notes import mark, reported
from dinov2cli.requests.eval import EVALUATIONS
from dinov2cli.requests.launch import GPUS_PER_NODE
from dinov2cli.requests.train import TrainRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from dinov2cli.models.load import Source
    from dinov2cli.models.vision_transformer import VisionTransformer
    from dinov2cli.train.trainer import OnlineKnn


def launch(request: TrainRequest) -> Elsewhere | None:
    """Submit the training as a job, or start it in several processes, where the request or the GPUs here say so.

    Raises:
        Dino2Error: a wrong configuration, found here and not in each process; else as the launchers.
    """
    if not request.slurm.is_asked:
        if (processes := processes_here(request.gpus, cpu=request.cpu)) == 1:
            return None
        run_folder = Path(resolve_config(request).train.output_dir)
        launch_local(request, processes, None if request.dry_run else run_folder)
        return Elsewhere(None)
    from dinov2cli.launch import slurm

    # What the weights say of the model is left to the job: reading them needs torch.
    run_folder = Path(resolve_config(request, read_weights=False).train.output_dir)
    name, folder = f"dino2-{run_folder.absolute().name}", run_folder.absolute() / "slurm"
    wanted = slurm.Wanted(request.slurm, request.gpus or (1 if request.cpu else GPUS_PER_NODE), request.cpu)
    if request.dry_run:
        return Elsewhere(slurm.script(wanted, folder=folder, name=name))
    slurm.need_slurm()
    make_run_folder(run_folder)
    return Elsewhere(slurm.submit(request, wanted, folder=folder, name=name, run=run_folder))


def run(request: TrainRequest) -> None:
    """Train as the request says, in this process, alone or as one of those that a launcher started.

    Raises:
        Dino2Error: a wrong configuration, data or weights, and what training may end with.
    """
    train(resolve_config(request), request)


def resolve_config(request: TrainRequest, *, read_weights: bool = True) -> Config:
    """The configuration that a request says: its options that stand for a key are overrides of it.

    With `read_weights`, keys that nobody has set follow the weights that the student starts from.
    """
    options = {
        "train.dataset_path": request.data,
        "train.output_dir": request.output_dir,
        "student.pretrained_weights": request.init_from,
    }
    given = [*request.overrides, *(f"{key}={value}" for key, value in options.items() if value is not None)]
    config = load_config(preset=request.preset, config_file=request.config_file, overrides=given)
    if config.student.pretrained_weights and read_weights:
        follow = keys_that_follow_weights(config, None if request.no_resume else Path(config.train.output_dir))
        config = load_config(preset=request.preset, config_file=request.config_file, overrides=[*follow, *given])
    if config.train.output_dir == ".":
        raise ConfigError("no run folder given", "Add --output-dir DIR; the run can be resumed from it.")
    return config


def keys_that_follow_weights(config: Config, run_folder: Path | None) -> list[str]:
    """Overrides that make the student like the weights it starts from, for the keys that nobody has set.

    A run that is resumed in `run_folder` already says them in its `config.yaml`: the weights may be gone by then.
    """
    from dinov2cli.models.load import read_weights, spell, student_settings

    settings = settings_of_run(run_folder) if run_folder is not None else {}
    settings = settings or student_settings(read_weights(config.student.pretrained_weights).architecture)
    chosen = set(config.student.model_fields_set)
    size = {"arch", "embed_dim", "depth", "num_heads"}
    if chosen & size:  # these describe one thing together: whoever sets one has chosen
        chosen |= size
    return [f"student.{key}={spell(value)}" for key, value in settings.items() if key not in chosen]


def settings_of_run(run_folder: Path) -> dict[str, object]:
    """The student's architecture in a run that has something to resume from; empty otherwise."""
    from dinov2cli.train.run_folder import RunFolder

    folder = RunFolder(run_folder)
    if not folder.config.exists() or not any(folder.checkpoints.glob("iteration_*")):
        return {}
    return load_config(config_file=folder.config).student.model_dump(exclude={"pretrained_weights"})


def train(config: Config, request: TrainRequest) -> None:
    """Train with this configuration; of the request, `cpu`, `no_resume` and `dry_run` count."""
    from dinov2cli import distributed

    mark("joining")
    with distributed.process_group(alone=config.train.sharding in ("ddp", "fsdp")), reported():
        mark("joined")
        _train_in_group(config, request)


def _train_in_group(config: Config, request: TrainRequest) -> None:
    from dinov2cli import distributed
    from dinov2cli.console import logger, set_up_logging
    from dinov2cli.data.datasets import make_dataset
    from dinov2cli.device import choose_device
    from dinov2cli.doctor.report import preflight
    from dinov2cli.models.load.locate import Source, locate_together
    from dinov2cli.train.dry_run import rehearse
    from dinov2cli.train.run_folder import RunFolder
    from dinov2cli.train.trainer import Trainer

    folder = RunFolder(Path(config.train.output_dir))
    # Read first, so that a wrong one is found before anything is written.
    with distributed.same_error_everywhere():
        dataset, knn = make_dataset(config.train.dataset_path), online_knn(config)
    with distributed.same_error_everywhere():
        if distributed.is_main():
            make_run_folder(folder.path)
            anew = request.no_resume and not request.dry_run and not is_restart(folder.path)
            if anew and (moved := folder.set_aside()):
                logger.info("the earlier run is now in %s", moved)
    if not request.dry_run:
        # Every process keeps a log; the first one's is that of the run, and alone speaks of what is well.
        set_up_logging(folder.log_of(distributed.rank()), quiet=not distributed.is_main())
    with distributed.same_error_everywhere():
        device = choose_device("cpu" if request.cpu else "auto")
    preflight(config, device, dataset=dataset)
    with distributed.same_error_everywhere():
        on_teacher = teacher_tasks(config, device)
    weights: str | Source = config.student.pretrained_weights
    if weights and not any(folder.checkpoints.glob("iteration_*")):
        weights = locate_together(weights)  # those of a run that goes on may be gone
    trainer = Trainer(
        config,
        device,
        dataset=dataset,
        resume=not request.no_resume,
        init_backbone=partial(_start_from, weights) if weights else None,
        online_knn=knn,
        on_teacher=on_teacher,
    )
    if request.dry_run:
        rehearse(trainer)
    else:
        trainer.train()


def _start_from(weights: "str | Source", backbone: "VisionTransformer") -> None:
    from dinov2cli import distributed
    from dinov2cli.console import logger
    from dinov2cli.models.load import load_backbone_into

    message = load_backbone_into(backbone, weights)
    if distributed.is_main():
        logger.info("%s", message)


def online_knn(config: Config) -> "OnlineKnn | None":
    """The score that `evaluation.knn_period` asks for."""
    if not config.evaluation.knn_period:
        return None
    from dinov2cli.data.datasets import make_dataset
    from dinov2cli.eval import knn

    train_dataset = make_dataset(config.evaluation.knn_train_dataset)
    val_dataset = make_dataset(config.evaluation.knn_val_dataset)
    precision = config.compute_precision.precision
    return lambda backbone: knn.online_knn(backbone, train_dataset, val_dataset, precision=precision)


def teacher_tasks(config: Config, device: "torch.device") -> "Callable[[Path], object] | None":
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


def submit_tasks(checkpoint: Path, config: Config, *, cpu: bool) -> None:
    """Submit the evaluations of a teacher checkpoint; a queue that does not take them does not end the training."""
    from dinov2cli import distributed
    from dinov2cli.console import logger
    from dinov2cli.launch import slurm

    if not distributed.is_main():
        return
    wanted = slurm.Wanted(slurm.slurm_of_this_job(*config.evaluation.slurm), 1, cpu)
    for task in config.evaluation.tasks:
        request = EVALUATIONS[task](checkpoint=str(checkpoint.absolute()), device="cpu" if cpu else None)
        folder = Path(config.train.output_dir).absolute() / "slurm"
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
