"""Files of dense heads: there and back, the released and others' forms, and what is refused in one message."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from weight_samples import assert_same_state, save

from dinov2cli.errors import WeightsError
from dinov2cli.models.dense_heads import DenseHead, DepthHead, DPTHead, HeadConfig, SegmentationHead, fingerprint_of
from dinov2cli.models.load.dense import RELEASED_HEADS, check_head, load_dense, read_head, save_head
from dinov2cli.models.load.released import RELEASED
from dinov2cli.models.vision_transformer import VisionTransformer

SEGMENTATION = HeadConfig(
    task="segmentation", classes=("sky", "sea"), palette=((0, 0, 255), (0, 255, 0)), layers=(0, 2), norm=False,
    dataset="coast", backbone="runs/coast", short_side=224,
)  # fmt: skip
HEADS: list[Callable[[], DenseHead]] = [
    lambda: SegmentationHead(32, 2, SEGMENTATION),
    lambda: DepthHead(32, 7, HeadConfig(task="depth", min_depth=0.5, max_depth=3, bin_weights="softmax")),
    lambda: DPTHead(128, 8, HeadConfig(task="depth", max_depth=80)),
]


@pytest.mark.parametrize("make", HEADS)
@pytest.mark.parametrize("suffix", (".pth", ".safetensors"))
def test_there_and_back(tmp_path: Path, make: Callable[[], DenseHead], suffix: str) -> None:
    torch.manual_seed(0)
    head = make()
    save_head(head, tmp_path / f"head{suffix}")
    read = read_head(tmp_path / f"head{suffix}")
    assert type(read) is type(head) and read.config == head.config and not read.training
    assert_same_state(read.state_dict(), head.state_dict())
    assert not any(parameter.requires_grad for parameter in read.parameters())
    assert [file.name for file in tmp_path.iterdir()] == [f"head{suffix}"]
    with pytest.raises(WeightsError, match=r"written as \.pth or \.safetensors"):
        save_head(head, tmp_path / "head.bin")


def written(state: dict[str, Tensor], path: Path, **beside: Any) -> Path:
    """As the reference's training leaves a head."""
    return save({"state_dict": {f"decode_head.{name}": tensor for name, tensor in state.items()}, **beside}, path)


def test_released_form(tmp_path: Path) -> None:
    """Beside the tensors lies what is left of the training; the file's name tells the range of depths."""
    state = DepthHead(48).state_dict()
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    for dataset, far in (("nyu", 10), ("kitti", 80)):
        file = tmp_path / f"dinov2_vits14_{dataset}_linear_head.pth"
        head = read_head(written(state, file, optimizer=optimizer, meta={"epoch": 1, "time": "now"}))
        assert (head.config.min_depth, head.config.max_depth) == (0.001, far)
        assert head.config.backbone == "dinov2_vits14"
        assert_same_state(head.state_dict(), state)
    meta = {"CLASSES": ("sky", "sea"), "PALETTE": [[0, 0, 255], [0, 255, 0]]}
    config = read_head(written(SegmentationHead(16, 2).state_dict(), tmp_path / "head.pth", meta=meta)).config
    assert (config.classes, config.palette) == (SEGMENTATION.classes, SEGMENTATION.palette)


def test_dinov3s_names(tmp_path: Path) -> None:
    with np.load(Path(__file__).parent / "golden/dense_heads.npz") as file:
        golden = {name: torch.from_numpy(file[name]) for name in file.files if name.startswith("segmentation/v3/")}
    start = "segmentation/v3/w/"
    head = read_head(
        save({k.removeprefix(start): v for k, v in golden.items() if k.startswith(start)}, tmp_path / "h.pth")
    )
    features = [(golden["segmentation/v3/feat"], torch.empty(1, 16))]
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(head(features), golden["segmentation/v3/logits"], **close)
    stretched = head.predict(features, (24, 32))[..., ::6, ::6]
    torch.testing.assert_close(stretched, golden["segmentation/v3/predict_24x32"], **close)


def test_released_heads_have_names_addresses_and_sizes() -> None:
    assert len(RELEASED_HEADS) == 4 * (10 + 2)
    url = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_"
    assert RELEASED_HEADS["dinov2_vitb14_ld"].url == url + "nyu_linear4_head.pth"
    assert RELEASED_HEADS["dinov2_vitb14_voc2012_ms"].url == url + "voc2012_ms_head.pth"
    for name in ("kitti_linear", "nyu_linear4", "nyu_dpt", "ade20k_linear", "voc2012_ms"):
        released = RELEASED_HEADS[f"dinov2_vits14_{name}"]
        with torch.device("meta"):
            backbone = VisionTransformer(RELEASED[released.backbone].architecture)
            head = released.without_weights()
        count = 1 if name.endswith("linear") else 4
        assert len(head.blocks_read(backbone)) == count
        classes = {"ade20k": 150, "voc2012": 21}.get(released.dataset)
        assert not isinstance(head, SegmentationHead) or head.conv_seg.out_channels == classes


