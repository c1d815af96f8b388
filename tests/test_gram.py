"""Gram anchoring: the loss equals the reference's, the Gram teacher begins, sees and is refreshed as configured."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import GRAM, TINY

from dinov2cli.bench.train import synthetic_batch
from dinov2cli.config import load_config
from dinov2cli.config.gram import WeightSchedule
from dinov2cli.errors import ConfigError
from dinov2cli.losses import GramLoss, GramTerm
from dinov2cli.train.cost import estimate, step_flops
from dinov2cli.train.display import teacher_rows
from dinov2cli.train.objective import SSLMetaArch
from dinov2cli.train.schedules import Schedules, weight_schedule

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


def test_its_cost_is_in_the_plan() -> None:
    """A Gram teacher with crops of 48 pixels where the student's have 32: more than twice the teacher's patches."""
    plain, anchored = (load_config(overrides=[*TINY, *words]) for words in ([], GRAM))
    memory = [estimate(config, world_size=1, sharding="none", precision="fp32") for config in (plain, anchored)]
    network = SSLMetaArch(anchored).networks.followers["gram_teacher"]
    parameters = 4e-9 * sum(value.numel() for value in network.parameters())
    assert memory[1].teacher - memory[0].teacher == pytest.approx(parameters) and not network.heads()
    flops = step_flops(anchored)
    assert list(flops.passes) == ["gram_teacher"]
    # The rest is the student's last block for all patches, and the products of the loss.
    assert 0 < flops.passes["gram_teacher"] < flops.step - step_flops(plain).step
    assert teacher_rows(anchored)["Gram teacher"].startswith(
        "the teacher before iteration 3, crops of 48 pixels; the teacher after 4 iterations, and every 4; "
    )


def test_the_running_teacher_may_be_the_gram_teacher() -> None:
    words = ["gram.use_loss=true", "gram.ema_teacher=true", "gram.rep_update=false", "gram.loss_weight=0.5"]
    config = load_config(overrides=[*TINY, *words, "student.drop_path_rate=0"])
    objective = SSLMetaArch(config).train()
    assert list(objective.networks.followers) == ["teacher"]
    batch, values = synthetic_batch(config), {"iteration": 0, "teacher_temp": 0.05}
    losses = objective(batch, values)
    assert losses.logged["gram_loss"] > 0, "patches that the student does not see differ"
    batch.masks.zero_()
    unmasked = replace(batch, mask_indices=batch.mask_indices[:0], masks_weight=batch.masks_weight[:0])
    assert objective(unmasked, values).logged["gram_loss"].item() == pytest.approx(0, abs=1e-10)


def test_local_crops_are_weighed_by_their_schedule() -> None:
    words = ["dino.reweight_dino_local_loss=true", "dino.local_loss_weight_schedule={start: 1, peak: 1, end: 0.5}"]
    plain, weighed = (load_config(overrides=[*TINY, "student.drop_path_rate=0", *each]) for each in ([], words))
    batch, values = synthetic_batch(plain), {"iteration": 11, "teacher_temp": 0.05}
    totals, logged = [], []
    for config in (plain, weighed):
        torch.manual_seed(0)
        losses = SSLMetaArch(config).train()(batch, values)
        totals.append(losses.total.item())
        logged.append(losses.logged["dino_local_crops_loss"].item())
    assert logged[0] == logged[1] and totals[0] - totals[1] == pytest.approx(0.5 * logged[0], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gram.use_loss=true"], r"gram.use_loss=true: the Gram teacher begins with nothing; set gram.ckpt"),
        (["gram.use_loss=true", "gram.ema_teacher=true"], r"gram.rep_update=True: the running .*gram.rep_update=false"),
        (["crops.gram_teacher_crops_size=48"], r"gram_teacher_crops_size=48: gram.use_loss=false has no Gram te"),
        ([*GRAM, "crops.gram_teacher_crops_size=50"], r"size=50: must be a multiple of student.patch_size=8.* 56"),
        ([*GRAM, "crops.gram_teacher_crops_size=24"], r"size=24: must be at least crops.global_crops_size=32"),
        ([*GRAM, "gram.tokens_used=masked"], r"gram.tokens_used=masked: .* set gram.img_level=false"),
        ([*GRAM, "data.device_augment=true"], r"data.device_augment=true: .*crops.gram_teacher_no_distortions=true"),
        ([*GRAM, "gram.loss_weight_schedule={start: 0, peak: 2, ends: 2}"], r"gram.loss_weight_schedule=.*must be \{"),
        ([*GRAM, "gram.loss_weight_schedule=3"], r"gram.loss_weight_schedule=3: must be \{start: A"),
        (["dino.reweight_dino_local_loss=true"], r"reweight_dino_local_loss=true: goes with dino.local_loss_weight_sc"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=[*TINY, *words])


def test_a_schedule_stands_in_the_configuration(tmp_path: Path) -> None:
    words = ["gram.loss_weight_schedule={start: 0, peak: 0, end: 2, warmup_epochs: 1, cosine_epochs: 1}"]
    config = load_config(overrides=[*TINY, *GRAM, *words])
    config.save(tmp_path / "config.yaml")
    assert load_config(config_file=tmp_path / "config.yaml") == config
    weights = Schedules(config).functions["gram_loss_weight"]
    assert [weights(i) for i in range(12)] == pytest.approx([0, 0, 0, 0, 0, 0.5, 1.5, 2, 2, 2, 2, 2])
