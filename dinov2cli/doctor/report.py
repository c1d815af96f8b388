"""The checks before a run (`preflight`) and those that are asked for (`dino2 doctor`): chosen, made and told."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Column
from rich.text import Text

from dinov2cli import distributed
from dinov2cli.config import Config
from dinov2cli.console import logger, plain_table
from dinov2cli.data.datasets import ImageDataset
from dinov2cli.device import choose_device
from dinov2cli.doctor.finding import Check, Finding, Situation, Status, examine, problem_of, severity
from dinov2cli.doctor.machine import MACHINE
from dinov2cli.doctor.run import DATA, MODEL, OUTPUT
from dinov2cli.errors import ConfigError, DataError, Dino2Error
from dinov2cli.launch.typed import typed_config, with_preset
from dinov2cli.requests.tools import DoctorRequest
from dinov2cli.requests.train import TrainRequest

ALL = {**MACHINE, **DATA, **MODEL, **OUTPUT}
COLOURS = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILURE: "bold red"}


def preflight(config: Config, device: torch.device, *, dataset: ImageDataset | None = None) -> None:
    """Stop a run that cannot succeed, on all processes alike, within seconds of its start.

    Collective: every process of the run calls it, inside `distributed.process_group()`, once the run folder exists.
    Warnings are logged; otherwise process 0 says one line.

    Args:
        dataset: what `config.train.dataset_path` names, if it has been listed already.

    Raises:
        DataError: the training images cannot be read, or are not the same for all processes.
        EnvironmentProblem: anything else that the run would fail of; the message names it and its remedy.
    """
    began = time.perf_counter()
    findings = examine(ALL, Situation(config, device, dataset))
    for name, finding in findings.items() if distributed.is_main() else ():
        if finding.status is Status.WARNING:
            logger.warning("%s: %s. %s", name, finding.text, finding.remedy)
    if problem := problem_of(findings):
        raise problem
    reduced = findings["communication"].facts.get("bandwidth_gb_s")
    speed = f"; all-reduce over {distributed.world_size()} processes: {reduced:.2g} GB/s" if reduced else ""
    if distributed.is_main():
        logger.info("%d checks in %.1f s%s", len(findings), time.perf_counter() - began, speed)


@dataclass(frozen=True)
class Report:
    """What `dino2 doctor` prints: a row for each check; the failures are the command's `problem`."""

    findings: Mapping[str, Finding]
    left_out: Sequence[str]

    @property
    def problem(self) -> Dino2Error | None:
        return problem_of(self.findings)

    def as_dict(self) -> dict[str, Any]:
        checks = [
            {"check": name, "status": found.status, "finding": found.text, "remedy": found.remedy}
            | ({"facts": dict(found.facts)} if found.facts else {})
            for name, found in self.findings.items()
        ]
        return {"status": max(self.findings.values(), key=severity).status, "checks": checks}

    def __rich__(self) -> Group:
        rows = plain_table("check", "", Column("finding", overflow="fold"))
        for name, found in self.findings.items():
            text = f"{found.text}\n{found.remedy}".strip()
            rows.add_row(Text(name), Text(found.status, style=COLOURS[found.status]), Text(text))
        return Group(rows, *([Text(f"Not checked: {'; '.join(self.left_out)}.")] if self.left_out else []))


def run(request: DoctorRequest) -> Report:
    """Make the checks that there is something to look at for, on all processes.

    Raises:
        ConfigError: what is asked for makes no configuration.
        DataError, EnvironmentProblem: a run would fail, in all processes but the first, which reports it.
    """
    training = training_of(request)
    config = typed_config(training)
    with_model = bool(request.arguments or training.preset or training.config_file)
    checks, left_out = choose_checks(config, with_model=with_model)
    with distributed.process_group():
        with distributed.same_error_everywhere():
            device = choose_device("cpu" if request.cpu else "auto")
        report = Report(examine(checks, Situation(config, device, thorough=True)), left_out)
        if report.problem and not distributed.is_main():
            raise report.problem
    return report


def training_of(request: DoctorRequest) -> TrainRequest:
    """The training that the options say: as `dino2 train` takes them, or that of the run named first."""
    words, config_file = list(request.arguments), request.config_file
    if words and "=" not in words[0]:
        run = Path(words.pop(0))
        if request.preset or config_file:
            raise ConfigError(f"{run} has a configuration of its own; leave out --preset and --config-file.")
        if not (run / "config.yaml").is_file():
            raise ConfigError(
                f"{run}: no run folder; there is no config.yaml in it.",
                hint="For a run to come, give --preset, --data and --output-dir, as for dino2 train.",
            )
        config_file = run / "config.yaml"
        words = [f"train.output_dir={run}", *words]
    typed = TrainRequest(preset=request.preset, config_file=config_file, data=request.data, overrides=tuple(words),
                         output_dir=request.output_dir, cpu=request.cpu)  # fmt: skip
    with suppress(DataError):  # of which the check of the data tells
        typed = with_preset(typed)
    return typed.model_copy(update={"output_dir": request.output_dir})  # not where it would be by default


def choose_checks(config: Config, *, with_model: bool) -> tuple[dict[str, Check], list[str]]:
    """The checks that the configuration has something to look at for, and what would make for more."""
    default = Config().train
    with_data = config.train.dataset_path != default.dataset_path
    with_output = config.train.output_dir != default.output_dir
    groups = (
        (with_data, DATA, "dataset and loaders (--data DATASET)"),
        (with_model or with_output, MODEL, "memory (--preset NAME)"),
        (with_output, OUTPUT, "run folder, disk space and checkpoints (--output-dir DIR)"),
    )
    checks = MACHINE | {name: check for wanted, group, _ in groups if wanted for name, check in group.items()}
    return checks, [option for wanted, _, option in groups if not wanted]
