"""Where the values of a run come from that were not typed."""

import json
import os

from dinov2cli import cluster
from dinov2cli.config import Config
from dinov2cli.config.loading import read_layers
from dinov2cli.config.messages import said_by
from dinov2cli.console import err, plain_table
from dinov2cli.launch.typed import default_run_folder, overrides_of, own_file, said_here, typed_config
from dinov2cli.requests.train import TrainRequest
from dinov2cli.site import cache_folder, read_site, shown, user_file


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
