"""`dino2 doctor`: whether a run can succeed on these machines."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dinov2cli.cli.completion import complete_preset
from dinov2cli.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from dinov2cli.config import Config
    from dinov2cli.launch.findings import Finding
    from dinov2cli.launch.preflight import Check


def doctor(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN] [a.b=value ...]",
            show_default=False,
            help="A run folder whose configuration, data and folder are examined; then changes of single keys.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="The configuration of a run to come; see dino2 presets list.",
            autocompletion=complete_preset,
        ),
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config-file", metavar="YAML", help="A configuration file instead of a preset.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATASET", help="The training images: a folder or a dataset string."),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", metavar="DIR", help="Where the run folder is going to be.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="As if training on the CPU even if there is a GPU.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Check machine, data and run folder before a training, and say what to do about what is wrong.

    Takes the options of dino2 train. Without any, it examines the machine alone; with --data also whether the images
    can be read, with --output-dir whether checkpoints can be written there. Nothing is left behind. Under torchrun or
    srun every process checks what it sees, and the processes' connection is measured. Exit code 2: a run would fail.

    Example:

        dino2 doctor --preset vitl14 --data /data/photos --output-dir runs/photos

        torchrun --nproc-per-node 8 -m dinov2cli doctor runs/photos
    """  # fmt: skip
    from dinov2cli import distributed
    from dinov2cli.console import out, print_json, set_up_logging
    from dinov2cli.device import choose_device
    from dinov2cli.launch import preflight
    from dinov2cli.launch.findings import Situation

    set_up_logging()
    config = resolve(arguments or [], preset, config_file, data, output_dir)
    asked = config_given(arguments, preset, config_file)
    checks, left_out = choose_checks(config, with_model=asked)
    with distributed.process_group():
        with distributed.same_error_everywhere():
            device = choose_device("cpu" if cpu else "auto")
        findings = preflight.examine(checks, Situation(config, device, thorough=True))
        if distributed.is_main():
            if as_json:
                print_json(as_dict(findings))
            else:
                out.print(table(findings))
                if left_out:
                    out.print(f"Not checked: {'; '.join(left_out)}.", markup=False)
        preflight.raise_failures(findings)


def resolve(
    arguments: list[str], preset: str | None, config_file: Path | None, data: str | None, output_dir: Path | None
) -> "Config":
    """The configuration that the options say: as in `dino2 train`, or that of the run named first."""
    from dinov2cli.config import load_config

    words = list(arguments)
    if words and "=" not in words[0]:
        run = Path(words.pop(0))
        if preset or config_file:
            raise ConfigError(f"{run} has a configuration of its own; leave out --preset and --config-file.")
        if not (run / "config.yaml").is_file():
            raise ConfigError(
                f"{run}: no run folder; there is no config.yaml in it.",
                hint="For a run to come, give --preset, --data and --output-dir, as for dino2 train.",
            )
        config_file = run / "config.yaml"
        words = [f"train.output_dir={run}", *words]
    options = {"train.dataset_path": data, "train.output_dir": str(output_dir) if output_dir else None}
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    return load_config(preset=preset, config_file=config_file, overrides=[*words, *given])


def config_given(arguments: list[str] | None, preset: str | None, config_file: Path | None) -> bool:
    """Whether there is a run in mind, and not only a machine."""
    return bool(arguments or preset or config_file)


def choose_checks(config: "Config", *, with_model: bool) -> tuple[dict[str, "Check"], list[str]]:
    """The checks that the configuration has something to look at for, and what would make for more."""
    from dinov2cli.config import Config
    from dinov2cli.launch.preflight import DATA, MACHINE, MODEL, OUTPUT

    checks, left_out = dict(MACHINE), []
    with_data = config.train.dataset_path != Config().train.dataset_path
    with_output = config.train.output_dir != Config().train.output_dir
    for wanted, group, option in (
        (with_data, DATA, "dataset and loaders (--data DATASET)"),
        (with_model or with_output, MODEL, "memory (--preset NAME)"),
        (with_output, OUTPUT, "run folder, disk space and checkpoints (--output-dir DIR)"),
    ):
        if wanted:
            checks |= group
        else:
            left_out.append(option)
    return checks, left_out


def table(findings: dict[str, "Finding"]) -> "Table":
    """A row for each check."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "failure": "bold red"}
    rows = Table("check", "", "finding", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, finding in findings.items():
        text = finding.text if not finding.remedy else f"{finding.text}\n{finding.remedy}"
        rows.add_row(Text(name), Text(finding.status, style=colours[finding.status]), Text(text))
    return rows


def as_dict(findings: dict[str, "Finding"]) -> dict[str, object]:
    """Plain values for `--json`."""
    order = ["ok", "warning", "failure"]
    return {
        "status": max((finding.status.value for finding in findings.values()), key=order.index),
        "checks": [
            {
                "check": name,
                "status": finding.status.value,
                "finding": finding.text,
                "remedy": finding.remedy,
                **({"facts": dict(finding.facts)} if finding.facts else {}),
            }
            for name, finding in findings.items()
        ],
    }
