"""A training in other processes, of this machine or of a Slurm job, and the configuration that its request means."""

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from dinov2cli import cluster
from dinov2cli.config import Config, load_config
from dinov2cli.config.library import library_of
from dinov2cli.console import logger
from dinov2cli.data.datasets import check_dataset
from dinov2cli.data.spelling import absolute, complete
from dinov2cli.errors import ConfigError, Problems
from dinov2cli.files import check_folder, user_path
from dinov2cli.launch import owner, slurm
from dinov2cli.launch.local import Elsewhere, launch_local, processes_here
from dinov2cli.launch.restarts import newest_checkpoint
from dinov2cli.launch.typed import (
    default_run_folder,
    keys_of_site,
    of_student,
    open_data,
    overrides_of,
    own_file,
    print_origins,
    said_here,
    students_of,
    tell_of_fewer_nodes,
    tell_of_more_images,
    typed_config,
    with_preset,
)
from dinov2cli.requests.launch import GPUS_PER_NODE
from dinov2cli.requests.train import TrainRequest
from dinov2cli.site import read_site
from dinov2cli.train.resuming import changed_keys, check_same_batches
from dinov2cli.train.run_folder import RunFolder


def launch(request: TrainRequest) -> Elsewhere | None:
    """Submit the training as a job, or start it in several processes, where the request or the GPUs here say so.

    Raises:
        Dino2Error: a wrong configuration, found here and not in each process; else as the launchers.
    """
    # Before torch is imported. What the weights say of the model is left to the job: reading them needs it.
    config = resolve_config(request, read_weights=False)
    run = Path(config.train.output_dir)
    if request.dry_run:
        print_origins(request, config)
    keys = keys_of_site(request)
    for said_by_file in [] if request.dry_run else sorted({file for *_, file in keys}):
        words = " ".join(f"{key}={value}" for key, value, file in keys if file == said_by_file)
        logger.info("from %s: %s", said_by_file, words)
    students = resolve_students(request, read_weights=False)
    # A restart in a week means the same, whatever is known by then in the site's file.
    overrides = (*(f"{key}={value}" for key, value, _ in keys), *request.overrides)
    request = request.model_copy(update={"output_dir": run, "data": config.train.dataset_path, "overrides": overrides})
    if not request.slurm.is_asked:
        if (processes := processes_here(request.gpus, cpu=request.cpu)) == 1:
            return None
        students = resolve_students(request)
        tell_of_more_images(request, config, processes)
        # All processes, and those that start again, learn from the one that is there now.
        request = request.model_copy(update={"teacher": students[0].distillation.teacher or None})
        launch_local(request, processes, None if request.dry_run else folder_of_longest(students))
        return Elsewhere(None)
    if not (request.dry_run or request.no_resume) and all(map(is_finished, students)):
        from dinov2cli.train.display import ending

        for each in students:
            logger.info("finished already: %d of %d iterations", each.iterations(), each.iterations())
            for line in ending(RunFolder(Path(each.train.output_dir)), each.iterations()):
                logger.info(line)
        return Elsewhere(None)
    name, folder = f"dino2-{run.absolute().name}", run.absolute() / "slurm"
    usual = read_site().settings.slurm.gpus or GPUS_PER_NODE
    wanted = slurm.wanted_for(request.slurm, request.gpus, cpu=request.cpu, usual=usual)
    request = request.model_copy(update={"cpu": wanted.cpu})
    processes = wanted.gpus * (wanted.slurm.nodes or 1)
    tell_of_fewer_nodes(request, wanted, config)
    tell_of_more_images(request, config, processes)
    if request.dry_run:
        from dinov2cli.train.dry_run import print_plan_of_job

        students = resolve_students(request) if config.distillation.teacher else students
        print_plan_of_job(students, processes=processes, cpu=wanted.cpu)
        return Elsewhere(slurm.script(wanted, folder=folder, name=name))
    RunFolder(run).make()
    return Elsewhere(slurm.submit(request, wanted, folder=folder, name=name, run=folder_of_longest(students)))


def is_finished(config: Config) -> bool:
    """Whether all iterations of this configuration are done, by the names of the checkpoints alone."""
    return newest_checkpoint(Path(config.train.output_dir)) >= config.iterations()


def folder_of_longest(students: Sequence[Config]) -> Path:
    """The run folder that tells how far a training is."""
    return Path(max(students, key=Config.iterations).train.output_dir)


