"""`dino2 bench train --rehearse`: a step on fake CUDA tensors never waits, and what makes it wait is found."""

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import ready
import torch
from test_bench_train import ready_context, ready_processes  # noqa: F401  (a fixture)
from tiny_run import LIBRARY, TINY
from torch import Tensor

from dinov2cli.bench import rehearse as rehearsal
from dinov2cli.bench.fake_compiler import pretend_compiler
from dinov2cli.bench.fake_gpu import Ledger, pretend
from dinov2cli.bench.rehearse import CARDS, GPU, Rehearsal, counted, fake_mode, graph_breaks, rehearse, short_form
from dinov2cli.config import Config, load_config
from dinov2cli.device import Arriving
from dinov2cli.errors import EnvironmentProblem
from dinov2cli.eval.extract import Extractor
from dinov2cli.losses.cross_entropy import soft_cross_entropy
from dinov2cli.losses.koleo import KoLeoTerm
from dinov2cli.models import attention
from dinov2cli.models.attention import TokenLayout
from dinov2cli.models.layers import Block
from dinov2cli.models.stochastic_depth import draw_for_branches
from dinov2cli.requests.bench import BenchTrainRequest
from dinov2cli.train.cost import estimate, step_flops
from dinov2cli.train.networks import build_backbone
from dinov2cli.train.objective import SSLMetaArch

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or shutil.which("c++") or shutil.which("g++")),
    reason="without a GPU, a compiler makes up for what PyTorch lacks",
)
VARIANTS = {
    "stochastic depth": [],
    "whole": ["student.drop_path_rate=0"],
    "two heads, Sinkhorn, SwiGLU": [
        "ibot.separate_head=true", "train.centering=sinkhorn_knopp", "student.ffn_layer=swiglufused",
        "train.activation_checkpointing=true",
    ],
    "colours on the device": ["data.device_augment=true"],
    "accumulated, recomputed": ["train.gradient_accumulation=2", "train.activation_checkpointing=selective"],
}  # fmt: skip


def tiny(*overrides: str) -> Config:
    """Not compiled unless they say so: that takes most of a rehearsal's time."""
    return load_config(overrides=[*TINY, "train.compile=false", *overrides])


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """Another process: what a rehearsal changes stays changed."""
    with ProcessPoolExecutor(1, ready_context()) as pool:
        yield pool


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_in_a_step_waits_for_the_gpu(process: ProcessPoolExecutor, variant: str) -> None:
    """From the batch in page-locked memory to the losses on their way back."""
    config = tiny(*VARIANTS[variant])
    found: Rehearsal = process.submit(rehearse, config, "h100").result()
    assert found.precision == "bf16"
    assert found.waits == {} and found.blocking_copies == {}
    assert 300 < found.operators < 3000 and found.other_gb > 0
    images = config.train.batch_size_per_gpu * config.train.gradient_accumulation
    assert found.images_per_s == pytest.approx(images / (found.matrix_ms + found.other_ms) * 1e3)


@pytest.mark.parametrize(("recomputed", "again"), [("false", 0), ("selective", 0), ("true", 0.17)])
def test_memory_and_flops_agree_with_those_of_the_meta_device(
    process: ProcessPoolExecutor, recomputed: str, again: float
) -> None:
    config = tiny("train.batch_size_per_gpu=32", "student.drop_path_uniform=true",
                  f"train.activation_checkpointing={recomputed}")  # fmt: skip
    found: Rehearsal = process.submit(rehearse, config, "l4").result()
    expected = estimate(config, world_size=1, sharding="none", precision="bf16")
    assert found.memory_gb == pytest.approx(expected.total - expected.workspace, rel=0.1)
    assert found.waits == {} and found.blocking_copies == {}
    assert found.tflop == pytest.approx((1 + again) * step_flops(config).step / 1e12, rel=0.03)
    assert found.fits and found.card == "l4"


@pytest.mark.usefixtures("ready_processes")
def test_offsets_of_sequences_are_on_the_gpu_once_for_all_blocks() -> None:
    found = counted(rehearse, tiny(), "h100", 1, _attend_by_varlen)
    assert found.waits == {} and found.blocking_copies == {}
    found = counted(rehearse, tiny(), "h100", 1, _make_offsets_in_each_block)
    assert sum(found.blocking_copies.values()) > 0 and all("attention" in place for place in found.blocking_copies)


