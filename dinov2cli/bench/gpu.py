"""`dino2 bench gpu`: what is worth knowing of a GPU in a few minutes, each part a command of its own, in one file."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from dinov2cli import __version__
from dinov2cli.bench.clock import Measured, name_of, table
from dinov2cli.console import err
from dinov2cli.device import choose_device
from dinov2cli.files import write_text
from dinov2cli.requests.bench import BenchGpuRequest

TESTS = Path(__file__).parents[2] / "tests"
"""Those of the source tree; an installed package has none."""


class Part(NamedTuple):
    """A command that is measured."""

    name: str
    words: list[str]  # after the interpreter
    limit: float  # in seconds


def run(request: BenchGpuRequest) -> Measured:
    """Run all parts that the time allows, and write the file after each.

    The file holds for each part its seconds and what it printed as JSON or, if it failed, its last lines.

    Raises:
        EnvironmentProblem: there is no such device.
    """
    device, end = name_of(choose_device(request.device)), time.monotonic() + 60 * request.minutes
    results: dict[str, Any] = {}
    for part in parts(request):
        left = end - time.monotonic()
        results[part.name] = measure(part, left) if left > 0 else {"error": "not run: no time was left"}
        said = results[part.name].get("error", "done").splitlines()[-1]
        err.print(f"{part.name}: {said}", markup=False, highlight=False)
        figures = facts(device) | {"parts": results}
        write_text(request.output, json.dumps(figures, indent=1))
    rows = [(name, *_row(result)) for name, result in results.items()]
    return Measured(figures, [table("part", "seconds", "found", rows=rows)])


def parts(request: BenchGpuRequest) -> Iterator[Part]:
    """What is measured, what matters most first."""
    dino2, on, preset = ["-m", "dinov2cli"], ["--device", request.device], request.preset
    yield Part("doctor", [*dino2, "doctor", "--json", *(["--cpu"] if request.device == "cpu" else [])], 60)

    def train(name: str, *choices: str, further: Sequence[str] = ("--synthetic",)) -> Part:
        words = ["bench", "train", "--preset", name, "--steps", str(request.steps), *choices, *further, *on]
        return Part(f"train {name} {' '.join(choices[1::2])}".strip(), [*dino2, *words, "--json"], 150)

    # As it is trained by default, with the kernels in which its time goes; then that uncompiled.
    yield train(preset, "--attention", "sdpa", "--compile", "on", further=("--synthetic", "--kernels", "25"))
    yield train(preset, "--attention", "sdpa", "--compile", "off")
    if TESTS.is_dir():
        # The golden trainings, the attention backends' equality, and what else needs a GPU.
        yield Part("tests", ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(TESTS)], 120)
    for compiled in ("on", "off"):
        for backend in () if request.device == "cpu" else ("varlen", "xformers"):
            yield train(preset, "--attention", backend, "--compile", compiled)
    extract = ["bench", "extract", "--preset", request.extract_preset, "--batch-size", "256", *on, "--json"]
    yield Part(f"extract {request.extract_preset}", [*dino2, *extract], 60)
    yield Part("knn", [*dino2, "bench", "knn", *on, "--json"], 60)
    for name in request.others:
        yield train(name)
    photos = train(preset, further=("data.device_augment=true",))  # the sample photos, by training's own loader
    yield photos._replace(name=f"{photos.name} device_augment")


def measure(part: Part, left: float) -> dict[str, Any]:
    """Run a part in a process of its own, for no longer than it may and than there is time."""
    began, limit = time.monotonic(), min(part.limit, left)
    words = [sys.executable, *part.words]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            said, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return {"seconds": time.monotonic() - began, "error": f"ended after {limit:.0f} s"}
        finally:  # with the processes that it has begun, which would use the GPU while the next part is measured
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    result: dict[str, Any] = {"seconds": time.monotonic() - began}
    if process.returncode:
        return result | {"error": "\n".join((errors or said).strip().splitlines()[-8:])}
    try:
        return result | {"result": json.loads(said)}
    except ValueError:  # pytest's
        return result | {"result": said.strip().splitlines()[-1:]}


def facts(device: str) -> dict[str, Any]:
    """What the figures belong to."""
    import torch

    return {"device": device, "dino2": __version__, "torch": torch.__version__, "cuda": torch.version.cuda,
            "time": time.time()}  # fmt: skip


def _row(result: Mapping[str, Any]) -> tuple[str, str]:
    seconds = f"{result['seconds']:.0f}" if "seconds" in result else ""
    if "error" in result:
        return seconds, result["error"].splitlines()[-1][:90]
    found = result["result"]
    if isinstance(found, dict) and "variants" in found:
        variant = found["variants"][0]
        found = f"{variant['images_per_s']:.1f} images/s, {variant['memory_gb']:.1f} GB, {variant['utilisation']:.0%}"
    elif isinstance(found, dict):
        found = ", ".join(f"{k} {v:.4g}" for k, v in found.items() if isinstance(v, float))
    return seconds, str(found)[:110]