def completed(request: TrainRequest) -> TrainRequest:
    """The request with a preset, where it leaves that open (`with_preset`).

    Raises:
        ConfigError: the run folder, which nobody named, holds a run of another configuration; or as `with_preset`.
        DataError: as there.
    """
    chosen = with_preset(request)
    if chosen is not request and request.output_dir is None and not request.no_resume:
        refuse_another_run(resolve_config(chosen, read_weights=False), read_weights=False)
    return chosen


def first_look(request: TrainRequest) -> TrainRequest:
    """Check all that takes no time. Nothing is downloaded or written, or listed but for the choice of a preset.

    Returns the request with a preset, where it leaves that open.

    What the weights say of the model is left to later, and with Slurm to the job: reading them takes torch, and time.

    Raises:
        Dino2Error: all that is wrong, in the order in which to mend it.
    """
    wrong = Problems()
    with wrong.noted():
        request = completed(request)
    readable = request
    with wrong.noted():
        typed_config(request)
    if wrong.found:
        readable = what_can_be_read(request)
    config = typed_config(readable)
    with wrong.noted():
        check_dataset(config.train.dataset_path, "TRAIN")
    for key, split in (("knn_train_dataset", "TRAIN"), ("knn_val_dataset", "VAL")):
        with wrong.noted():
            if labelled := getattr(config.evaluation, key):
                check_dataset(labelled, split)
    folder = RunFolder(Path(config.train.output_dir))
    if is_default := config.train.output_dir == ".":
        folder = RunFolder(default_run_folder(readable, config.train.dataset_path))
    resumed = folder.has_checkpoints() and not request.no_resume
    if config.student.pretrained_weights and not resumed:
        with wrong.noted():
            from dinov2cli.models.load.locate import check_there

            check_there(config.student.pretrained_weights)
    if config.gram.ckpt and not resumed:
        with wrong.noted():
            from dinov2cli.train.gram_teacher import check_weights_there

            check_weights_there(config)
    if config.distillation.teacher:
        with wrong.noted():
            from dinov2cli.train.frozen_teacher import check_teacher_there

            check_teacher_there(config.distillation.teacher)
    several = [] if wrong.found else students_of(request)
    with wrong.noted():
        check_folder(folder.path, "--output-dir")
        if folder.path.resolve() == user_path(config.train.dataset_path).resolve():
            raise ConfigError(f"--output-dir {folder.path}: is the folder of the images; name one of its own")
        for each in {folder.path, *(each.output_dir for each in several if each.output_dir)}:
            RunFolder(each).refuse_foreign()
            if not request.dry_run and not request.take_over:
                owner.check_free(each)
                if request.slurm.is_asked:
                    owner.refuse_jobs_of(each)
    if (is_default or len(several) > 1) and not wrong.found:
        with wrong.noted():
            resolve_students(request, read_weights=False)  # whether another run is there, and students go together
    if request.slurm.is_asked:
        with wrong.noted():
            cluster.check(request.slurm, submits=not request.dry_run)
    else:
        with wrong.noted():
            if request.device == "cuda":
                from dinov2cli.device import choose_device

                choose_device(request.device)
        with wrong.noted():
            processes = processes_here(request.gpus, cpu=request.cpu)
            as_meant = (readable.preset, readable.config_file) == (request.preset, request.config_file)
            known = open_data(request) is None and not config.distillation.teacher  # which may have to be fetched first
            if as_meant and not resumed and known:  # a run goes on with smaller batches where there are more processes
                from dinov2cli.train.memory import check_memory

                check_memory(config, processes, cpu=request.cpu)
    wrong.tell()
    return request


def what_can_be_read(request: TrainRequest) -> TrainRequest:
    """The request without the words that make no configuration, so that the rest can be looked at."""
    readable = TrainRequest()
    changes: tuple[dict[str, Any], ...] = (
        {"preset": request.preset}, {"config_file": request.config_file}, {"data": request.data},
        {"output_dir": request.output_dir}, {"init_from": request.init_from}, {"teacher": request.teacher},
        *({"overrides": (word,)} for word in request.overrides),
    )  # fmt: skip
    for change in changes:
        with suppress(ConfigError):
            both = {**change, "overrides": (*readable.overrides, *change.get("overrides", ()))}
            typed_config(candidate := readable.model_copy(update=both))
            readable = candidate
    return readable


