"""From the picture file on: what opens an export, with the preprocessing that it carries, gives dino2's features.

Bounds are what was measured, and a little: over photos of many sizes, transformers' pixels differ by at most two grey
levels, except where its centre crop lies a pixel further up or left (see `exporter`), every fourth oblong photo.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file
from skimage import data
from torch import Tensor
from weight_samples import PLAIN, export_model, sample_model, save

from dinov2cli.data.pixels import normalize_image, resize
from dinov2cli.data.transforms import EvalTransform
from dinov2cli.eval import embed
from dinov2cli.export.exporter import ExportError
from dinov2cli.models.load import load_model
from dinov2cli.requests.eval import EmbedRequest

# Of a training at 64 pixels; and one of a large native size, which is evaluated at 224.
SMALL = PLAIN.changed(patch_size=8, img_size=64)
LARGE = PLAIN.changed(patch_size=32, img_size=448)
# Width and height of photos: square, oblong, odd, with a crop that lies on a half pixel and to be rounded down or up.
SIZES = ((300, 300), (400, 300), (299, 431), (640, 211), (97, 91), (73, 73), (70, 60), (311, 300), (640, 427))
NAMES = {"hf": "m", "timm": "m", "onnx": "m.onnx", "torch-export": "m.pt2", "official": "m.pth",
         "safetensors": "m.safetensors"}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG and PNG files, colour and gray."""
    folder = tmp_path_factory.mktemp("photos")
    for i, (width, height) in enumerate(SIZES):
        image = Image.fromarray((data.coffee, data.astronaut, data.camera)[i % 3]())
        image.resize((width, height)).save(folder / f"{i}.{('jpg', 'png')[i % 2]}")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a phone held upright
    Image.fromarray(data.coffee()).resize((400, 300)).save(folder / "turned.jpg", exif=exif)
    return folder


def source_of(architecture: Any, folder: Path) -> Path:
    """Weights with a config beside them, as a run has them."""
    source = folder / "source" / "teacher.pth"
    save(sample_model(architecture).state_dict(), source)
    keys = {"arch": "vit_tiny", "depth": 2, "patch_size": architecture.patch_size}
    (source.parent / "config.yaml").write_text(json.dumps({"student": keys}))
    return source


def embedded(checkpoint: Path, photos: Path, output: Path) -> Tensor:
    """`dino2 embed`: class tokens of the photos in the order of their names."""
    embed.run(EmbedRequest(checkpoint=str(checkpoint), data=str(photos), output=output, num_workers=0, no_cache=True))
    return load_file(output)["cls"]


def files_of(photos: Path) -> list[Path]:
    return sorted(photos.iterdir())


def pixels_as_told(file: Path, how: dict[str, Any]) -> Tensor:
    """What the words of an export say, done with Pillow alone."""
    assert how["exif_orientation"] is True
    image = ImageOps.exif_transpose(Image.open(file)).convert(how["color"])
    assert (how["interpolation"], how["antialias"]) == ("bicubic", True)
    width, height = image.size
    side, crop = how["resize_shorter_side"], how["center_crop"]
    size = tuple(int(side * length / min(width, height)) for length in (width, height))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - crop) / 2) for length in size)
    values = np.asarray(image.crop((left, top, left + crop, top + crop)), np.float32) * how["rescale_factor"]
    return torch.from_numpy((values - np.array(how["mean"])) / np.array(how["std"])).float().permute(2, 0, 1)[None]


def assert_close(theirs: Tensor, ours: Tensor, least_cosine: float) -> None:
    assert torch.nn.functional.cosine_similarity(theirs, ours).min() > least_cosine


@pytest.mark.parametrize("format_name", ["official", "safetensors", "hf", "timm"])
def test_embedding_an_export_gives_the_same_bits(tmp_path: Path, photos: Path, format_name: str) -> None:
    source = source_of(SMALL, tmp_path)
    export_model(source, format_name, tmp_path / NAMES[format_name])
    theirs = embedded(tmp_path / NAMES[format_name], photos, tmp_path / "theirs.safetensors")
    assert torch.equal(theirs, embedded(source, photos, tmp_path / "ours.safetensors"))


