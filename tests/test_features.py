"""Feature extraction: order, detail, cache; classes of two datasets brought to one numbering."""

import collections
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from processes import run_in_processes

from dinov2cli.data.datasets import make_dataset
from dinov2cli.errors import ConfigError, DataError, WeightsError
from dinov2cli.eval.extract import Extractor, fitting_image_size
from dinov2cli.eval.features import FeatureCache, Features
from dinov2cli.eval.protocol import align_classes
from dinov2cli.models.vision_transformer import VisionTransformer


def tiny_model(img_size: int = 32, seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=img_size, patch_size=8, embed_dim=24, depth=5, num_heads=2, layerscale=1.0, num_register_tokens=2
    ).eval()


def write_images(folder: Path, classes: dict[str, int], seed: int = 0) -> Path:
    """A folder of random PNGs, `classes` of them each."""
    rng = np.random.default_rng(seed)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            cv2.imwrite(str(folder / name / f"{i}.png"), rng.integers(0, 256, (40, 36, 3), dtype=np.uint8))
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", {"a": 4, "b": 3, "c": 4})


def test_order_and_values(images: Path) -> None:
    model, dataset = tiny_model(), make_dataset(str(images))
    extract = Extractor(model, batch_size=4, num_workers=0, detailed=True, device="cpu")
    features = extract(dataset)
    assert features.indices.tolist() == list(range(11))
    assert features.targets.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    batch = torch.stack([extract.transform(dataset.image(i)) for i in range(11)])
    with torch.inference_mode():
        output = model.forward_features(batch)
        blocks = model.get_intermediate_layers(batch, n=4, return_class_token=True)
    torch.testing.assert_close(features.cls, output["x_norm_clstoken"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        features.tensors["mean_patch"], output["x_norm_patchtokens"].mean(1), rtol=1e-4, atol=1e-5
    )
    for i, (_, cls) in enumerate(blocks):
        torch.testing.assert_close(features.tensors["last_cls"][:, i], cls, rtol=1e-4, atol=1e-5)


def test_unreadable_images_are_left_out_and_named(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Extractor(tiny_model(), num_workers=0, device="cpu")(make_dataset(str(images)))
    (images / "b" / "1.png").write_bytes(b"")
    dataset, cache = make_dataset(str(images)), FeatureCache(tmp_path / "cache")
    left = [i for i in range(11) if i != 5]
    for caught_in in ("unreadable image left out: ", "left out: "):  # the second time from the cache
        caplog.clear()
        extract = Extractor(tiny_model(), batch_size=3, num_workers=0, device="cpu", cache=cache, max_bad_fraction=0.1)
        features = extract(dataset)
        assert features.indices.tolist() == left and features.size == 10
        torch.testing.assert_close(features.cls, whole.cls[left], rtol=1e-4, atol=1e-5)
        assert features.targets.tolist() == whole.targets[left].tolist()
        assert len(extract.notes) == 1 and "1 of 11 images" in extract.notes[0] and "b/1.png" in extract.notes[0]
        assert caplog.text.count("b/1.png") == 1 and caught_in in caplog.text
    for cached in (cache, None):
        with pytest.raises(DataError, match=r"1 of 11 images are unreadable, more than .*0.05 allows: .*1\.png"):
            Extractor(tiny_model(), num_workers=0, device="cpu", cache=cached, max_bad_fraction=0.05)(dataset)


def test_only_extraction_changes_how_the_process_keeps_memory(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("dinov2cli.eval.extract.keep_freed_memory", lambda: asked.append(True))
    extract = Extractor(tiny_model(), num_workers=0, device="cpu")
    assert not asked
    extract(make_dataset(str(images)))
    assert asked


def test_batch_size_and_workers_change_nothing(images: Path) -> None:
    dataset = make_dataset(str(images))
    one, other = (
        Extractor(tiny_model(), batch_size=b, num_workers=w, device="cpu")(dataset) for b, w in ((3, 0), (11, 2))
    )
    torch.testing.assert_close(one.cls, other.cls, rtol=1e-4, atol=1e-5)
    assert torch.equal(one.targets, other.targets) and torch.equal(one.indices, other.indices)


def test_cache_is_used_and_equal(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset, cache = make_dataset(str(images)), FeatureCache(tmp_path / "cache")
    first = Extractor(tiny_model(), num_workers=0, cache=cache, device="cpu")(dataset)
    with caplog.at_level("INFO", logger="dino2"):
        second = Extractor(tiny_model(), num_workers=0, cache=cache, device="cpu")(dataset)
    assert "from the cache" in caplog.text
    assert torch.equal(first.cls, second.cls) and torch.equal(first.targets, second.targets)


def test_the_cache_looks_at_each_file_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network file system it is a question to the server, for each of a million."""
    dataset, asked = make_dataset(str(images)), collections.Counter[int]()
    kind = type(dataset)
    monkeypatch.setattr(kind, "container", lambda self, index: (asked.update([index]), self.path(index))[1])
    Extractor(tiny_model(), num_workers=0, cache=FeatureCache(tmp_path / "cache"), device="cpu")(dataset)
    assert len(list((tmp_path / "cache").rglob("entry.json"))) == 1
    assert asked == collections.Counter(range(len(dataset)))


def test_class_tokens_come_from_detailed_features_too(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, cache = make_dataset(str(images)), FeatureCache(tmp_path / "cache")
    detailed = Extractor(tiny_model(), num_workers=0, cache=cache, device="cpu", detailed=True)(dataset)
    with caplog.at_level("INFO", logger="dino2"):
        plain = Extractor(tiny_model(), num_workers=0, cache=cache, device="cpu")(dataset)
    assert "from the cache" in caplog.text and set(plain.tensors) == {"cls"}
    assert torch.equal(plain.cls, detailed.cls)
    anew = Extractor(tiny_model(), num_workers=0, device="cpu")(dataset)
    torch.testing.assert_close(plain.cls, anew.cls, rtol=1e-4, atol=1e-5)


def test_cache_notices_what_changed(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = FeatureCache(tmp_path / "cache")

    def extract(seed: int = 0, size: int = 32) -> torch.Tensor:
        caplog.clear()
        with caplog.at_level("INFO", logger="dino2"):
            return Extractor(tiny_model(seed=seed), image_size=size, num_workers=0, cache=cache, device="cpu")(
                make_dataset(str(images))
            ).cls

    original = extract()
    assert not torch.equal(extract(seed=1), original) and "from the cache" not in caplog.text  # other weights
    assert not torch.equal(extract(size=24), original) and "from the cache" not in caplog.text  # other transform
    assert torch.equal(extract(), original) and "from the cache" in caplog.text
    cv2.imwrite(str(images / "a" / "0.png"), np.zeros((40, 36, 3), np.uint8))
    changed = extract()
    assert "have changed since" in caplog.text
    assert not torch.equal(changed[0], original[0])
    torch.testing.assert_close(changed[1:], original[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("damage", ["truncated part", "flipped byte", "broken entry", "no entry"])
def test_damaged_cache_is_noticed(damage: str, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, dataset = FeatureCache(tmp_path / "cache"), make_dataset(str(images))
    first = Extractor(tiny_model(), num_workers=0, cache=cache, device="cpu")(dataset)
    (entry,) = cache.folder.iterdir()
    (part,) = entry.glob("part-*")
    content = bytearray(part.read_bytes())
    if damage == "truncated part":
        part.write_bytes(content[:-10])
    elif damage == "flipped byte":
        content[-5] ^= 1
        part.write_bytes(content)
    elif damage == "broken entry":
        (entry / "entry.json").write_text('{"version": ')
    else:
        (entry / "entry.json").unlink()
    with caplog.at_level("INFO", logger="dino2"):
        again = Extractor(tiny_model(), num_workers=0, cache=cache, device="cpu")(dataset)
    assert torch.equal(first.cls, again.cls)
    assert ("damaged" in caplog.text) == (damage != "no entry")
    assert json.loads((entry / "entry.json").read_text())["parts"]  # and repaired


def extract_part(folder: str) -> Features:
    cache = FeatureCache(Path(folder) / "cache")
    extract = Extractor(tiny_model(), num_workers=0, cache=cache, device="cpu")
    return extract(make_dataset(f"{folder}/images"))


def test_two_processes_extract_consecutive_parts(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = run_in_processes(2, extract_part, str(tmp_path))
    alone = Extractor(tiny_model(), num_workers=0, device="cpu")(make_dataset(str(images)))
    torch.testing.assert_close(torch.cat([part.cls for part in parts]), alone.cls, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat([part.indices for part in parts]), alone.indices)
    with caplog.at_level("INFO", logger="dino2"):  # one process reads what two have written
        cached = Extractor(tiny_model(), num_workers=0, cache=FeatureCache(tmp_path / "cache"), device="cpu")(
            make_dataset(str(images))
        )
    assert "from the cache" in caplog.text
    torch.testing.assert_close(cached.cls, alone.cls, rtol=1e-4, atol=1e-5)


def test_image_size() -> None:
    assert fitting_image_size(tiny_model(img_size=32), None) == 32
    assert fitting_image_size(tiny_model(img_size=520), None) == 224
    with pytest.raises(ConfigError, match=r"image size 30 .* patch size 8; .* 24 and 32"):
        fitting_image_size(tiny_model(), 30)


def test_diverged_model(images: Path) -> None:
    model = tiny_model()
    torch.nn.init.constant_(model.norm.bias, torch.nan)
    with pytest.raises(WeightsError, match="not finite"):
        Extractor(model, num_workers=0, device="cpu")(make_dataset(str(images)))


def test_classes_are_aligned_by_name(tmp_path: Path) -> None:
    train = make_dataset(str(write_images(tmp_path / "train", {"a": 1, "b": 1, "c": 1})))
    fewer = make_dataset(str(write_images(tmp_path / "fewer", {"a": 1, "c": 1})))
    other = make_dataset(str(write_images(tmp_path / "other", {"a": 1, "z": 1})))
    assert align_classes(train, train) is None
    mapping = align_classes(train, fewer)
    assert mapping is not None and mapping.tolist() == [0, 2]
    with pytest.raises(DataError, match="1 of 2 classes that the train dataset has not: z"):
        align_classes(train, other)
