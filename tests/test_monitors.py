"""Monitors tell a collapsed teacher from a healthy one."""

import math

import pytest
import torch

from dinov2cli.train.monitors import TeacherView, collapse_verdict, entropy, teacher_health, teacher_numbers

S, D, K = 64, 32, 128


def targets(cls: torch.Tensor, scores: torch.Tensor) -> TeacherView:
    return TeacherView(cls, torch.softmax(scores, -1))


def healthy() -> TeacherView:
    generator = torch.Generator().manual_seed(0)
    return targets(torch.randn(S, D, generator=generator), 5 * torch.randn(S, K, generator=generator))


def test_a_healthy_teacher_gets_no_verdict() -> None:
    health = teacher_health(teacher_numbers(healthy()))
    assert collapse_verdict(health, S) is None
    assert 0.9 < health.feature_std < 1.1  # spread over the sphere
    assert health.effective_rank > 0.8 * D
    assert health.prototypes_in_use > 20


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (targets(torch.ones(S, D) + 1e-4 * torch.randn(S, D), 5 * torch.randn(S, K)), "nearly the same feature"),
        (targets(torch.randn(S, 1) * torch.ones(1, D), 5 * torch.randn(S, K)), "one direction only"),
        (targets(torch.randn(S, D), 50 * torch.eye(K)[:1].expand(S, K)), "one prototype"),
        (targets(torch.randn(S, D), torch.zeros(S, K)), "uniform"),
    ],
)
def test_each_kind_of_collapse_is_named(broken: TeacherView, words: str) -> None:
    verdict = collapse_verdict(teacher_health(teacher_numbers(broken)), S)
    assert verdict is not None and words in verdict
    assert collapse_verdict(teacher_health(teacher_numbers(broken)), samples=4) is None  # too few crops to say


def test_entropy_counts_zero_as_zero() -> None:
    assert entropy(torch.tensor([0.0, 1.0])).item() == 0
    assert entropy(torch.full((4,), 0.25)).item() == pytest.approx(math.log(4))
