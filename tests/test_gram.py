"""Gram anchoring: the loss equals the reference's, the Gram teacher begins, sees and is refreshed as configured."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2cli.config import load_config
from dinov2cli.config.gram import WeightSchedule
from dinov2cli.losses import GramLoss, GramTerm
from dinov2cli.train.schedules import weight_schedule

GOLDEN = np.load(Path(__file__).parent / "golden" / "gram_loss.npz")


class Masks:
    """What the term asks of a batch."""

    masks = torch.from_numpy(GOLDEN["masks"])
    mask_indices = masks.flatten().nonzero().flatten()
    masks_weight = global_crops = torch.empty(0)


def term_of(loss: GramLoss, teacher: str = "teacher", **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient to the student."""
    student = torch.from_numpy(GOLDEN["student"]).requires_grad_()
    term = GramTerm(loss, **options)
    targets = term.targets({"patches": torch.from_numpy(GOLDEN[teacher])}, {})
    value, logged = term({"patches": student}, targets, Masks())
    assert logged == {"gram_loss": value}
    value.backward()
    return value.detach(), student.grad


@pytest.mark.parametrize("negatives", ["keep", "remove", "remove_teacher"])
@pytest.mark.parametrize(("normalized", "img_level"), list(product([True, False], repeat=2)))
def test_the_loss_equals_the_reference(normalized: bool, img_level: bool, negatives: str) -> None:
    removing = {"remove": {"remove_neg": True}, "remove_teacher": {"remove_only_teacher_neg": True}}.get(negatives, {})
    value, gradient = term_of(GramLoss(normalized=normalized, **removing), img_level=img_level)
    name = f"norm{int(normalized)}_img{int(img_level)}_{negatives}"
    assert value.item() == pytest.approx(GOLDEN[f"loss/{name}"].item(), rel=1e-5)
    if normalized:
        torch.testing.assert_close(gradient, torch.from_numpy(GOLDEN[f"grad/{name}"]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("method", "antialias"), list(product(["bicubic", "bilinear"], [False, True])))
def test_larger_crops_come_to_the_students_grid(method: str, antialias: bool) -> None:
    name = method + "_antialias" * antialias
    options = {"resize_method": method, "antialias": antialias}
    resized = GramTerm(GramLoss(), **options).on_grid(torch.from_numpy(GOLDEN["teacher_2x"]), 25)
    torch.testing.assert_close(resized, torch.from_numpy(GOLDEN[f"resized/{name}"]), rtol=1e-5, atol=1e-5)
    for kind, used in (
        ("img1", {"img_level": True}),
        *((used, {"tokens_used": used}) for used in ("masked", "unmasked")),
    ):
        value, _ = term_of(GramLoss(), "teacher_2x", **options, **used)
        assert value.item() == pytest.approx(GOLDEN[f"loss/highres_{name}_{kind}"].item(), rel=1e-5)


@pytest.mark.parametrize("name", [key.removeprefix("schedule/") for key in GOLDEN if key.startswith("schedule/")])
def test_weight_schedules_equal_the_reference(name: str) -> None:
    words = {word.rstrip("0123456789."): float(word.lstrip("abcdefghijklmnopqrstuvwxyz")) for word in name.split("_")}
    total, warm, cos = (int(words.pop(key, -1)) for key in ("total", "warm", "cos"))
    schedule = WeightSchedule(**words, warmup_epochs=warm, cosine_epochs=None if cos < 0 else cos)
    config = load_config(overrides=[f"optim.epochs={total}", "optim.warmup_epochs=0", "train.OFFICIAL_EPOCH_LENGTH=1"])
    weight = weight_schedule(schedule, config)
    np.testing.assert_allclose([weight(i) for i in range(total)], GOLDEN[f"schedule/{name}"], atol=1e-12)