@pytest.mark.parametrize("architecture", [SMALL, LARGE], ids=["native", "evaluated at 224"])
@torch.no_grad()
def test_transformers_own_processor_and_model(tmp_path: Path, photos: Path, architecture: Any) -> None:
    transformers = pytest.importorskip("transformers")
    source = source_of(architecture, tmp_path)
    size = str(min(architecture.img_size, 224))
    export_model(source, "hf", tmp_path / "m", image_size=size)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "m")
    model = transformers.AutoModel.from_pretrained(tmp_path / "m").eval()
    ours = embedded(source, photos, tmp_path / "ours.safetensors")
    transform = EvalTransform.at(int(size))
    shifted = 0
    for file, cls in zip(files_of(photos), ours, strict=True):
        image = ImageOps.exif_transpose(Image.open(file))  # as transformers does with a file's name
        pixels = processor(str(file), return_tensors="pt").pixel_values
        theirs = model(pixel_values=pixels).last_hidden_state[:, 0]
        size_of = [int(transform.resize * length / min(image.size)) for length in reversed(image.size)]
        resized = resize(np.array(image.convert("RGB")), *size_of)
        top, left = ((length - transform.crop) // 2 for length in size_of)
        cut = resized[top : top + transform.crop, left : left + transform.crop]
        difference = (pixels[0] - normalize_image(cut)).abs()
        assert difference.max() < 2.01 / 255 / 0.224 and difference.mean() < 1e-3
        rounded_up = (max(size_of) - transform.crop) % 4 == 3
        shifted += rounded_up
        assert_close(theirs, cls[None], 0.95 if rounded_up else 0.99999)
    assert 0 < shifted < len(SIZES) / 2


@torch.no_grad()
def test_timms_own_transform_and_model(tmp_path: Path, photos: Path) -> None:
    pytest.importorskip("torchvision")
    timm = pytest.importorskip("timm")
    source = source_of(SMALL, tmp_path)
    folder = export_model(source, "timm", tmp_path / "m")
    file = export_model(source, "timm", tmp_path / "m.safetensors")
    ours = embedded(source, photos, tmp_path / "ours.safetensors")
    for result in (folder, file):
        model = eval(result.notes[-1].removeprefix("open with "), {"timm": timm}).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        images = torch.stack(
            [transform(ImageOps.exif_transpose(Image.open(file)).convert("RGB")) for file in files_of(photos)]
        )
        assert_close(model.forward_features(images)[:, 0], ours, 0.99999)


def test_timms_words_give_our_sizes() -> None:
    """As timm computes them: the side before the crop, rounded down."""
    from dinov2cli.models.load.layouts import timm

    for patch in (4, 7, 8, 14, 16):
        for side in range(patch, 300, patch):
            how = EvalTransform.at(side).as_dict()
            told = timm.pretrained_cfg(PLAIN.changed(patch_size=patch, img_size=side), how)
            assert math.floor(told["input_size"][1] / told["crop_pct"]) == how["resize_shorter_side"]


@pytest.mark.slow
@torch.no_grad()
def test_graphs_with_the_preprocessing_that_they_carry(tmp_path: Path, photos: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    source = source_of(SMALL, tmp_path)
    for format_name in ("onnx", "torch-export"):
        export_model(source, format_name, tmp_path / NAMES[format_name])
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"))
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    extra = {"preprocessing.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
    assert json.loads(extra["preprocessing.json"]) == json.loads(metadata["dino2.preprocessing"])
    how = json.loads(metadata["dino2.preprocessing"])
    assert how == EvalTransform.at(64).as_dict()
    images = torch.cat([pixels_as_told(file, how) for file in files_of(photos)])
    ours = embedded(source, photos, tmp_path / "ours.safetensors")
    assert_close(torch.from_numpy(session.run(["cls"], {"images": images.numpy()})[0]), ours, 0.99999)
    assert_close(program(images)[0], ours, 0.99999)


def test_files_of_weights_say_their_preprocessing(tmp_path: Path) -> None:
    for format_name in ("safetensors", "timm"):
        export_model(source_of(LARGE, tmp_path), format_name, tmp_path / "m.safetensors", overwrite=True)
        with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["dino2.preprocessing"]) == EvalTransform.at(224).as_dict()


@torch.no_grad()
def test_position_embeddings_for_another_size(tmp_path: Path) -> None:
    """What no other ecosystem resizes as we do is written for the size that is asked for."""
    source = source_of(LARGE, tmp_path)
    images = torch.randn(1, 3, 224, 224)
    for format_name in ("hf", "official"):
        export_model(source, format_name, tmp_path / NAMES[format_name], image_size="224")
        again = load_model(tmp_path / NAMES[format_name])
        assert again.config.img_size == 224
        torch.testing.assert_close(again(images), load_model(source)(images))
    with pytest.raises(Exception, match="for square images only") as caught:
        export_model(source, "hf", tmp_path / "n", image_size="224x448")
    assert not isinstance(caught.value, ExportError)
    told = export_model(source, "hf", tmp_path / "n").notes
    assert any("--image-size 224, the size at which dino2 evaluates" in note for note in told)
