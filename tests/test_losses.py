"""Losses and centering against the reference, and against definitions written out."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2cli.losses import DINOLoss, KoLeoLoss, SoftmaxCentering, iBOTPatchLoss, sinkhorn_knopp
from dinov2cli.losses.cross_entropy import soft_cross_entropy
from dinov2cli.models.dino_head import DINOHead


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    path = Path(__file__).parent / "golden" / "losses.npz"
    return {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(path).items()}


def test_head_equals_the_reference() -> None:
    arrays = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "golden" / "dino_head.npz").items()}
    head = DINOHead(24, 48, nlayers=3, hidden_dim=32, bottleneck_dim=16)
    head.load_state_dict({key[2:]: value for key, value in arrays.items() if key.startswith("w/")}, strict=True)
    torch.testing.assert_close(head(arrays["x"]), arrays["y"], atol=1e-6, rtol=0)


def test_softmax_centering_equals_the_reference(golden: dict[str, torch.Tensor]) -> None:
    centering = SoftmaxCentering(40)
    for step in range(3):
        probs = centering(golden[f"center/{step}/teacher"], 0.05)
        torch.testing.assert_close(probs, golden[f"center/{step}/probs"], atol=1e-6, rtol=0)
    torch.testing.assert_close(centering.center, golden["center/final"], atol=1e-6, rtol=0)


def test_a_non_finite_batch_leaves_the_center_as_it_is() -> None:
    centering = SoftmaxCentering(4)
    centering(torch.randn(8, 4), 0.1)
    before = centering.center.clone()
    centering(torch.full((8, 4), torch.nan), 0.1)
    assert torch.equal(centering.center, before) and before.abs().sum() > 0


def test_a_batch_without_samples_leaves_the_center_as_it_is() -> None:
    centering = SoftmaxCentering(4)
    centering(torch.randn(8, 4), 0.1)
    before = centering.center.clone()
    assert centering(torch.empty(0, 4), 0.1).shape == (0, 4)
    assert torch.equal(centering.center, before)


def sinkhorn_in_float64(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Three rounds of rows to 1/K, columns to 1/B, as the definition says, in the log domain."""
    log_q = scores.double().T / temperature
    log_q -= log_q.logsumexp((0, 1))
    prototypes, samples = log_q.shape
    for _ in range(3):
        log_q -= log_q.logsumexp(1, keepdim=True) + np.log(prototypes)
        log_q -= log_q.logsumexp(0, keepdim=True) + np.log(samples)
    return (log_q + np.log(samples)).exp().T.float()


def test_sinkhorn_knopp_equals_the_reference(golden: dict[str, torch.Tensor]) -> None:
    probs = sinkhorn_knopp(golden["sk/teacher"], 0.07)
    torch.testing.assert_close(probs, golden["sk/probs_T0.07"], atol=1e-6, rtol=0)


def test_sinkhorn_knopp_holds_where_the_reference_overflows(golden: dict[str, torch.Tensor]) -> None:
    assert golden["sk/probs_T0.04"].isnan().all()  # exp(3.9 / 0.04) is beyond float32
    for temperature in (0.04, 0.01):
        probs = sinkhorn_knopp(golden["sk/teacher"], temperature)
        torch.testing.assert_close(probs, sinkhorn_in_float64(golden["sk/teacher"], temperature), atol=2e-5, rtol=0)


def test_everything_is_float32_under_autocast(golden: dict[str, torch.Tensor]) -> None:
    def results() -> list[torch.Tensor]:
        return [
            sinkhorn_knopp(golden["sk/teacher"], 0.07),
            SoftmaxCentering(40)(golden["center/0/teacher"], 0.05),
            DINOLoss()(golden["dino/student"], golden["dino/teacher"]),
            iBOTPatchLoss()(golden["ibot/student"], golden["ibot/teacher"], golden["ibot/weights"], 4),
            KoLeoLoss()(golden["koleo/x"]),
        ]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = results()
    assert all(torch.equal(a, b) for a, b in zip(results(), under_autocast, strict=True))