def _attend_by_varlen() -> None:
    setattr(rehearsal, "SSLMetaArch", lambda config, backend: SSLMetaArch(config, "varlen"))  # noqa: B010


def _make_offsets_in_each_block() -> None:
    _attend_by_varlen()
    setattr(TokenLayout, "prepared", lambda self, backend, device: self)  # noqa: B010
    made_once = attention._cumulative_lengths
    setattr(attention, "_cumulative_lengths", made_once.__wrapped__)  # noqa: B010  (as torch.compile sees it)


@pytest.mark.usefixtures("ready_processes")
def test_several_gpus_share_the_parameters_and_wait_for_nothing(tmp_path: Path) -> None:
    config = tiny("train.sharding=fsdp", "student.drop_path_uniform=true", "train.batch_size_per_gpu=16")
    one = counted(rehearse, config, "l4")
    four = counted(rehearse, config, "l4", 4, partial(_note_gathers, tmp_path / "order"))
    # What is around the blocks, and both of these before the first one begins; then the head. Two networks, two steps.
    assert config.arch().depth == 2 and (tmp_path / "order").read_text() == 4 * "gggbg"
    assert four.waits == {} and four.blocking_copies == {} and four.gpus == 4
    assert four.tflop == pytest.approx(one.tflop, rel=0.01)  # each has a batch of its own
    expected = estimate(config, world_size=4, sharding="fsdp", precision="bf16")
    assert four.memory_gb == pytest.approx(expected.total - expected.workspace, rel=0.15)
    # Student and teacher are gathered in half precision, once each, and the student's gradients are scattered.
    numbers = sum(parameter.numel() for parameter in SSLMetaArch(config).networks.student.parameters())
    assert one.communicated_gb == 0 and 2 * numbers * 3 < four.communicated_gb * 1e9 < 4 * numbers * 3

    done = ready.dino2("bench", "train", *TINY, "train.sharding=ddp", "--rehearse", "--gpus", "2")
    assert done.returncode == 2 and "train.sharding=fsdp" in done.stderr
    done = ready.dino2("bench", "train", *TINY, "--gpus", "2")
    assert done.returncode == 2 and "--gpus 2 goes with --rehearse" in done.stderr


def _note_gathers(file: Path) -> None:
    """Leave a g there for every gathering of parameters, and a b for every whole block that begins."""

    def count(self: Ledger, func: Any, *rest: Any) -> None:
        if "allgather" in func._schema.name:
            _append(file, "g")
        plain_count(self, func, *rest)

    def branch(self: Block, *inputs: Any) -> Tensor:
        _append(file, "b")
        return plain_branch(self, *inputs)

    plain_count, plain_branch = Ledger._count, Block.attention_branch
    Ledger._count = count  # type: ignore[method-assign]
    Block.attention_branch = branch  # type: ignore[method-assign]


def _append(file: Path, letter: str) -> None:
    with file.open("a") as notes:
        notes.write(letter)


@pytest.mark.usefixtures("ready_processes")
def test_each_place_that_waits_is_named() -> None:
    found = counted(rehearse, tiny(), "h100", 1, _let_the_step_wait)
    assert any(place.startswith("_local_scalar_dense in ") for place in found.waits)
    assert any(place.startswith("nonzero in ") for place in found.waits)
    assert any(place.startswith("index in ") for place in found.waits)
    assert sum(found.waits.values()) == 3
    assert sum(found.blocking_copies.values()) == 3  # `.cpu()`, from pageable memory, an index in main memory
    assert all("train/objective.py:" in place for place in (*found.waits, *found.blocking_copies))


