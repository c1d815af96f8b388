"""Wrong command lines: each ends in one message with all that is wrong, exit code 2, nothing written or downloaded."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from tiny_run import TINY, write_images

from dinov2cli.cli.main import main
from dinov2cli.models.load.released import BACKBONES

PAGE = (Path(__file__).parents[1] / "docs/troubleshooting.md").read_text()
SECONDS = 20  # the first to import torch takes the longest
TINY_RUN = "train --cpu --data imgs --output-dir run " + " ".join(TINY)

LINES: list[tuple[str, list[str]]] = [
    # commands and options
    ("trian --preset demo", ["trian: no such command; did you mean train?"]),
    ("eval knm x", ["knm: no such command; did you mean knn?"]),
    ("stats imgs", ["stats: no such command; did you mean datasets stats?", "dino2 --help shows them"]),
    ("help train", ["help: no such command; did you mean --help?"]),
    ("--verbose train", ["--verbose: no such option; those of a command stand behind it: dino2 COMMAND --verbose"]),
    ("train --presett demo", ["--presett: no such option; did you mean --preset?", "dino2 train --help shows"]),
    ("train -preset demo", ["-preset: no such option; did you mean --preset?"]),
    ("train --preset demo --output=run", ["--output: no such option; did you mean --output-dir?"]),
    ("train --preset demo --epochs 10", ["--epochs: no such option; did you mean optim.epochs=10?"]),
    ("train --preset demo --batch-size=8", ["did you mean train.batch_size_per_gpu=8?"]),
    ("eval knn dinov2_vits14 --nb-kn 10", ["--nb-kn: no such option; did you mean --nb-knn?"]),
    ("train --preset demo --gpus x", ["--gpus x: must be a whole number, at least 1"]),
    ("train --preset demo --gpus 0", ["--gpus 0: must be a whole number, at least 1"]),
    ("export dinov2_vits14 --format hff", ["1. --output is missing", "2. --format hff: must be one of safetensors"]),
    ("embed dinov2_vits14 --data --output x.npy", ["--data: its value is missing; it takes DATASET"]),
    ("status", ["RUN is missing", "dino2 status --help shows what it takes"]),
    ("results run --csv=x", ["--csv=x: --csv takes no value"]),
    ("export dinov2_vits14 --format onnx --output x.onnx --image-size 2a", ["--image-size 2a", "224x448"]),
    ("eval logreg", ["No checkpoint given", "dino2 eval logreg CKPT"]),
    ("eval linear dinov2_vits14 --head-layers 3", ["--head-layers 3 is unknown; known: 1, 4"]),
    ("eval knn dinov2_vits14 imgs", ["'imgs' is no change of the configuration", "a.b=value"]),
    ("eval knn dinov2_vits14 --temperature inf", ["--temperature inf: must be a number, at least 0.0001"]),
    ("eval linear dinov2_vits14 --learning-rates 0", ["--learning-rates 0: must be a number, above 0"]),
    ("eval logreg dinov2_vits14 --finetune-dataset imgs --finetune-on-val", ["exclude each other"]),
    ("embed dinov2_vits14 --data imgs --output ''", ["--output: its value is missing; it takes FEATURES"]),
    ("embed dinov2_vits14 --data imgs --output x.npy --background blue", ["--background 'blue': must be mean, drop"]),
    ("pca-image imgs/class0/0.png imgs/class1/0.png", ["imgs/class1/0.png: is there, and dino2 has not drawn it"]),
    # configuration
    ("train --preset demoo --output-dir run --data imgs", ["no preset named 'demoo'. Did you mean demo?"]),
    ("train --config-file no.yaml --output-dir run --data imgs", ["no.yaml: no such config file"]),
    ("train --preset demo --config-file no.yaml", ["--preset and --config-file are both given"]),
    (f"{TINY_RUN} optim.epoch=3", ["optim.epoch=3: no such key; did you mean optim.epochs?"]),
    (f"{TINY_RUN} optim.base_lr=fast", ["optim.base_lr=fast: must be a number, above 0"]),
    (f"{TINY_RUN} base_lr", ["override 'base_lr': must have the form group.key=value"]),
    (f"{TINY_RUN} crops.global_crops_size=50", ["crops.global_crops_size=50: must be a multiple", "48 or 56"]),
    (f"{TINY_RUN} optim.warmup_epochs=9 crops.local_crops_size=15",
     ["crops.local_crops_size=15: must be a multiple", "optim.warmup_epochs=9: the warm-up must not be longer"]),
    # data
    ("train --cpu --preset demo --output-dir run --data photos", ["'photos' is neither a folder nor a known dataset"]),
    ("train --cpu --preset demo --output-dir run --data ImagNet:split=TRAIN", ["did you mean ImageNet?"]),
    ("train --cpu --preset demo --output-dir run --data ImageNet:split=TRIAN:root=imgs",
     ["ImageNet has no split 'TRIAN'; it has TRAIN, VAL and TEST"]),
    ("train --cpu --preset demo --output-dir run --data ImageNet:split=TRAIN:root=/gone", ["there is no /gone"]),
    ("train --cpu --preset demo --output-dir run --data Folder:rot=imgs", ["Folder has no key 'rot'; it has root"]),
    ("train --cpu --preset demo --output-dir run --data '0*SamplePhotos'", ["weights are above 0"]),
    ("train --cpu --preset demo --output-dir run evaluation.knn_train_dataset=/gone",
     ["'/gone' is neither a folder nor a known dataset"]),
    ("train --cpu --preset demo --output-dir run --data sets", ["sets", "parts of a dataset rather than classes"]),
    ("train --preset vitl14 --nodes 2", ["ImageNet22k needs root=", "dino2 prepare-imagenet --variant 22k"]),
    ("train --cpu --preset demo --output-dir run --data ImageNet:split=VAL", ["dino2 prepare-imagenet --root ROOT"]),
    ("datasets remove photos", ["no dataset is known as photos"]),
    ("datasets add photos /gone", ["'/gone' is neither a folder nor a known dataset"]),
    ("prepare-imagenet --root imgs", ["imgs"]),
    ("eval knn dinov2_vits14 --train-dataset imgs", ["--val-dataset missing"]),
    # model
    ("train --cpu --preset demo --output-dir run --init-from no.pth", ["'no.pth' is neither a file or folder"]),
    ("train --cpu --preset demo --output-dir run --init-from dinov3_vits16", ["'dinov3_vits16' is not downloaded"]),
    ("eval knn imgs --train-dataset imgs --val-dataset imgs", ["imgs: no weights in this folder"]),
    ("eval linear dinov2_vits14 --head no.pth --val-dataset imgs", ["--head no.pth: no such file"]),
    ("export dinov2_vits14 --format onnx --output x.onnx --linear-head no.pth", ["--linear-head no.pth: no such file"]),
    ("info dinov2_vitx14", ["'dinov2_vitx14' is neither a file or folder nor a released name", "dinov2_vits14"]),
    # folders and outputs
    ("train --cpu --preset demo --output-dir file/run", ["--output-dir file/run:", "file is a file, not a folder"]),
    ("embed dinov2_vits14 --data imgs --output no/x.safetensors", ["no/x.safetensors: the folder", "does not exist"]),
    ("export dinov2_vits14 --format onnx --output x.pth", ["x.pth: format onnx writes a file that ends in .onnx"]),
    ("train --cpu --preset demo --data imgs --output-dir imgs", ["--output-dir imgs: is the folder of the images"]),
    # devices and memory
    ("train --preset demo --output-dir file/run --device cuda",
     ["2 things are wrong", "1. --output-dir file/run", "2. --device cuda: this machine has no GPU"]),
    ("eval linear dinov2_vits14 --train-dataset sets --val-dataset file", ["parts of a dataset", "2. file is a file"]),
    ("eval knn dinov2_vits14 --train-dataset imgs --val-dataset imgs --device tpu", ["--device tpu: unknown"]),
    ("embed dinov2_vits14 --data imgs --output x.safetensors --device mps", ["--device mps: dino2 runs on CPUs and"]),
    ("pca-image imgs/class0/0.png out.png --device cuda:64", ["--device cuda:64: this machine has"]),
    (f"{TINY_RUN} train.batch_size_per_gpu=16777216",
     ["GB are there", "This would fit: train.batch_size_per_gpu=", "train.gradient_accumulation="]),
    # Slurm
    (f"{TINY_RUN} --nodes 12 optim.epoch=3", ["2 things are wrong", "2. --nodes 12: partition gpu has 2 machines"]),
    (f"{TINY_RUN} --nodes 2 --partition gpuu", ["--partition gpuu: Slurm has no partition gpuu; did you mean gpu?"]),
    (f"{TINY_RUN} --nodes 2 --slurm foo=bar --slurm array= --mem plenty",
     ["3 things", "sbatch has no parameter foo", "--slurm array=: the jobs of an array", "--mem plenty: give memory"]),
    (f"{TINY_RUN} --nodes 2 --dry-run --slurm reservatoin=x", ["reservatoin; did you mean reservation?"]),
    ("eval knn dinov2_vits14 --train-dataset imgs --val-dataset imgs --nodes 1 --slurm output=x",
     ["--slurm output=x: dino2 sets output itself"]),
    # several at once, in the order in which to mend them
    ("train --preset vitl14 --nodes 12 --partition gpuu --data /gone --output-dir file/run optim.epoch=3",
     ["4 things are wrong", "1. optim.epoch=3", "2. '/gone' is neither", "3. --output-dir file/run", "4. --partition"]),
    ("eval knn nowhere --train-dataset /gone --val-dataset /lost --output-dir file/x --device foo",
     ["5 things are wrong", "1. '/gone' is", "2. '/lost' is", "3. 'nowhere' is", "4. --output-dir", "5. --device foo"]),
    ("embed nowhere --data /gone --output x.txt --device foo",
     ["4 things are wrong", "1. '/gone' is", "2. 'nowhere' is", "3. x.txt: features are written", "4. --device foo"]),
    ("export nowhere --format onnx --output x.pth --linear-head no.pth",
     ["3 things are wrong", "1. 'nowhere' is", "2. --linear-head no.pth: no such file", "3. x.pth: format onnx"]),
]  # fmt: skip


class Server(ThreadingHTTPServer):
    """Where released weights would come from; remembers who asks."""

    def __init__(self) -> None:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def parse_request(self) -> bool:
                asked.append(str(self.raw_requestline))
                return super().parse_request()

        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = asked


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def place(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with images, a file, and a Slurm that knows the partitions gpu and cpu."""
    write_images(tmp_path / "imgs", per_class=1)
    (tmp_path / "file").write_text("no folder")
    for split in ("train", "val"):
        write_images(tmp_path / "sets" / split, per_class=1)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in {"sinfo": "echo 'gpu*|2'; echo 'cpu|1'", "sbatch": "touch submitted; exit 1"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for name in ("DINO2_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "DINO2_CACHE": str(tmp_path / "cache"), "DINO2_WEIGHTS_URL": f"http://127.0.0.1:{server.server_port}",
        "PATH": f"{programs}:{os.environ['PATH']}", "COLUMNS": "200", "HOME": str(tmp_path),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    yield tmp_path


def entry(line: str, shown: str, place: Path) -> str:
    """How a line and its answer stand in docs/troubleshooting.md: without what is another on every machine."""
    line = line.replace(" ".join(TINY), "...").replace("train --cpu --preset demo --output-dir run", "train ...")
    text = shown.replace(", ".join(BACKBONES), f"{BACKBONES[0]}, ...").replace(f"{place}/", "").removeprefix("error: ")
    text = re.sub(r"^[╭╰].*\n|^Usage: .*\n|^Try .*\n|^│ | *│$", "", text, flags=re.MULTILINE)
    text = re.sub(r"(Known datasets: a folder|Presets: \w+), .*", r"\1, ...", text)
    text = re.sub(r"\d[\d.]*", "N", text) if "GB are there" in text else text
    return "".join(f"{text}\n" for text in (line, *(f"    {each}".rstrip() for each in text.strip().splitlines())))


def check(shown: str, words: list[str]) -> None:
    text = " ".join(shown.replace("│", " ").split())
    for expected in words:
        assert expected in text, text
    assert "Traceback" not in text


@pytest.mark.parametrize(("line", "words"), LINES, ids=[line[:60] for line, _ in LINES])
def test_one_message_and_nothing_done(
    line: str, words: list[str], place: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    before, began = sorted(place.rglob("*")), time.monotonic()
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line))
    assert stop.value.code == 2
    shown = capsys.readouterr()
    check(shown.err, words)
    assert not shown.out
    assert time.monotonic() - began < SECONDS
    assert sorted(place.rglob("*")) == before, "something was written"
    assert not server.asked, "something was downloaded"
    if into := os.environ.get("DINO2_WRITE_WRONG_LINES"):  # a file, from which the page's block is copied
        with open(into, "a") as file:
            file.write(entry(line, shown.err, place))
    else:
        assert entry(line, shown.err, place) in PAGE


@pytest.mark.parametrize("number", [0, 13, len(LINES) - 4])
def test_as_a_process(number: int, place: Path, server: Server) -> None:
    line, words = LINES[number]
    before = sorted(place.rglob("*"))
    ended = subprocess.run([sys.executable, "-m", "dinov2cli", *shlex.split(line)], capture_output=True, text=True)
    assert ended.returncode == 2 and not ended.stdout
    check(ended.stderr, words)
    assert sorted(place.rglob("*")) == before and not server.asked


def test_there_are_forty() -> None:
    assert len({line for line, _ in LINES}) >= 40