def test_sinkhorn_knopp_of_no_samples() -> None:
    assert sinkhorn_knopp(torch.empty(0, 8), 0.05).shape == (0, 8)


def test_dino_loss_equals_the_reference(golden: dict[str, torch.Tensor]) -> None:
    loss = DINOLoss()(golden["dino/student"], golden["dino/teacher"])
    assert loss.item() == pytest.approx(golden["dino/loss"].item(), rel=1e-6)


def test_ibot_loss_equals_the_reference(golden: dict[str, torch.Tensor]) -> None:
    masks = golden["ibot/masks"]
    loss = iBOTPatchLoss()(golden["ibot/student"], golden["ibot/teacher"], golden["ibot/weights"], masks.shape[0])
    assert loss.item() == pytest.approx(golden["ibot/loss"].item(), rel=1e-6)


def test_cross_entropy_gradient_is_softmax_minus_target() -> None:
    torch.manual_seed(0)
    student = torch.randn(2, 3, 10, requires_grad=True)
    teacher = torch.softmax(torch.randn(2, 3, 10), -1)
    DINOLoss(student_temp=0.1)(student, teacher).backward()
    probs = torch.softmax(student.detach() / 0.1, -1)
    expected = (2 * probs - teacher.sum(0)) / 0.1 / 3  # two teacher crops, mean over three images
    torch.testing.assert_close(student.grad, expected, atol=1e-6, rtol=1e-5)


def test_koleo_equals_the_reference(golden: dict[str, torch.Tensor]) -> None:
    assert KoLeoLoss()(golden["koleo/x"]).item() == pytest.approx(golden["koleo/loss"].item(), rel=1e-6)


def test_koleo_of_one_image_is_zero_and_of_equal_images_finite() -> None:
    assert KoLeoLoss()(torch.randn(1, 8)).item() == 0
    x = torch.ones(4, 8, requires_grad=True)
    loss = KoLeoLoss()(x)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


def plain_cross_entropy(scores: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    return -(targets * torch.log_softmax(scores / temperature, -1)).sum(-1)


def test_cross_entropy_and_its_gradient_in_float64() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(4, 7, dtype=torch.float64)  # rows need not sum to 1
    expected = plain_cross_entropy(scores, targets, 0.1)
    torch.testing.assert_close(soft_cross_entropy(scores, targets, 0.1), expected)
    assert torch.autograd.gradcheck(lambda s: soft_cross_entropy(s, targets, 0.1), scores)


def test_cross_entropy_in_several_chunks_equals_the_plain_one() -> None:
    torch.manual_seed(0)
    targets = torch.softmax(torch.randn(5, 2**19), -1)  # two rows a chunk
    weights = torch.rand(2, 5)
    scores = torch.randn(2, 5, 2**19, requires_grad=True)
    results = []
    for function in (plain_cross_entropy, soft_cross_entropy):
        scores.grad = None
        terms = function(scores, targets, 0.1)
        (terms * weights).sum().backward()
        results.append((terms.detach(), scores.grad))
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-4)


def test_cross_entropy_of_half_precision_scores_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    scores, targets = torch.randn(6, 50).bfloat16().requires_grad_(), torch.softmax(torch.randn(6, 50), -1)
    terms = soft_cross_entropy(scores, targets, 0.1)
    assert terms.dtype == torch.float32
    torch.testing.assert_close(terms, plain_cross_entropy(scores.detach().float(), targets, 0.1))
    terms.sum().backward()
    softmax = torch.softmax(scores.detach().float() / 0.1, -1)
    assert torch.equal(scores.grad, ((softmax - targets) / 0.1).bfloat16())


def test_cross_entropy_of_no_rows() -> None:
    assert soft_cross_entropy(torch.empty(0, 8, requires_grad=True), torch.empty(0, 8), 0.1).shape == (0,)
