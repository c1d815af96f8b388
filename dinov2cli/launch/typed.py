"""What a request to train says: its configuration as it is typed, the preset where it leaves that open, and where its
other values come from."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinov2cli import cluster
from dinov2cli.config import Config, find_preset, load_config
from dinov2cli.config.choosing import CONTINUING, RECIPES, Machine, choose
from dinov2cli.config.loading import Layer, read_layers
from dinov2cli.config.messages import said_by
from dinov2cli.console import err, logger, plain_table
from dinov2cli.data.datasets import make_dataset
from dinov2cli.data.decoding import Reading
from dinov2cli.data.look import look_at
from dinov2cli.data.spelling import absolute, complete
from dinov2cli.data.workers import available_cores
from dinov2cli.errors import ConfigError, Dino2Error
from dinov2cli.files import user_path
from dinov2cli.launch.environment import is_supervised, worker_rank
from dinov2cli.launch.local import processes_here
from dinov2cli.launch.slurm import Wanted
from dinov2cli.requests.launch import GPUS_PER_NODE
from dinov2cli.requests.train import TrainRequest
from dinov2cli.site import cache_folder, read_site, shown, user_file
from dinov2cli.train.run_folder import RunFolder, written_by_dino2

SIZE = {f"student.{key}" for key in ("arch", "embed_dim", "depth", "num_heads", "patch_size")}
"""Who types one of these has chosen a model, and gets the defaults, which are the reference's, for the rest."""
FOR_ONE_PROCESS = {"demo", *(recipe.preset for recipe in RECIPES if recipe.gpus <= 1)}
"""Presets made for one process: with more, an iteration has more images, and learning rate and epochs change."""
LOOKED_AT = 100


def typed_config(request: TrainRequest) -> Config:
    """The configuration as it is typed: datasets and the run folder are not filled in."""
    return load_config(request.preset, own_file(request), overrides_of(request), said_here())


def students_of(request: TrainRequest) -> list[TrainRequest]:
    """The requests that would train each of `distillation.students` alone; the request itself where there are none.

    Raises:
        ConfigError: as `typed_config`.
    """
    config = typed_config(request)
    if not config.distillation.students:
        return [request]
    folder = Path(config.train.output_dir)
    if folder == Path():
        folder = default_run_folder(request, absolute(complete(config.train.dataset_path, "TRAIN")))
    each = []
    for student in config.distillation.students:
        keys = [(f"{group}.{key}", value) for group, keys in student.items() if group != "name"
                for key, value in keys.items()]  # fmt: skip
        words = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys]
        own = {
            "output_dir": folder / student["name"],
            "overrides": (*request.overrides, "distillation.students=[]", *words),
        }
        each.append(request.model_copy(update=own))
    return each


@contextmanager
def of_student(request: TrainRequest) -> Iterator[None]:
    """Lets an error begin with the name of the student that it is of."""
    try:
        yield
    except Dino2Error as error:
        assert request.output_dir is not None, "`students_of` gives each a folder"
        error.message = f"student {request.output_dir.name}: {error.message}"
        raise


def said_here() -> list[tuple[Layer, str]]:
    """The site's keys, for a command that is typed; those that dino2 starts have been told, once for all restarts."""
    return [] if is_supervised() else read_site().keys()


def own_file(request: TrainRequest) -> Path | None:
    """The configuration file of a request; where it names none and no preset, that of the run it goes on with."""
    if request.preset is None and request.config_file is None and request.output_dir and not request.no_resume:
        return file_of_run(request.output_dir)
    return request.config_file


def file_of_run(path: Path) -> Path | None:
    """The configuration of the run in a folder, if there is one that can go on."""
    folder = RunFolder(path)
    can_go_on = folder.has_checkpoints() and folder.config.is_file() and written_by_dino2(folder.config)
    return folder.config if can_go_on else None


def overrides_of(request: TrainRequest) -> list[str]:
    """The changes of keys, those among them that options stand for."""
    options = {
        "train.dataset_path": request.data,
        "train.output_dir": request.output_dir.absolute() if request.output_dir == Path() else request.output_dir,
        "student.pretrained_weights": request.init_from,
        "distillation.teacher": request.teacher,
    }
    return [*request.overrides, *(f"{key}={value}" for key, value in options.items() if value is not None)]