def _let_the_step_wait() -> None:
    def forward(self: KoLeoTerm, *inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value, parts = plain(self, *inputs)
        value.item()
        many = value.detach().expand(4)
        many.nonzero()
        many[many > 0]
        many.cpu()
        torch.zeros(3).to(many.device, non_blocking=True)
        many[torch.zeros(2, dtype=torch.int64)]
        return value, parts

    plain = KoLeoTerm.forward
    KoLeoTerm.forward = forward  # type: ignore[method-assign]


@pytest.mark.usefixtures("ready_processes")
def test_features_and_numbers_are_read_behind_their_own_work_alone() -> None:
    """A batch's features are copied in the background, and fetched while the next batch is at work."""
    waits, copies, operators = counted(_features_of_one_batch_read_during_the_next)
    assert copies == {} and operators == 0  # what is queued only at reading would wait for the next batch
    assert list(waits.values()) == [1] and next(iter(waits)).startswith("Event.synchronize in ")


def _features_of_one_batch_read_during_the_next() -> tuple[dict[str, int], dict[str, int], int]:
    pretend()
    ledger = Ledger(1.0, 1.0)
    with fake_mode(), ledger:
        with GPU:
            backbone = build_backbone(tiny(), "sdpa").eval()
        backbone.to = lambda device: backbone  # type: ignore[method-assign,assignment]  (fakes stay where they are)
        extract = Extractor(backbone, device="cpu", detailed=True, precision="fp32")
        extract.device = GPU
        batches = [torch.rand(2, 3, 32, 32).pin_memory() for _ in range(2)]
        ledger.begin()
        features, _ = [Arriving(extract.features_of(images)) for images in batches]
        queued = ledger.operators
        assert all(not tensor.is_cuda for tensor in features.read().values())
    return dict(ledger.waits), dict(ledger.copies), ledger.operators - queued


@pytest.mark.usefixtures("ready_processes")
def test_what_stochastic_depth_and_the_loss_move() -> None:
    """Each array in its own precision, once for each of these: no copy in another precision, no separate sum."""
    tokens, kept, width = 4 * 5, 2 * 5, 64
    whole, part = tokens * width, kept * width  # numbers in the stream, and in the sequences that are kept
    indices, scales = 8 * (3 * kept + 2 * tokens), 4 * (2 * kept + 2 * tokens)
    forward = 2 * 4 * part + 2 * 2 * whole + (4 + 2 + 4) * whole  # two gathers, a product that is added
    backward = 2 * 4 * part + (4 + 2) * part + 2 * 4 * whole + 3 * 4 * whole
    of_depth, of_loss = counted(_bytes_of_depth_and_loss)
    assert of_depth == pytest.approx(forward + backward + indices + scales, rel=0.02)
    scores = 8 * 512
    # Scaled to float32; its logarithm of the sum; times the targets, and their sum. Backward: scaled, less, exp, times,
    # less the targets. bfloat16 scores are read twice, and written once as gradients.
    assert of_loss == pytest.approx((6 + 4 + 12 + 4 + 4) * scores + (6 + 8 + 8 + 8 + 10) * scores, rel=0.02)


def _bytes_of_depth_and_loss() -> tuple[int, int]:
    pretend()
    ledger = Ledger(1.0, 1.0)
    with fake_mode(), ledger, GPU:
        (drawn,) = draw_for_branches(1, TokenLayout(((4, 5),)), 0.5, torch.Generator(), GPU)
        stream = torch.empty(20, 64, requires_grad=True)
        ledger.begin()
        with torch.autocast("cuda", torch.bfloat16):
            rest, chosen = drawn.select(stream)
            drawn.add(rest, chosen.bfloat16()).backward(torch.empty(20, 64))
        casts = ledger.bytes.pop("_to_copy")  # of the branch itself: there and back
        assert casts <= 2 * 6 * 10 * 64 + 200
        of_depth = sum(ledger.bytes.values())
        scores, targets = torch.empty(8, 512, dtype=torch.bfloat16, requires_grad=True), torch.empty(8, 512)
        ledger.begin()
        soft_cross_entropy(scores, targets, 0.1).backward(torch.empty(8))
        return of_depth, sum(ledger.bytes.values())


@pytest.mark.long
@pytest.mark.usefixtures("ready_processes")
def test_a_compiled_step_is_that_of_the_kernels_that_inductor_decides_on() -> None:
    """The same matrix products; all else in fewer kernels that move less, and no other wait."""
    size = ["train.batch_size_per_gpu=64", "student.drop_path_rate=0.3", "student.drop_path_uniform=true"]
    plain, compiled = (counted(rehearse, tiny(*size, f"train.compile={word}"), "h100") for word in ("false", "true"))
    assert compiled.compiled and not plain.compiled
    assert compiled.waits == {} and compiled.blocking_copies == {}
    assert compiled.tflop == pytest.approx(plain.tflop, rel=1e-3)
    assert compiled.other_gb < 0.85 * plain.other_gb and compiled.operators < 0.85 * plain.operators
    assert 0.8 * plain.memory_gb < compiled.memory_gb < 1.02 * plain.memory_gb


@pytest.mark.usefixtures("ready_processes")
def test_what_is_fused_is_read_once_and_written_once() -> None:
    moved, kernels, flops = counted(_cost_of_a_compiled_chain)
    size = 4 * 64 * 256
    # Forward: x is read, the product's factor is written. Backward: x and a gradient are read, one is written.
    assert moved == pytest.approx(2 * size + 3 * size, rel=0.01) and kernels == 2
    assert flops == 3 * 2 * 64 * 256 * 256


def _cost_of_a_compiled_chain() -> tuple[int, int, int]:
    pretend()
    ledger = Ledger(1.0, 1.0)
    with fake_mode(), ledger, GPU:
        pretend_compiler(ledger)
        x, weight = (torch.empty(rows, 256, requires_grad=True) for rows in (64, 256))
        function = torch.compile(lambda x, weight: (x.sin().cos() / 2) @ weight)
        gradient = torch.empty(64, 256)
        function(x, weight).backward(gradient)
        ledger.begin()
        x.grad = weight.grad = None
        function(x, weight).backward(gradient)
        matrix_products = 3
        return sum(ledger.bytes.values()), ledger.operators - matrix_products, ledger.flops


@pytest.mark.usefixtures("ready_processes")
@pytest.mark.parametrize("recomputed", ["false", pytest.param("selective", marks=pytest.mark.long)])
def test_compiled_graphs_are_whole_and_made_once(recomputed: str) -> None:
    words = "train.centering=sinkhorn_knopp", f"train.activation_checkpointing={recomputed}"
    breaks, later = counted(graph_breaks, tiny(*words))
    assert breaks == {} and later == 0


@pytest.mark.usefixtures("ready_processes")
def test_a_break_of_a_compiled_graph_is_named() -> None:
    breaks, _ = counted(_graph_breaks_of_a_block_that_prints)
    assert sum(breaks.values()) > 0


def _graph_breaks_of_a_block_that_prints() -> tuple[dict[str, int], int]:
    def mlp_branch(self: Block, *inputs: Any) -> Tensor:
        torch._dynamo.graph_break()
        return plain(self, *inputs)

    plain = Block.mlp_branch
    Block.mlp_branch = mlp_branch  # type: ignore[method-assign]
    return graph_breaks(tiny())


def test_the_command_reports_and_needs_a_compiler_or_says_so(tmp_path: Path) -> None:
    words = ["bench", "train", *TINY, "train.compile=false", "--rehearse", "--card", "a100", "--json"]
    done = ready.dino2(*words, workers=True)
    assert done.returncode == 0, done.stderr
    (variant,) = json.loads(done.stdout)["variants"]
    assert variant["card"] == "a100" and variant["waits"] == {} and variant["graph_breaks"] is None

    if torch.cuda.is_available():
        return
    nowhere = os.environ | {"PATH": str(tmp_path), "DINO2_CACHE": str(tmp_path)}
    done = ready.dino2(*words, env=nowhere, workers=True)
    assert done.returncode == 2
    assert "C++ compiler" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.usefixtures("ready_processes")
def test_a_plan_has_it_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert short_form(tiny()).startswith("0 waits, 0 blocking copies, ")
    if not torch.cuda.is_available():
        monkeypatch.setattr(rehearsal, "rehearse", partial(_rehearse_without_programs, str(tmp_path)))
        assert short_form(tiny()).startswith("not rehearsed: ")


def _rehearse_without_programs(empty: str, *arguments: Any) -> Rehearsal:
    os.environ |= {"PATH": empty, "DINO2_CACHE": empty}
    return rehearse(*arguments)


def test_cards_are_those_of_the_option() -> None:
    assert set(CARDS) == set(get_args(get_type_hints(BenchTrainRequest)["card"]))


@pytest.mark.usefixtures("ready_processes")
def test_a_process_that_dies_is_one_clear_error() -> None:
    with pytest.raises(EnvironmentProblem, match="cannot be rehearsed"):
        counted(os.abort)
    library = load_config(overrides=[*TINY, *LIBRARY["resnet"], "distillation.teacher=none"])
    with pytest.raises(EnvironmentProblem, match="a step of hf:resnet cannot be rehearsed: transformers asks"):
        rehearse(library, "h100")
