"""Records what dino2 computes: `python tests/identity/record.py OUT [--parts NAME ...]` writes OUT/NAME.json.

Drives the command line alone, in the checkout that this file lies in or the one of `--checkout`, so that the same
script runs on every version of the code. See README.md beside it.
"""

import argparse
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).parents[1]))
from ready import HEAVY, Server

Record = dict[str, Any]

# Never the same twice.
TIMES = {"iter_time", "data_time", "date", "seconds", "created", "version", "dino2.version", "transformers_version"}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "120",
    "NO_COLOR": "1",
    "TERM": "dumb",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}

COMMAND_TREE = """
import enum, json, sys, types, typing
import typer
from dinov2cli.cli.main import app

def plain(value):
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)

def kind(each):
    # [whether a list, type, choices]; typer before 0.20 made a click type of the annotation, which tells less
    if not hasattr(each, "type_descriptor"):
        return [each.nargs != 1 or each.multiple, each.type.name, list(getattr(each.type, "choices", []))]
    hint, many = each.type_descriptor.annotation, False
    while typing.get_args(hint) and typing.get_origin(hint) is not typing.Literal:
        many |= typing.get_origin(hint) in (list, tuple)
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is typing.Literal:
        return [many, "word", list(typing.get_args(hint))]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return [many, "word", [member.value for member in hint]]
    return [many, getattr(hint, "__name__", str(hint)), []]

def parameter(each):
    many, name, words = kind(each)
    option = each.param_type_name == "option"
    record = {
        "kind": each.param_type_name,
        "flags": [*each.opts, *each.secondary_opts] if option else [],
        "help": " ".join((getattr(each, "help", None) or "").split()),
        "metavar": each.metavar, "type": name, "many": many, "words": words,
        "min": getattr(each, "min", None), "max": getattr(each, "max", None),
        "required": each.required, "nargs": each.nargs, "is_flag": bool(getattr(each, "is_flag", False)),
        "default": None if callable(each.default) else plain(each.default),
        "show_default": plain(getattr(each, "show_default", None)),
        "panel": plain(getattr(each, "rich_help_panel", None)), "hidden": bool(getattr(each, "hidden", False)),
        "completes": getattr(each, "_custom_shell_complete", None) is not None,
    }
    return {key: value for key, value in record.items() if not any(value is no for no in (None, False)) and value != []}

def describe(command):
    below = {name: describe(sub) for name, sub in getattr(command, "commands", {}).items()}
    parameters = {}
    for each in map(parameter, command.params):
        parameters[each["flags"][0] if each.get("flags") else each.get("metavar") or each["kind"]] = each
    record = {"help": command.help or "", "parameters": parameters}
    return record | ({"commands": below} if below else {})

print(json.dumps(describe(typer.main.get_command(app))))
assert "torch" not in sys.modules, "the tree of commands must not import torch"
"""

SMALL = [
    "student.arch=vit_tiny", "student.embed_dim=24", "student.depth=3", "student.num_heads=2", "student.patch_size=8",
    "student.drop_path_rate=0.3", "crops.global_crops_size=32", "crops.local_crops_size=16",
    "crops.local_crops_number=2", "dino.head_n_prototypes=48", "dino.head_hidden_dim=32", "dino.head_bottleneck_dim=16",
    "train.batch_size_per_gpu=4", "train.OFFICIAL_EPOCH_LENGTH=10", "train.log_period=1", "train.num_workers=0",
    "train.checkpoint_period=15", "optim.epochs=3", "optim.warmup_epochs=1", "evaluation.eval_period_iterations=15",
]  # fmt: skip
DEMO = [
    "train.batch_size_per_gpu=8", "train.OFFICIAL_EPOCH_LENGTH=10", "train.log_period=1", "train.num_workers=0",
    "train.checkpoint_period=15", "optim.epochs=3", "student.embed_dim=64", "student.depth=3",
    "crops.local_crops_number=2", "evaluation.knn_period=15",
]  # fmt: skip
VARIANT = [
    "ibot.separate_head=true", "ibot.head_n_prototypes=40", "ibot.head_hidden_dim=24", "ibot.head_bottleneck_dim=12",
    "train.centering=sinkhorn_knopp", "student.ffn_layer=swiglufused", "student.num_register_tokens=2",
    "data.device_augment=true", "dino.loss_weight=0.7", "dino.koleo_loss_weight=0.3", "ibot.loss_weight=1.3",
    "optim.layerwise_decay=0.9", "optim.freeze_last_layer_epochs=1",
]  # fmt: skip
PICTURES = ["images/class0/0.png", "images/class1/5.jpg"]
PHOTOS = ["--train-dataset", "SamplePhotos:split=TRAIN", "--val-dataset", "SamplePhotos:split=VAL"]
EVALUATION = [*PHOTOS, "--device", "cpu", "--num-workers", "0", "--json"]


