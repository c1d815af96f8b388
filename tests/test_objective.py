"""Terms and followers beyond DINOv2's own enter by one entry in `TERMS`; what they need of the rest, the rest gives."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import run_in_processes
from tiny_run import TINY, metrics_of, write_images
from torch import Tensor, nn

from dinov2cli.bench.train import benchmark_training, synthetic_batch
from dinov2cli.config import Config, load_config
from dinov2cli.losses import LossTerm
from dinov2cli.train.networks import Follower, SSLNetwork, build_network
from dinov2cli.train.objective import TERMS, SSLMetaArch, Term
from dinov2cli.train.trainer import Trainer

CPU = torch.device("cpu")
VALUES = {"iteration": 0, "teacher_temp": 0.05}


class GramTerm(LossTerm):
    """Patches of a crop shall resemble each other as they do for an earlier teacher (DINOv3 paper, section 4)."""

    reads = frozenset({"patches"})
    reads_of_follower = frozenset({"patches"})

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter()

    def targets(self, tokens: Mapping[str, Tensor], values: Mapping[str, float]) -> Tensor:
        self.seen.number += 1
        return self.similarities(tokens["patches"])

    def similarities(self, patches: Tensor) -> Tensor:
        unit = F.normalize(patches.float(), dim=-1)
        return unit @ unit.transpose(1, 2)

    def forward(self, tokens: Mapping[str, Tensor], targets: Tensor, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value = F.mse_loss(self.similarities(tokens["patches"]), targets)
        return value, {"gram_loss": value}


class Counter(nn.Module):
    """State of a term: saved with the run."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("number", torch.zeros((), dtype=torch.int64))


class DistillationTerm(LossTerm):
    """Prototype scores of an expert, for the class tokens of the global crops."""

    reads = frozenset({"cls"})
    reads_of_follower = frozenset({"cls_scores"})

    def targets(self, tokens: Mapping[str, Tensor], values: Mapping[str, float]) -> Tensor:
        return tokens["cls_scores"].float()

    def forward(self, tokens: Mapping[str, Tensor], targets: Tensor, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value = F.mse_loss(tokens["cls"][: len(targets), : targets.shape[1]].float(), targets)
        return value, {"distillation_loss": value}


def gram(config: Config) -> Term:
    return Term(GramTerm(), lambda iteration: 0.5 * (iteration >= 4), follower=Follower("anchor", "snapshot", period=3))


def expert(config: Config, backend: str) -> SSLNetwork:
    torch.manual_seed(7)
    sizes = ["student.embed_dim=32", "dino.head_n_prototypes=12"]
    return build_network(load_config(overrides=[*TINY, *sizes]), backend)


def distillation(config: Config) -> Term:
    return Term(DistillationTerm(), 1.0, follower=Follower("expert", "frozen", make=expert))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture()
def two_more_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TERMS, "gram", gram)
    monkeypatch.setitem(TERMS, "distillation", distillation)


def configure(images: Path, run: Path, *overrides: str) -> Config:
    return load_config(overrides=[*TINY, f"train.dataset_path={images}", f"train.output_dir={run}", *overrides])


@pytest.mark.usefixtures("two_more_terms")
def test_a_run_with_two_more_terms_and_followers(images: Path, tmp_path: Path) -> None:
    whole = Trainer(configure(images, tmp_path / "whole"), CPU)
    fixed = {name: value.clone() for name, value in whole.objective.networks.followers["expert"].state_dict().items()}
    whole.train()
    lines = metrics_of(tmp_path / "whole")
    # Until iteration 4, gram's weight is 0; the anchor is what the teacher was after each third iteration.
    own = ["dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss"]
    for line in lines:
        parts = sum(line[name] for name in own) + line["ibot_loss"] + 2 * line["koleo_loss"] + line["distillation_loss"]
        parts += 0.5 * line["gram_loss"] * (line["iteration"] >= 4)
        assert line["total_loss"] == pytest.approx(parts, rel=1e-5)
    assert lines[1]["gram_loss"] > 0 and lines[0].keys() == lines[-1].keys()
    networks = whole.objective.networks
    for name, value in networks.followers["expert"].state_dict().items():
        assert torch.equal(value, fixed[name])
    # Iterations are counted from 0, and the last is 11: the anchor is the teacher as it is now.
    for name, value in networks.followers["anchor"].state_dict().items():
        assert torch.equal(value, networks.teacher.state_dict()[name])
    assert not networks.followers["anchor"].heads()

    # Networks and terms are saved under their names, and an interrupted run resumes with them.
    state = whole.objective.state_dict()
    assert {"anchor.backbone.cls_token", "expert.dino_head.last_layer.weight_g", "gram_seen.number"} <= state.keys()
    assert state["gram_seen.number"] == 12
    for folder in (tmp_path / "whole" / "checkpoints").iterdir():
        if not folder.name.endswith("8"):
            continue
        (tmp_path / "parts" / "checkpoints").mkdir(parents=True)
        folder.rename(tmp_path / "parts" / "checkpoints" / folder.name)
    resumed = Trainer(configure(images, tmp_path / "parts"), CPU)
    assert resumed.iteration == 8
    resumed.train()
    for name, value in resumed.objective.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.usefixtures("two_more_terms")
def test_the_benchmark_times_every_network(tmp_path: Path) -> None:
    parts = benchmark_training(load_config(overrides=TINY), CPU, steps=1).parts_s
    assert list(parts) == [
        "data", "teacher forward", "anchor forward", "expert forward", "student forward", "heads and losses",
        "backward", "optimizer", "EMA",
    ]  # fmt: skip
    assert all(seconds > 0 for seconds in parts.values())


def on_two_processes(images: str, run: str) -> dict[str, list[float]]:
    TERMS.update(gram=gram, distillation=distillation)
    found = {}
    for mode in ("ddp", "fsdp"):
        # With nearly equal features, rounding would decide which is KoLeo's nearest neighbour.
        sharded = [f"train.sharding={mode}", "train.batch_size_per_gpu=4", "student.layerscale=0.5"]
        trainer = Trainer(configure(Path(images), Path(run) / mode, *sharded), CPU)
        trainer.train()
        found[mode] = [line["gram_loss"] for line in metrics_of(Path(run) / mode)]
        found[f"{mode} total"] = [line["total_loss"] for line in metrics_of(Path(run) / mode)]
    return found


def test_they_are_spread_over_processes_like_the_others(images: Path, tmp_path: Path) -> None:
    found, _ = run_in_processes(2, on_two_processes, str(images), str(tmp_path))
    for name in ("", " total"):
        assert found[f"ddp{name}"] == pytest.approx(found[f"fsdp{name}"], rel=1e-4)
    assert max(found["ddp"]) > 0


def test_a_run_does_without_a_term_whose_entry_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(overrides=TINY)
    monkeypatch.setitem(TERMS, "ibot", lambda config: None)
    objective = SSLMetaArch(config).train()
    losses = objective(synthetic_batch(config), VALUES)
    assert losses.logged.keys() == {"dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss"}
    assert not [name for name in objective.state_dict() if name.startswith("ibot")]
    losses.total.backward()
    assert all(parameter.grad is not None for parameter in objective.student.dino_head.parameters())


def test_only_what_the_next_step_needs_stays() -> None:
    """The targets of the patches, the largest array of a step, are gone with it."""
    config = load_config(overrides=TINY)
    objective = SSLMetaArch(config).train()
    objective(synthetic_batch(config), VALUES)
    assert objective.last_view is not None
    assert objective.last_view.targets.shape == (16, 32) and objective.last_view.cls.shape == (16, 24)
