"""A backend of attention is chosen only after it has run, and is right, at the run's own shapes."""

import pytest
import torch
from torch import Tensor

from dinov2cli.config import load_config
from dinov2cli.device import Precision
from dinov2cli.models import attention
from dinov2cli.models.attention import AttentionUse, TokenLayout, choose_attention_backend, why_not
from dinov2cli.train.choices import choose_attention

CPU = torch.device("cpu")
USE = AttentionUse(CPU, torch.float32, heads=2, channels=8, lengths=(17, 5))


@pytest.fixture(autouse=True)
def forget_what_ran() -> None:
    why_not.cache_clear()


def test_by_name() -> None:
    assert choose_attention_backend("auto", USE)[0] == "sdpa"
    for name in ("xformers", "varlen"):
        with pytest.raises(ValueError, match="CUDA"):
            choose_attention_backend(name, USE)
    with pytest.raises(ValueError, match="known: auto, xformers, sdpa, varlen"):
        choose_attention_backend("flash", USE)


def test_it_is_tried_at_the_runs_own_lengths_and_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def recording(qkv: Tensor, layout: TokenLayout) -> Tensor:
        tried.append((tuple(qkv.shape[1:]), {length for _, length in layout.groups}, qkv.dtype))
        return attention.sdpa_attention(qkv, layout)

    monkeypatch.setitem(attention.ATTENTION_BACKENDS, "sdpa", recording)
    config = load_config(preset="vitl16_short", overrides=["student.attention_backend=sdpa"])
    choose_attention(config, CPU, Precision.resolve("auto", CPU))
    assert tried == [((3, 16, 64), {1 + 14 * 14, 1 + 6 * 6}, torch.float32)]


@pytest.mark.parametrize(
    ("backend", "complaint"),
    [
        (lambda qkv, layout: 1.01 * attention.sdpa_attention(qkv, layout), "its output is off by 1 %"),
        (lambda qkv, layout: attention.sdpa_attention(qkv, layout) * float("nan"), "off by nan"),
        (lambda qkv, layout: attention.sdpa_attention(qkv.detach(), layout), "it does not run here"),
    ],
    ids=["wrong", "not a number", "no gradient"],
)
def test_one_that_imports_but_is_wrong_is_not_there(
    backend: attention.AttentionBackend, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention.ATTENTION_BACKENDS, "sdpa", backend)
    with pytest.raises(ValueError, match=complaint):
        choose_attention_backend("sdpa", USE)


def test_auto_goes_on_to_the_next_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where xFormers was built for another CUDA: its import only warns, its operator is not there."""

    def not_built(backend: str, use: AttentionUse) -> str | None:
        return "it does not run here: No operator found" if backend == "xformers" else None

    monkeypatch.setattr(attention, "why_not", not_built)
    on_gpu = USE._replace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    name, reason = choose_attention_backend("auto", on_gpu)
    assert name == "sdpa" and "xformers: it does not run here: No operator found" in reason
    with pytest.raises(ValueError, match="'xformers' cannot be used: it does not run here"):
        choose_attention_backend("xformers", on_gpu)
