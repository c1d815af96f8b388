"""Networks give the token sets that are read of them, and followers follow by their rules."""

import pytest
import torch
from tiny_run import DINOV3
from tiny_run import TINY as SIZES

from dinov2cli.bench.train import synthetic_batch
from dinov2cli.config import Config, load_config
from dinov2cli.train.networks import TEACHER, TOKEN_SETS, Follower, Networks, SSLNetwork, build_network


def config_of(*overrides: str) -> Config:
    return load_config(overrides=[*SIZES, "student.num_register_tokens=2", *overrides])


@pytest.mark.parametrize("variant", [[], ["ibot.separate_head=true", "ibot.head_n_prototypes=80", *DINOV3]])
@torch.no_grad()
def test_token_sets_are_those_of_the_whole_backbone(variant: list[str]) -> None:
    config = config_of(*variant)
    network, batch = build_network(config, reads=TOKEN_SETS).eval(), synthetic_batch(config).normalized()
    crops, masks = [batch.global_crops, batch.local_crops], [batch.masks, None]
    whole = network.backbone.forward_features(crops, masks)
    cls = torch.cat([each["x_norm_clstoken"] for each in whole])
    patches = whole[0]["x_norm_patchtokens"]
    masked = patches[batch.masks]
    head = network.ibot_head if variant else network.dino_head
    expected = {"cls": cls, "patches": patches, "masked": masked}
    expected |= {"cls_scores": network.dino_head(cls), "masked_scores": head(masked)}
    for reads in (TOKEN_SETS, *({name} for name in TOKEN_SETS), {"masked_scores", "cls"}):
        network.reads = frozenset(reads)
        found = network(crops, masks, batch.mask_indices)
        assert found.keys() == reads
        for name, tokens in found.items():
            torch.testing.assert_close(tokens, expected[name], rtol=1e-4, atol=1e-5)


def test_an_unknown_token_set_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"unknown token sets \['registers'\]"):
        build_network(config_of(), reads=frozenset({"registers", "cls"}))


def test_followers_follow_by_their_rules() -> None:
    config = config_of()
    other = config_of("student.embed_dim=24", "dino.head_n_prototypes=8")

    def pretrained(_: Config, backend: str) -> SSLNetwork:
        return build_network(other, backend)

    every_third = Follower("anchor", "snapshot", period=3)
    fixed = Follower("expert", "frozen", make=pretrained)
    reads_of = {every_third: frozenset({"patches"}), fixed: frozenset({"cls_scores"})}
    networks = Networks(config, "sdpa", frozenset({"cls_scores", "patches"}), reads_of, {})
    assert [name for name, _ in networks.named()] == ["student", TEACHER.name, "anchor", "expert"]
    assert not networks.followers["anchor"].heads()  # nobody reads its scores
    assert networks.teacher.heads()  # saved and scored, read or not
    expert = state(networks.followers["expert"])
    anchored = state(networks.followers["anchor"])
    assert equal(anchored, state(networks.student)) and expert["backbone.cls_token"].shape[-1] == 24
    for iteration in range(6):
        before = state(networks.teacher)
        for parameter in networks.student.parameters():
            parameter.data.add_(0.1)
        networks.follow({"iteration": iteration, "momentum": 0.75})
        for name, value in networks.teacher.named_parameters():
            moved = 0.75 * before[name] + 0.25 * networks.student.get_parameter(name)
            torch.testing.assert_close(value, moved)
        if iteration in (2, 5):
            anchored = state(networks.teacher)
        assert equal(state(networks.followers["anchor"]), anchored)
        assert equal(state(networks.followers["expert"]), expert)
    assert all(not p.requires_grad for network in networks.followers.values() for p in network.parameters())


def test_an_average_without_heads_follows_the_students_backbone() -> None:
    slow = Follower("slow", "ema")
    networks = Networks(config_of(), "sdpa", frozenset({"cls_scores"}), {slow: frozenset({"cls"})}, {})
    before = state(networks.followers["slow"])
    for parameter in networks.student.parameters():
        parameter.data.add_(0.1)
    networks.follow({"iteration": 0, "momentum": 0.75})
    for name, value in networks.followers["slow"].named_parameters():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * networks.student.get_parameter(name))


def state(network: SSLNetwork) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(some: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> bool:
    """Whether these weights are among those."""
    return all(torch.equal(value, whole[name]) for name, value in some.items())


def test_a_network_that_begins_anew_takes_the_students_weights() -> None:
    networks = Networks(config_of(), "sdpa", frozenset({"cls"}), {}, {})
    networks.student.backbone.cls_token.data.fill_(3.0)
    networks.begin()
    assert (networks.teacher.backbone.cls_token == 3.0).all()


@torch.no_grad()
def test_crops_of_any_resolution_are_seen_in_training_as_in_inference() -> None:
    """Positions are kept for the largest crops of the run, and resized for others by the same rule."""
    words = ["crops.global_crops_size=[32, 48]", "crops.local_crops_size=[16, 24]"]
    config = config_of(*words, "crops.global_local_crop_pairs_ratios=[0.5, 0.5]", "student.drop_path_rate=0")
    student = build_network(config, reads=frozenset({"cls", "patches"})).train()
    assert student.backbone.pos_embed.shape[1] == 1 + 36
    for resolution in config.crops.resolutions():
        batch = synthetic_batch(config.at(resolution)).normalized()
        crops = [batch.global_crops, batch.local_crops]
        assert [each.shape[-1] for each in crops] == [resolution.global_size, resolution.local_size]
        found = student(crops, [None, None], batch.mask_indices)
        features = [student.backbone(each, is_training=True) for each in crops]
        torch.testing.assert_close(found["cls"], torch.cat([each["x_norm_clstoken"] for each in features]))
        torch.testing.assert_close(found["patches"], features[0]["x_norm_patchtokens"])