def default_run_folder(request: TrainRequest, data: str) -> Path:
    """Below `runs` of the site's file, or `runs/` here: a folder named after the preset, the file or the data."""
    if request.preset is not None:
        name = find_preset(request.preset).name
    elif request.config_file is not None and request.config_file.stem != "config":
        name = request.config_file.stem
    else:
        name = user_path(data).absolute().name if user_path(data).is_dir() else data.partition(":")[0]
    return Path(read_site().settings.runs or "runs") / (re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run")


def open_data(request: TrainRequest) -> str | None:
    """The data of a request that leaves open how to train on them; else None."""
    words = {key.strip(): value.strip() for key, _, value in (word.partition("=") for word in overrides_of(request))}
    if request.preset or request.config_file or own_file(request) or SIZE & words.keys():
        return None
    return words.get("train.dataset_path")


def with_preset(request: TrainRequest) -> TrainRequest:
    """The request with what it leaves open decided: the preset, by its data and the machine; and then the run folder.

    Where that holds a run of these data already, its own configuration instead.

    Raises:
        ConfigError: words that fit no preset there is to choose.
        DataError: the data are not known, or gone.
    """
    data = open_data(request)
    if data is None:
        return request
    place, folder = absolute(complete(data, "TRAIN")), request.output_dir or default_run_folder(request, data)
    file = None if request.no_resume else file_of_run(folder)
    if file and load_config(config_file=file).train.dataset_path == place:
        return request.model_copy(update={"config_file": file, "output_dir": folder})
    config = _as_it_may_be(request)
    if config.student.pretrained_weights:
        recipe, seen = CONTINUING, "weights to start from"
    else:
        look = look_at(make_dataset(place), Reading.of(config.images(), config), LOOKED_AT)
        machine = machine_of(request)
        recipe, seen = choose(look.size, look.side, machine), f"{look.in_short()}, {machine}"
    if worker_rank() == 0:
        logger.info("no preset given: %s -> preset %s (%s)", seen, recipe.preset, recipe.reason)
    return request.model_copy(update={"preset": recipe.preset, "output_dir": folder})


def _as_it_may_be(request: TrainRequest) -> Config:
    """With the first of the presets that the words fit: wrong ones are said before anything is listed."""
    problem: ConfigError | None = None
    for recipe in (*RECIPES, CONTINUING):
        try:
            return typed_config(request.model_copy(update={"preset": recipe.preset}))
        except ConfigError as error:
            problem = problem or error
    typed_config(request)
    assert problem is not None
    raise problem


def tell_of_fewer_nodes(request: TrainRequest, wanted: Wanted, config: Config) -> None:
    """Warn where the job has fewer machines than were asked for, and so fewer images in an iteration."""
    asked, nodes = request.slurm.nodes or 1, wanted.slurm.nodes or 1
    if nodes < asked:
        images = config.effective_batch(asked * wanted.gpus), config.effective_batch(nodes * wanted.gpus)
        same = config.train.gradient_accumulation * asked / nodes
        keep = f"; train.gradient_accumulation={same:.0f} would keep them" if same.is_integer() else ""
        logger.warning("an iteration has %d images instead of %d%s", images[1], images[0], keep)


def tell_of_more_images(request: TrainRequest, config: Config, processes: int) -> None:
    """Warn where several processes make more images of an iteration than a preset for one process is made for."""
    preset = find_preset(request.preset).name if request.preset else None
    if preset not in FOR_ONE_PROCESS:
        return
    images, own = config.effective_batch(processes), load_config(preset).effective_batch(1)
    if images > own:
        each = config.train.batch_size_per_gpu * own / images
        keep = f"; train.batch_size_per_gpu={each:.0f} keeps {own}" if each.is_integer() else ""
        logger.warning("preset %s is made for %d images an iteration, and %d processes take %d%s",
                       preset, own, processes, images, keep)  # fmt: skip


def machine_of(request: TrainRequest) -> Machine:
    """What a request trains on. Of a job's machines, nothing is known here but their number of GPUs.

    Raises:
        EnvironmentProblem: there are fewer GPUs than asked for.
    """
    cores = available_cores()
    if request.cpu:
        return Machine(cores)
    if request.slurm.is_asked:
        here = request.gpus or read_site().settings.slurm.gpus or GPUS_PER_NODE
        return Machine(cores, here * (request.slurm.nodes or 1))
    import torch

    processes = processes_here(request.gpus, cpu=False)
    if not torch.cuda.is_available():
        return Machine(cores)
    memory = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(processes))
    return Machine(cores, processes, memory / 1e9)


def keys_of_site(request: TrainRequest) -> list[tuple[str, str, str]]:
    """(key, value as in an override, file) of those of the site's keys that hold for a run."""
    site = said_here()
    layers, files = read_layers(request.preset, own_file(request), overrides_of(request), site), {f for _, f in site}
    pairs = [(group, key) for layer, _ in site for group, keys in layer.items() for key in keys]
    found = [(f"{group}.{key}", *said_by(layers, [group, key])) for group, key in pairs]
    return [(key, value if isinstance(value, str) else json.dumps(value), file) for key, value, file in found
            if file in files]  # fmt: skip


def print_origins(request: TrainRequest, config: Config) -> None:
    """Say on standard error where the values come from that were not typed."""
    site = read_site()
    runs = f"by default, below the runs of {shown(site.sources['runs'])}" if site.settings.runs else "by default"
    is_named = request.output_dir not in (None, default_run_folder(TrainRequest(), config.train.dataset_path))
    typed = "typed" if is_named or "train.output_dir" in "".join(request.overrides) else runs
    plain = typed_config(request.model_copy(update={"data": None})).train.dataset_path
    name = (request.data or plain).partition(":")[0]
    source = "typed" if request.data else f"preset {request.preset}" if request.preset else "configuration"
    known = site.sources.get(f"datasets.{name}")
    cache_from = "DINO2_CACHE" if os.environ.get("DINO2_CACHE") else shown(site.sources.get("cache", "by default"))
    rows = [
        ("run folder", config.train.output_dir, typed),
        ("data", config.train.dataset_path, f"{source}; its place from {shown(known)}" if known else source),
        ("cache", str(cache_folder("weights").parent), cache_from),
        *keys_of_site(request),
        *(cluster.origins(request.slurm) if request.slurm.is_asked else []),
    ]
    table = plain_table("setting", "value", "from")
    for each in table.columns:
        each.overflow = "fold"
    names, file = max(len(row[0]) for row in rows), len(shown(user_file()))
    table.columns[1].max_width = max(err.width - names - file - 8, 16)  # values are folded first
    table.columns[2].max_width = max(file, 16)
    for row in rows:
        table.add_row(*row)
    err.print(table, markup=False, highlight=False)
