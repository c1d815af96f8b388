"""One decision about device and arithmetic for training, evaluation and pictures."""

from pathlib import Path

import pytest
import torch
from weight_samples import PLAIN, sample_state, save

from dinov2cli.device import DTYPES, Precision, choose_device, free_memory, main_memory, main_memory_of_a_process
from dinov2cli.errors import EnvironmentProblem
from dinov2cli.requests.pictures import PcaImageRequest
from dinov2cli.visualize.pictures import load_picture_model

CPU = torch.device("cpu")
THERE = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no GPU that PyTorch can use"


@pytest.mark.parametrize("asked", ["auto", *DTYPES])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_cpu_computes_in_float32_whatever_is_asked_for(asked: str, frozen: bool) -> None:
    precision = Precision.resolve(asked, CPU, frozen=frozen)
    assert (precision.dtype, precision.name, precision.scale_gradients) == (torch.float32, "fp32", False)
    assert asked in ("auto", "fp32") or asked in precision.reason
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    "asked, message",
    [("tpu", "unknown; give auto, cpu"), ("cuda:99", f"this machine has {THERE}")],
)
def test_a_device_that_is_not_there_is_named(asked: str, message: str) -> None:
    with pytest.raises(EnvironmentProblem, match=f"--device {asked}: {message}"):
        choose_device(asked)


def test_the_cpu_can_be_chosen_on_any_machine() -> None:
    assert choose_device("cpu") == choose_device(CPU) == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_the_cpu_is_chosen() -> None:
    assert choose_device() == choose_device("auto") == CPU
    with pytest.raises(
        EnvironmentProblem,
        match="--device cuda: this machine has no GPU that PyTorch can use; dino2 doctor looks at the driver",
    ):
        choose_device("cuda")


@pytest.mark.gpu
def test_each_process_has_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device() == choose_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(EnvironmentProblem, match="of this machine has no GPU"):
        choose_device()


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [True, False])
def test_bf16_is_chosen_where_the_gpu_has_it(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    here = choose_device()
    found = {asked: Precision.resolve(asked, here, frozen=True) for asked in ("auto", *DTYPES)}
    names = {asked: precision.name for asked, precision in found.items()}
    assert names == {"auto": "bf16", "fp32": "fp32", "bf16": "bf16", "fp16": "fp16"} if bf16 else {
        "auto": "fp16", "fp32": "fp32", "bf16": "fp16", "fp16": "fp16"
    }  # fmt: skip
    assert {asked for asked, precision in found.items() if precision.scale_gradients} == {
        asked for asked, name in names.items() if name == "fp16"
    }
    assert not Precision.resolve("fp16", here, grad_scaler=False).scale_gradients
    if not bf16:
        with pytest.raises(EnvironmentProblem, match="has no bfloat16 arithmetic; fp16 or fp32 would run"):
            Precision.resolve("bf16", here)
    with found["auto"].autocast():
        ones = torch.ones(2, 2, device=here)
        assert (ones @ ones).dtype == found["auto"].dtype


def test_memory_is_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert free_memory(CPU) > 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert main_memory_of_a_process() == main_memory() / 4


def test_pictures_of_a_run_are_made_in_its_precision(tmp_path: Path) -> None:
    weights = tmp_path / "eval" / "training_9" / "teacher_checkpoint.pth"
    save({"teacher": {f"backbone.{name}": tensor for name, tensor in sample_state(PLAIN).items()}}, weights)
    (tmp_path / "config.yaml").write_text("student: {num_heads: 2}\ncompute_precision: {precision: fp16}")
    requests = [PcaImageRequest(paths=("photos", "out.png"), model=str(at), device="cpu") for at in (tmp_path, weights)]
    assert [load_picture_model(request)[1] for request in requests] == ["fp16", "fp16"]