def test_the_model_is_found_by_what_the_head_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=4, num_heads=2, layerscale=1.0)
    weights = save(backbone.state_dict(), tmp_path / "weights.pth")
    save_head(SegmentationHead(16, 2), tmp_path / "head.pth")
    save_head(SegmentationHead(16, 2, HeadConfig(task="segmentation", backbone=str(weights))), tmp_path / "own.pth")
    assert load_dense(tmp_path / "own.pth", num_heads=2).layers == (3,)
    assert load_dense(tmp_path / "head.pth", weights, num_heads=2).layers == (3,)
    monkeypatch.chdir(tmp_path)
    config = HeadConfig(task="segmentation", backbone="weights.pth")
    save_head(SegmentationHead(16, 2, config), tmp_path / "near.pth", backbone)
    read = read_head(tmp_path / "near.pth").config
    assert (read.backbone, read.fingerprint) == (str(weights), fingerprint_of(backbone))
    with pytest.raises(WeightsError, match=r"head\.pth: does not say on which backbone"):
        load_dense(tmp_path / "head.pth")
    with pytest.raises(WeightsError, match="no released head"):
        load_dense(tmp_path / "head.pth", pretrained=False)
    with pytest.raises(WeightsError, match=r"--head nowhere\.pth: is no file"):
        check_head("nowhere.pth", "--head")


def spoilt(**changes: Any) -> dict[str, Any]:
    return {
        name: value for name, value in {**SegmentationHead(8, 2).state_dict(), **changes}.items() if value is not None
    }


@pytest.mark.parametrize(("state", "message"), [
    ({"weight": torch.ones(3, 4), "bias": torch.ones(3)}, "no head for segmentation or depth; .* holds bias, weight"),
    ([torch.ones(3)], "holds no tensors by name"),
    (spoilt(**{"bn.bias": None}), r"not the weights of a segmentation head; missing: bn\.bias"),
    (spoilt(**{"aux.weight": torch.ones(1)}), r"not the weights of a segmentation head; unknown: aux\.weight"),
    (spoilt(**{"bn.bias": torch.ones(9)}), r"'bn\.bias' has shape \(9,\), expected \(8,\)"),
    (spoilt(**{"bn.bias": torch.full((8,), torch.nan)}), r"weights that are not finite numbers .*: bn\.bias"),
    (spoilt(**{"bn.bias": 3}), r"'bn\.bias' is no tensor"),
    (spoilt(**{"conv_seg.weight": torch.ones(2, 8)}), "no head that is known has the shapes"),
    (spoilt(**{"decode_head.bn.bias": torch.ones(8)}), "'decode_head.bn.bias' and 'bn.bias', which are the same"),
])  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, state: object, message: str) -> None:
    with pytest.raises(WeightsError, match=rf"head\.pth: .*{message}"):
        read_head(save(state, tmp_path / "head.pth"))


@pytest.mark.parametrize("spoil", (
    lambda data: data.replace(b"PK\1\2", b"PK\1\3"),
    lambda data: data.replace(b"head/data.pkl", b"head/\xd6ata.pkl"),
))  # fmt: skip
def test_a_damaged_directory_is_told(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    file = save(SegmentationHead(8, 2).state_dict(), tmp_path / "head.pth")
    data = spoil(file.read_bytes())
    assert data != file.read_bytes()
    file.write_bytes(data)
    with pytest.raises(WeightsError, match=r"head\.pth: "):
        read_head(file)


@pytest.mark.parametrize(("said", "message"), [
    ({"classes": ["sky"]}, "names 1 classes, and its head has 2"),
    ({"task": "depth"}, "says that it is for depth, and holds a head for segmentation"),
    ({"layers": [3, 1]}, r"layers \(3, 1\): must be indices of blocks, in order"),
    ({"max_depth": 0.001}, "must be a range"),
    ({"colours": 3}, "cannot be: colours Extra inputs"),
    ([3], "is damaged"),
])  # fmt: skip
def test_what_a_file_says_is_checked(tmp_path: Path, said: object, message: str) -> None:
    file = written(SegmentationHead(8, 2).state_dict(), tmp_path / "head.pth", meta={"dino2.head": said})
    with pytest.raises(WeightsError, match=re.escape("head.pth") + f": .*{message}"):
        read_head(file)
