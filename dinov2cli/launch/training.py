"""A training in other processes, of this machine or of a Slurm job, and the configuration that its request means."""

from functools import partial
from pathlib import Path

from dinov2cli.config import Config, load_config
from dinov2cli.errors import ConfigError
from dinov2cli.launch import slurm
from dinov2cli.launch.local import Elsewhere, launch_local, processes_here
from dinov2cli.requests.launch import GPUS_PER_NODE
from dinov2cli.requests.train import TrainRequest
from dinov2cli.train.run_folder import RunFolder


def launch(request: TrainRequest) -> Elsewhere | None:
    """Submit the training as a job, or start it in several processes, where the request or the GPUs here say so.

    Raises:
        Dino2Error: a wrong configuration, found here and not in each process; else as the launchers.
    """
    # Before torch is imported. What the weights say of the model is left to the job: reading them needs it.
    run = Path(resolve_config(request, read_weights=False).train.output_dir)
    if not request.slurm.is_asked:
        if (processes := processes_here(request.gpus, cpu=request.cpu)) == 1:
            return None
        resolve_config(request)
        launch_local(request, processes, None if request.dry_run else run)
        return Elsewhere(None)
    name, folder = f"dino2-{run.absolute().name}", run.absolute() / "slurm"
    wanted = slurm.Wanted(request.slurm, request.gpus or (1 if request.cpu else GPUS_PER_NODE), request.cpu)
    if request.dry_run:
        return Elsewhere(slurm.script(wanted, folder=folder, name=name))
    slurm.need_slurm()
    RunFolder(run).make()
    return Elsewhere(slurm.submit(request, wanted, folder=folder, name=name, run=run))


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
    load = partial(load_config, preset=request.preset, config_file=request.config_file)
    config = load(overrides=given)
    if config.student.pretrained_weights and read_weights:
        config = load(overrides=[*keys_that_follow_weights(config, resume=not request.no_resume), *given])
    if config.train.output_dir == ".":
        raise ConfigError("no run folder given", "Add --output-dir DIR; the run can be resumed from it.")
    return config


def keys_that_follow_weights(config: Config, *, resume: bool) -> list[str]:
    """Overrides that make the student like the weights it starts from, for the keys that nobody has set.

    A run that is resumed already says them in its `config.yaml`: the weights may be gone by then.
    """
    from dinov2cli.models.load import read_weights, spell, student_settings

    folder = RunFolder(Path(config.train.output_dir))
    if resume and folder.config.exists() and folder.has_checkpoints():
        settings = load_config(config_file=folder.config).student.model_dump(exclude={"pretrained_weights"})
    else:
        settings = student_settings(read_weights(config.student.pretrained_weights).architecture)
    chosen = set(config.student.model_fields_set)
    size = {"arch", "embed_dim", "depth", "num_heads"}
    if chosen & size:  # these describe one thing together: whoever sets one has chosen
        chosen |= size
    return [f"student.{key}={spell(value)}" for key, value in settings.items() if key not in chosen]
