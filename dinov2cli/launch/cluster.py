"""What Slurm has here, and what a job is to have of it: typed, said by the site's file, or by default."""

from dinov2cli.console import logger
from dinov2cli.errors import ConfigError
from dinov2cli.launch.slurm import Wanted, with_site
from dinov2cli.requests.launch import Slurm
from dinov2cli.requests.sbatch import partitions, split_parameter
from dinov2cli.site import read_site, shown, user_file


def wanted_for(slurm: Slurm, gpus: int | None, *, cpu: bool, usual: int) -> Wanted:
    """What a job is to have, with what the site's file says where nothing is typed.

    Args:
        gpus: GPUs of each machine as typed; else, where the site has GPUs, `usual`.

    Raises:
        ConfigError: there is no such partition, or it has fewer machines than asked for.
    """
    slurm, typed = with_site(slurm), slurm
    cpu = cpu or (gpus is None and read_site().settings.slurm.gpus == 0)
    return Wanted(_on_this_cluster(slurm, typed), gpus or (1 if cpu else usual), cpu)


def origins(typed: Slurm) -> list[tuple[str, str, str]]:
    """(option, value, where it comes from) of a job's options that have a value."""
    site, full = read_site(), with_site(typed)
    rows = []
    for name in Slurm.model_fields:
        value, file = getattr(full, name), site.sources.get(f"slurm.{name}")
        if value not in (None, ()):
            text = "; ".join(value) if isinstance(value, tuple) else str(value)
            said = [*(["typed"] if getattr(typed, name) not in (None, ()) else []), *([shown(file)] if file else [])]
            rows.append((name, text, " and ".join(said if name == "parameters" else said[:1])))
    return rows


def _on_this_cluster(slurm: Slurm, typed: Slurm) -> Slurm:
    there = partitions()
    if not there:
        return slurm
    given = dict(map(split_parameter, slurm.parameters)).get("partition") or slurm.partition
    names = given.split(",") if given else [each.name for each in there if each.is_default]
    chosen = [each for each in there if each.name in names]
    if unknown := [name for name in names if name not in {each.name for each in there}]:
        known = ", ".join(each.name for each in there)
        file = read_site().sources.get("slurm.partition") if typed.partition is None else None
        hint = f"{shown(file)} has slurm.partition; --partition wins over it." if file else None
        raise ConfigError(f"partition {unknown[0]}: Slurm has no such partition here; it has {known}", hint)
    largest = max((each.nodes for each in chosen), default=slurm.nodes or 1)
    if (slurm.nodes or 1) <= largest:
        return slurm
    at = f"partition {' and '.join(names)}"
    site = read_site()
    if not site.settings.slurm.fewer_nodes:
        raise ConfigError(
            f"--nodes {slurm.nodes}: {at} has {largest} machine{'s' if largest > 1 else ''}",
            f"Type --nodes {largest}; or with `fewer_nodes: true` below `slurm:` in {shown(user_file())} such commands "
            "take as many machines as there are.",
        )
    logger.warning("%s has %d machines: --nodes %d becomes --nodes %d (slurm.fewer_nodes in %s)",
                   at, largest, slurm.nodes, largest, shown(site.sources["slurm.fewer_nodes"]))  # fmt: skip
    return slurm.model_copy(update={"nodes": largest})