def resolve_config(request: TrainRequest, *, read_weights: bool = True) -> Config:
    """The configuration that a request says: its options that stand for a key are overrides of it.

    Datasets that are known by name are written out, and without a run folder it is one named after the preset, the file
    or the data. With `read_weights`, keys that nobody has set follow the weights that the student starts from.

    Raises:
        ConfigError: as `load_config`; or the run folder, which nobody named, holds a run of another configuration.
        DataError: the data is not known, or gone.
    """
    given = overrides_of(request)
    load = partial(load_config, preset=request.preset, config_file=own_file(request), site=said_here())
    config = load(overrides=given)
    is_default = config.train.output_dir == "."
    if is_default:
        given.append(f"train.output_dir={default_run_folder(request, config.train.dataset_path)}")
    given.append(f"train.dataset_path={absolute(complete(config.train.dataset_path, 'TRAIN'))}")
    for key, split in (("knn_train_dataset", "TRAIN"), ("knn_val_dataset", "VAL")):
        if labelled := getattr(config.evaluation, key):
            given.append(f"evaluation.{key}={absolute(complete(labelled, split))}")
    if (weights := user_path(config.student.pretrained_weights)) != Path() and weights.exists():
        given.append(f"student.pretrained_weights={weights.absolute()}")
    if config.gram.ckpt and user_path(config.gram.ckpt).exists():
        given.append(f"gram.ckpt={user_path(config.gram.ckpt).absolute()}")
    config = load(overrides=given)
    resume = not request.no_resume
    if config.student.library():
        from dinov2cli.models.libraries import keys_of_library

        given += keys_of_library(config)
        config = load(overrides=given)
    elif config.student.pretrained_weights and read_weights:
        given = [*keys_that_follow_weights(config, resume=resume), *given]
        config = load(overrides=given)
    if config.distillation.teacher and read_weights:
        from dinov2cli.train.frozen_teacher import check_fits, keys_that_follow_teacher

        decided, named = keys_that_follow_teacher(config, resume=resume)
        config = load(overrides=[*decided, *given, *named])
        check_fits(config)
    if is_default and not request.no_resume:
        refuse_another_run(config, read_weights=read_weights)
    return config


def resolve_students(request: TrainRequest, *, read_weights: bool = True) -> list[Config]:
    """The configuration of each student that a request trains: of one, or of each of `distillation.students`.

    Raises:
        Dino2Error: as `resolve_config`, with the student's name.
        ConfigError: they cannot learn together.
    """
    configs: list[Config] = []
    for each in (several := students_of(request)):
        if configs:  # which may have been looked for, and goes on with that of its run
            each = each.model_copy(update={"teacher": configs[0].distillation.teacher})
        with of_student(each) if len(several) > 1 else nullcontext():
            configs.append(resolve_config(each, read_weights=read_weights))
    check_same_batches(configs)
    return configs


def refuse_another_run(config: Config, *, read_weights: bool = True) -> None:
    """Raise ConfigError, with the choices there are, where the run folder holds a run of another configuration."""
    folder = RunFolder(Path(config.train.output_dir))
    if not folder.config.is_file():
        return
    changed = changed_keys(folder.config, config)
    if not read_weights:  # nor looked for
        changed = {key: text for key, text in changed.items() if not key.startswith("distillation.")}
    if config.student.pretrained_weights and not read_weights:  # which say the others
        chosen = {f"student.{key}" for key in config.student.model_fields_set}
        changed = {key: text for key, text in changed.items() if not key.startswith("student.") or key in chosen}
    if not changed:
        return
    done, total = newest_checkpoint(folder.path), load_config(config_file=folder.config).iterations()
    state = "a finished" if done >= total else "an unfinished"
    texts = [*list(changed.values())[:4], *([f"{len(changed) - 4} more"] if len(changed) > 4 else [])]
    free = next(path for n in range(2, 1000) if not (path := folder.path.with_name(f"{folder.path.name}-{n}")).exists())
    raise ConfigError(
        f"{folder.path} holds {state} run of another configuration: " + ", ".join(texts),
        f"Choose: --output-dir {free} for a run of its own,\n"
        f"        --output-dir {folder.path} to go on with that run, changed so,\n"
        "        --no-resume to start over there; that run's files move to previous_1/ and so on.",
    )


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
    if "arch" in chosen and library_of(settings.get("arch", "vit")) != library_of(config.student.arch):
        return []  # of another kind of network; the weights are refused when they are read
    size = {"arch", "embed_dim", "depth", "num_heads"}
    if chosen & size:  # these describe one thing together: whoever sets one has chosen
        chosen |= size
    return [f"student.{key}={spell(value)}" for key, value in settings.items() if key not in chosen]