class Failed(Exception):
    """A command that should have worked did not; the message holds what it said."""


def environment(checkout: Path) -> dict[str, str]:
    # What pytest or a shell says of its terminal must not count; the number of threads may be another.
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return os.environ | ENVIRONMENT | threads | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(checkout)}


@functools.cache
def server(checkout: Path) -> Server:
    """Has imported what is not dino2: each command takes dino2 itself from the checkout, as it is then."""
    return Server(HEAVY, environment=environment(checkout))


class Session:
    """A folder in which commands run, with generated images in `images/` and `clip/`.

    Relative paths are used throughout, so that no file says where the folder was.
    """

    def __init__(self, folder: Path, checkout: Path) -> None:
        self.folder, self.checkout = folder, checkout
        write_images(folder / "images")
        write_clip(folder / "clip")
        own = {"DINO2_CACHE": str(self.folder / "cache"), "DINO2_CONFIG": str(self.folder / "dino2.yaml")}
        self.environment = environment(checkout) | own

    def run(self, *commands: list[str], fails: bool = False) -> list[tuple[int, str, str]]:
        """Exit code, standard output and standard error of each command; `Failed` unless all exit with 0."""
        results = []
        for words in commands:
            done = server(self.checkout).run(*words, cwd=self.folder, env=self.environment, workers="--gpus" in words)
            if done.returncode and not fails:
                raise Failed(f"dino2 {' '.join(words)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
            results.append((done.returncode, done.stdout, done.stderr))
        return results

    def python(self, code: str) -> str:
        words = [sys.executable, "-c", code]
        result = subprocess.run(words, capture_output=True, text=True, cwd=self.folder, env=self.environment)
        if result.returncode:
            raise Failed(f"{result.stdout}\n{result.stderr}")
        return result.stdout

    def train(self, run: str, *words: str) -> list[str]:
        return ["train", "--cpu", "--output-dir", run, *words]

    def small(self, run: str, *words: str) -> list[str]:
        return self.train(run, "--data", "images", *SMALL, *words)


def commands(session: Session) -> Record:
    """The tree of commands: options, help, defaults, choices. No torch."""
    tree: Record = json.loads(session.python(COMMAND_TREE))
    return tree


def help_texts(session: Session) -> Record:
    """What `--help` prints, in 120 columns; depends on the versions of typer and rich."""
    paths = [[*path, "--help"] for path in command_paths(commands(session))]
    return {" ".join(words): out.splitlines() for words, (_, out, _) in zip(paths, session.run(*paths), strict=True)}


def command_paths(tree: Record, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, below in tree.get("commands", {}).items():
        yield from command_paths(below, (*path, name))


def texts(session: Session) -> Record:
    """Some presets in full, and what wrong input is answered: exit code and message."""
    listed = session.run(["presets", "list"])[0][1]
    shown = [["presets", "show", name, "--full"] for name in ("demo", "vitl14", "vitg14_reg4_pretrain")]
    wrong = [
        session.small("wrong", "optim.epoch=3"),
        session.small("wrong", "optim.epochs=none"),
        session.small("wrong", "student.arch=vit_tin"),
        session.small("wrong", "crops.global_crops_size=30"),
        session.train("wrong", "--preset", "dem"),
        session.train("wrong", "--preset", "demo", "--data", "nowhere"),
        session.train("wrong", "--preset", "demo", "--data", "ImageNets:split=TRAIN"),
        session.train("wrong", "--config-file", "nowhere.yaml"),
        ["eval", "knn", "nowhere", *PHOTOS],
        ["eval", "knn", "dinov2_vits15", *PHOTOS],
        ["eval", "knn"],
        ["eval", "knn", "nowhere", "--nb-knn", "0"],
        ["eval", "logreg", "nowhere", "--metric-type", "best"],
        ["eval", "linear", "nowhere", "--learning-rates", "fast"],
        ["export", "nowhere", "--format", "pdf", "--output", "x"],
        ["export", "nowhere", "--format", "hf", "--output", "x"],
        ["pca-image", "nowhere.jpg", "x.png", "--model", "nowhere"],
        ["pca-video", "clip", "x.avi", "--model", "nowhere"],
        ["attention", "images", "x.png", "--model", "nowhere"],
        ["embed", "nowhere", "--data", "images", "--output", "x.csv"],
        ["info", "nowhere"], ["results", "nowhere"], ["status", "nowhere"], ["plot", "nowhere"],
        ["presets", "show", "vits15"],
        ["nonsense"], ["train", "--nonsense"],
    ]  # fmt: skip
    return {
        "presets list": listed.splitlines(),
        "shown": {words[2]: out.splitlines() for words, (_, out, _) in zip(shown, session.run(*shown), strict=True)},
        "refused": {
            " ".join(word for word in words if word not in SMALL): {"code": code, "says": (out + err).splitlines()}
            for words, (code, out, err) in zip(wrong, session.run(*wrong, fails=True), strict=True)
        },
    }


def demo(session: Session) -> Record:
    """The demo cut small: training with k-NN on the way, three evaluations, features, two exports, pictures."""
    results = session.run(
        session.train("demo", "--preset", "demo", *DEMO),
        ["info", "demo", "--json"],
        ["eval", "knn", "demo", *EVALUATION],
        ["eval", "logreg", "demo", *EVALUATION],
        ["embed", "demo", "--data", "images", "--output", "features.safetensors", "--device", "cpu", "--num-workers",
         "0", "--json"],
        ["export", "demo", "--format", "safetensors", "--output", "demo.safetensors", "--json"],
        ["export", "demo", "--format", "official", "--output", "demo.pth", "--json"],
        ["pca-image", *PICTURES, "sheet.png", "--model", "demo", "--device", "cpu", "--resolution", "6"],
    )  # fmt: skip
    return {
        "run": run_record(session.folder / "demo"),
        "info": said(results[1]),
        "knn": said(results[2]),
        "logreg": said(results[3]),
        "features": {"says": said(results[4])} | tensors_record(session.folder / "features.safetensors"),
        "safetensors": {"says": said(results[5])} | tensors_record(session.folder / "demo.safetensors"),
        "official": {"says": said(results[6])} | tensors_record(session.folder / "demo.pth"),
        "pca-image": picture_record(session.folder / "sheet.png"),
    }


def variant(session: Session) -> Record:
    """Separate heads, Sinkhorn-Knopp, SwiGLU, registers, device_augment, loss weights; then resumed at 15."""
    session.run(session.small("variant", *VARIANT))
    whole = run_record(session.folder / "variant")
    interrupt_at_15(session.folder / "variant", session.folder / "resumed")
    session.run(
        session.small("resumed", *VARIANT),
        ["attention", *PICTURES, "maps.png", "--model", "resumed", "--device", "cpu", "--resolution", "5"],
    )
    return {
        "run": whole,
        "resumed": run_record(session.folder / "resumed"),
        "attention": picture_record(session.folder / "maps.png"),
    }


def accumulation(session: Session) -> Record:
    """Gradient accumulation, centering, a loader process, activation checkpointing."""
    words = ["train.gradient_accumulation=2", "train.num_workers=1", "train.activation_checkpointing=true"]
    session.run(session.small("accumulation", *words))
    return {"run": run_record(session.folder / "accumulation")}


def processes(session: Session) -> Record:
    """Two processes on this machine, DDP and FSDP."""
    session.run(*(session.small(kind, "--gpus", "2", f"train.sharding={kind}") for kind in ("ddp", "fsdp")))
    return {kind: run_record(session.folder / kind) for kind in ("ddp", "fsdp")}


def linear(session: Session) -> Record:
    """Linear probe of the demo, on random crops, and k-NN and regression with settings other than the defaults."""
    words = ["--epochs", "2", "--epoch-length", "10", "--batch-size", "16", "--eval-period-iterations", "10"]
    rates = ["--learning-rates", "0.001", "0.1"]
    results = session.run(
        session.train("demo", "--preset", "demo", *DEMO, "optim.epochs=1"),
        ["eval", "linear", "demo", *EVALUATION, *words, *rates],
        ["eval", "linear", "demo", *EVALUATION, *words, "--frozen-crops", "--output-dir", "frozen"],
        ["eval", "knn", "demo", *EVALUATION, "--nb-knn", "5", "20", "--n-per-class-list", "4", "-1", "--n-tries", "2"],
        ["eval", "logreg", "demo", *EVALUATION, "--finetune-on-val", "--metric-type", "mean_per_class_accuracy"],
        ["results", "demo", "--json"],
    )
    names = ["linear", "frozen crops", "knn", "logreg", "results"]
    return {name: said(result) for name, result in zip(names, results[1:], strict=True)}


def exports(session: Session) -> Record:
    """The formats of other libraries: hf, timm, onnx, torch-export."""
    folder = session.folder
    forms = {"hf": "hf", "timm": "timm.safetensors", "onnx": "model.onnx", "torch-export": "model.pt2"}
    _, *results = session.run(
        session.small("variant", *VARIANT, "optim.epochs=1"),
        *(["export", "variant", "--format", form, "--output", path, "--json"] for form, path in forms.items()),
    )
    record: Record = {form: {"says": said(result)} for form, result in zip(forms, results, strict=True)}
    record["hf"] |= {"files": {path.name: file_record(path) for path in sorted((folder / "hf").iterdir())}}
    record["timm"] |= tensors_record(folder / "timm.safetensors")
    record["onnx"] |= onnx_record(folder / "model.onnx")
    record["torch-export"] |= program_record(folder / "model.pt2")
    return record


def video(session: Session) -> Record:
    """20 frames of pca-video as pictures and as a film; a picture on its own; the plot."""
    session.run(
        session.small("small", "optim.epochs=1"),
        ["pca-video", "clip", "frames", "--model", "small", "--device", "cpu", "--resolution", "6", "--format", "png"],
        ["pca-video", "clip", "film.mp4", "--model", "small", "--device", "cpu", "--resolution", "6", "--layout",
         "side-by-side"],
        ["pca-image", "clip/frame00.png", "one.png", "--model", "small", "--device", "cpu", "--layout", "overlay",
         "--foreground", "none", "--upsampling", "nearest"],
    )  # fmt: skip
    frames = sorted((session.folder / "frames").iterdir())
    return {
        "frames": {path.name: picture_record(path) for path in frames},
        "film": film_record(session.folder / "film.mp4"),
        "overlay": picture_record(session.folder / "one.png"),
    }


PARTS: dict[str, Callable[[Session], Record]] = {
    "commands": commands, "help": help_texts, "texts": texts, "demo": demo, "variant": variant,
    "accumulation": accumulation, "processes": processes, "linear": linear, "exports": exports, "video": video,
}  # fmt: skip


class Generated(NamedTuple):
    """Pixels made of integer arithmetic alone, the same on every machine."""

    base: np.ndarray
    noise: np.ndarray

    @staticmethod
    def of(seed: int, size: int) -> "Generated":
        rng = np.random.default_rng(seed)
        base = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((size // 4, size // 4, 1), int))
        return Generated(base, rng.integers(-30, 31, base.shape))

    def picture(self, base: np.ndarray | None = None) -> Image.Image:
        return Image.fromarray(np.clip((self.base if base is None else base) + self.noise, 0, 255).astype(np.uint8))


def write_images(folder: Path) -> None:
    """Two classes of five PNG files and one JPEG file."""
    for label in range(2):
        (folder / f"class{label}").mkdir(parents=True)
        base = Generated.of(label, 48).base
        for number in range(6):
            suffix = "jpg" if number == 5 else "png"
            Generated.of(10 * label + number + 5, 48).picture(base).save(folder / f"class{label}/{number}.{suffix}")


def write_clip(folder: Path) -> None:
    """20 frames of a pattern that moves over another."""
    folder.mkdir()
    ground, sprite = Generated.of(100, 64), Generated.of(101, 24)
    for number in range(20):
        base = ground.base.copy()
        base[20:44, 2 * number : 2 * number + 24] = sprite.base
        Generated(base, Generated.of(200 + number, 64).noise // 4).picture().save(folder / f"frame{number:02}.png")


def interrupt_at_15(run: Path, copy: Path) -> None:
    """A copy of a finished run as it would be if the machine had gone down after 20 of its 30 iterations."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "iteration_00000030")
    shutil.rmtree(copy / "eval" / "training_29")
    metrics = copy / "training_metrics.json"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:20]))


def run_record(run: Path) -> Record:
    """Config, all logged numbers but the times, and the tensors of the last teacher."""
    lines = [json.loads(line) for line in (run / "training_metrics.json").read_text().splitlines()]
    teachers = sorted(run.glob("eval/training_*/teacher_checkpoint.pth"), key=lambda path: int(path.parts[-2][9:]))
    return {
        "files": sorted({str(path.relative_to(run)) for path in run.rglob("*") if not path.name.startswith(".")}),
        "config": (run / "config.yaml").read_text().replace(f"{run.parent.resolve()}/", "").splitlines(),
        "metrics": [without_times(line) for line in lines],
        "teacher": tensors_record(teachers[-1]),
    }


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in TIMES}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def said(result: tuple[int, str, str]) -> Any:
    """The JSON object on standard output."""
    return without_times(json.loads(result[1]))


def tensors_record(path: Path) -> Record:
    """Every tensor of a .pth or .safetensors file.

    The digest of the file is that of a .pth file only: safetensors writes its metadata in any order.
    """
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = dict(sorted((file.metadata() or {}).items()))
            return {
                "metadata": without_times(metadata),
                "tensors": {key: nested(file.get_tensor(key)) for key in file.keys()},  # noqa: SIM118
            }
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    return {"bits": digest(path.read_bytes()), "tensors": nested(content)}


def nested(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): nested(value) for key, value in content.items()}
    if hasattr(content, "detach"):
        return array_record(content.detach().numpy())
    return [nested(each) for each in content] if isinstance(content, list | tuple) else content


def array_record(array: np.ndarray) -> Record:
    """Shape, type, digest of the bits, and of floats numbers that can be compared within bounds."""
    record: Record = {"shape": list(array.shape), "dtype": str(array.dtype)}
    if array.dtype.kind != "f" or not array.size:
        return record | {"values": digest(array.tobytes())}
    wide = array.astype(np.float64).ravel()
    some = wide[:: max(1, wide.size // 3)][:3]
    norm, mean = float(np.sqrt(np.square(wide).sum())), float(wide.mean())
    return record | {"bits": digest(array.tobytes()), "norm": norm, "mean": mean, "some": some.tolist()}


def portable(record: Any) -> Any:
    """A record without digests of bits that depend on the processor, numbers rounded: what is committed."""
    if isinstance(record, dict):
        return {key: portable(value) for key, value in record.items() if key not in ("bits", "dino2.weights")}
    if isinstance(record, list):
        return [portable(each) for each in record]
    return float(f"{record:.7g}") if isinstance(record, float) else record


def as_text(value: Any, indent: str = "") -> str:
    """JSON in which what holds no list or object stands on one line."""
    if not isinstance(value, dict | list) or not any(isinstance(each, dict | list) for each in _entries(value)):
        return json.dumps(value)
    lines = [as_text(each, indent + " ") for each in _entries(value)]
    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}: {line}" for key, line in zip(value, lines, strict=True)]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n" + ",\n".join(f"{indent} {line}" for line in lines) + f"\n{indent}{closing}"


def _entries(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value)


def file_record(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return tensors_record(path)
    return json.loads(path.read_text()) if path.suffix == ".json" else digest(path.read_bytes())


def picture_record(picture: Path | np.ndarray) -> Record:
    """Size, digest of the pixels, and the mean colours of 4 x 6 fields."""
    pixels = np.asarray(Image.open(picture).convert("RGB")) if isinstance(picture, Path) else picture
    rows = [np.array_split(row, 6, axis=1) for row in np.array_split(pixels, 4, axis=0)]
    means = [[[round(float(mean), 3) for mean in field.mean((0, 1))] for field in row] for row in rows]
    return {"shape": list(pixels.shape), "bits": digest(pixels.tobytes()), "fields": means}


def film_record(path: Path) -> list[Record]:
    import av

    with av.open(str(path)) as film:
        return [picture_record(frame.to_ndarray(format="rgb24")) for frame in film.decode(video=0)]


def onnx_record(path: Path) -> Record:
    import onnx

    graph = onnx.load(str(path)).graph
    operators: dict[str, int] = {}
    for node in graph.node:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    initializers = {each.name: array_record(onnx.numpy_helper.to_array(each)) for each in graph.initializer}
    return {
        "inputs": [each.name for each in graph.input],
        "outputs": [each.name for each in graph.output],
        "operators": dict(sorted(operators.items())),
        "tensors": initializers,
        "answers": _onnx_answers(path),
    }


def _onnx_answers(path: Path) -> Record:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    answers = session.run(None, {session.get_inputs()[0].name: fixed_image()})
    return {each.name: array_record(answer) for each, answer in zip(session.get_outputs(), answers, strict=True)}


def program_record(path: Path) -> Record:
    import torch

    program = torch.export.load(str(path))
    with torch.inference_mode():
        answers = program.module()(torch.from_numpy(fixed_image()))
    return {
        "tensors": nested(dict(program.state_dict)),
        "graph": [str(node.target) for node in program.graph.nodes],
        "answers": nested(answers),
    }


def fixed_image() -> np.ndarray:
    """[1, 3, 32, 32], float32."""
    return (Generated.of(7, 32).base.transpose(2, 0, 1)[None] / 128 - 1).astype(np.float32)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def record(parts: list[str], out: Path, checkout: Path, rounded: bool = False) -> None:
    """Write OUT/PART.json for each part; `rounded`: as it is committed, see `portable`."""
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="dino2-identity-") as folder:
            content = PARTS[part](Session(Path(folder), checkout))
        (out / f"{part}.json").write_text(as_text(portable(content) if rounded else content) + "\n")
        print(f"{part}: {time.monotonic() - start:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[2], help="the code to run")
    parser.add_argument("--rounded", action="store_true", help="as committed: what other processors can be held to")
    arguments = parser.parse_args()
    record(arguments.parts, arguments.out.resolve(), arguments.checkout.resolve(), arguments.rounded)


if __name__ == "__main__":
    main()
