"""The table of evaluation protocols: what may follow `dino2 eval`, or stand in `evaluation.tasks`.

A new protocol is a module of `dinov2cli.eval` with `run(request, subject=None)`, its request, and its name here.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from dinov2cli.errors import ConfigError
from dinov2cli.requests.dense import DepthRequest, SegmentationRequest
from dinov2cli.requests.eval import EvalRequest, KnnRequest, LinearRequest, LogregRequest
from dinov2cli.requests.retrieval import RetrievalRequest

EVALUATIONS: dict[str, type[EvalRequest]] = {
    it.protocol(): it
    for it in (KnnRequest, LogregRequest, LinearRequest, RetrievalRequest, SegmentationRequest, DepthRequest)
}

OF_THE_TRAINING = {
    "checkpoint", "overrides", "output_dir", "config_file", "pretrained_weights", "device", "cpu", "gpus", "as_json",
    "dry_run", "slurm", "quiet", "verbose",
}  # fmt: skip
"""Options that `evaluation.task_options` may not set: the training does, or they mean nothing there."""


def task_request(task: str, options: Mapping[str, Any], checkpoint: str, device: str | None = None) -> EvalRequest:
    """The evaluation of a teacher checkpoint that `evaluation.tasks` names, with its part of `evaluation.task_options`.

    Raises:
        ConfigError: options that it has not, or values that they do not take.
    """
    kind = EVALUATIONS[task]
    known = [name for name in kind.model_fields if name not in OF_THE_TRAINING]
    for name in options:
        if name not in known:
            raise ConfigError(f"evaluation.task_options.{task}.{name}: no such option; there are {', '.join(known)}")
    try:
        return kind(**options, checkpoint=checkpoint, device=device)
    except ValidationError as error:
        wrong = error.errors()[0]
        name, why = str((*wrong["loc"], *options)[0]), wrong["msg"].removeprefix("Value error, ")
        raise ConfigError(f"evaluation.task_options.{task}.{name}={options.get(name)}: {why}") from None
