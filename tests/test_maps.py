"""`dino2 depth` and `dino2 segment`: what is drawn is what the head gives, of photos and of every frame."""

import re
from fractions import Fraction
from pathlib import Path
from typing import get_args

import av
import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_run import write_weights

import dinov2cli
from dinov2cli.cli.main import main
from dinov2cli.console import logger
from dinov2cli.data.augmentations import normalize_pixels
from dinov2cli.errors import DataError
from dinov2cli.models.dense_heads import DenseModel, DepthHead, HeadConfig, SegmentationHead, fingerprint_of
from dinov2cli.models.load import load_model
from dinov2cli.models.load.dense import load_dense, save_head
from dinov2cli.requests.pictures import DepthMapsRequest, SegmentRequest
from dinov2cli.visualize import maps as picture_maps
from dinov2cli.visualize.drawing import (
    ClassDrawing,
    DepthDrawing,
    class_legend,
    depth_legend,
    near_is_bright,
    palette_of,
    voc_palette,
)
from dinov2cli.visualize.features import classes_of, depths_of, resize
from dinov2cli.visualize.video.stills import list_images
from dinov2cli.visualize.video.writer import open_writer

NAMES = ("background", "box", "ball")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, heads on it that tell bright from dark, two photos and a video."""
    folder = tmp_path_factory.mktemp("maps")
    (folder / "photos").mkdir()
    backbone = load_model(write_weights(folder))
    torch.manual_seed(1)
    said = {"backbone": str(folder / "weights.pth"), "fingerprint": fingerprint_of(backbone)}
    depth = DepthHead(48, 16, HeadConfig(task="depth", min_depth=0.5, max_depth=4.0, short_side=36, **said))
    classes = SegmentationHead(24, 3, HeadConfig(task="segmentation", classes=NAMES, **said))
    for convolution in (depth.conv_depth, classes.conv_seg):
        torch.nn.init.normal_(convolution.weight)
    save_head(depth, folder / "depth.pth")
    save_head(classes, folder / "classes.pth")
    for index, size in enumerate([(40, 61), (50, 44)]):
        cv2.imwrite(str(folder / f"photos/{index}.png"), photo(index, *size)[..., ::-1])
    with open_writer(folder / "in.mp4", time_base=Fraction(1, 25), rate=Fraction(25)) as writer:
        for index in range(7):
            writer.write(photo(index), Fraction(index, 25), Fraction(1, 25))
    return folder


def photo(index: int, height: int = 48, width: int = 64) -> np.ndarray:
    image = np.random.default_rng(index).integers(0, 60, (height, width, 3)).astype(np.uint8)
    cv2.circle(image, (15 + 4 * index, 20), 12, (240, 200, 40), -1)
    return image


def expected(head: Path, picture: np.ndarray, short_side: int) -> torch.Tensor:
    """The plain way: the picture at the network's size, the model, and its map stretched: [1, K, H, W]."""
    dense = load_dense(head)
    scale = short_side / min(picture.shape[:2])
    fitted = resize(picture, (round(picture.shape[0] * scale), round(picture.shape[1] * scale)))
    images = normalize_pixels(torch.from_numpy(fitted)[None], dense.backbone.images.statistics)
    with torch.no_grad():
        return dense.head.predict(dense.features(images), picture.shape[:2])


def run_command(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, words), "--cpu"])
    return int(stop.value.code or 0)


def test_classes_by_windows_are_the_mean_of_the_maps_of_all_that_show_a_patch(folder: Path, tmp_path: Path) -> None:
    words = ("--head", folder / "classes.pth", "--resolution", 5, "--save-values", "png")
    for how in ("slide", "whole"):
        assert run_command("segment", folder / "photos/0.png", tmp_path / f"{how}.png", *words, "--inference", how) == 0
    dense = load_dense(folder / "classes.pth")
    picture = cv2.imread(str(folder / "photos/0.png"))[..., ::-1].copy()  # 40 x 61: two windows of 40 x 40
    images = normalize_pixels(torch.from_numpy(picture)[None], dense.backbone.images.statistics)
    images = F.pad(images, (1, 2))
    total, shown = torch.zeros(1, 3, 5, 8), torch.zeros(8)
    with torch.no_grad():
        for first in (0, 3):
            total[..., first : first + 5] += dense.head(dense.features(images[..., 8 * first : 8 * first + 40]))
            shown[first : first + 5] += 1
    plain = F.interpolate(total / shown, picture.shape[:2], mode="bilinear")[0].argmax(0).numpy()
    found, whole = (np.asarray(Image.open(tmp_path / f"{how}.classes.png")) for how in ("slide", "whole"))
    assert (found == plain).mean() > 0.999 and (found != whole).any()


def test_depths_of_photos(folder: Path, tmp_path: Path) -> None:
    """As arrays, as PNG files of millimetres, and in colour: bright near by, with the scale below."""
    words = DepthMapsRequest(
        paths=(folder / "photos", tmp_path / "out"), head=str(folder / "depth.pth"), save_values="npy", device="cpu"
    )
    written = dinov2cli.run(words)
    assert [path.name for path, _ in written.files] == ["out", "0.depth.npy", "1.depth.npy"]
    found = {}
    for index in range(2):
        picture = cv2.imread(str(folder / f"photos/{index}.png"))[..., ::-1]
        found[index] = np.load(tmp_path / f"out/{index}.depth.npy")
        plain = expected(folder / "depth.pth", np.ascontiguousarray(picture), 36)[0, 0].numpy()
        np.testing.assert_allclose(found[index], plain, atol=1e-4)
        drawn = cv2.imread(str(tmp_path / f"out/{index}.png"))
        assert drawn.shape[0] > picture.shape[0] and drawn.shape[1] == picture.shape[1]
        near, far = (
            drawn[: len(plain)][mask].mean() for mask in (plain <= plain.min() + 0.05, plain >= plain.max() - 0.05)
        )
        assert near > far + 50
    ends = np.percentile(np.concatenate([each.ravel() for each in found.values()]), [1, 99])
    said = re.search(r"2 photos, from (\S+) m \(bright\) to (\S+) m \(dark\)", str(written))
    np.testing.assert_allclose([float(end) for end in said.groups()] if said else [], ends, atol=0.1)
    one = [folder / "photos/0.png", tmp_path / "one.png", "--head", folder / "depth.pth"]
    assert (
        run_command(
            "depth", *one, "--save-values", "png", "--no-legend", "--near", 1, "--far", 2, "--colormap", "magma"
        )
        == 0
    )
    millimetres = cv2.imread(str(tmp_path / "one.depth.png"), cv2.IMREAD_UNCHANGED)
    assert millimetres.dtype == np.uint16 and np.abs(millimetres / 1000 - found[0]).max() < 6e-4
    drawn = cv2.imread(str(tmp_path / "one.png"))[..., ::-1]
    np.testing.assert_array_equal(drawn, near_is_bright(found[0] - 1, "magma"))
    assert list_images(tmp_path / "out")  # of nothing but our own pictures, these are meant
    cv2.imwrite(str(tmp_path / "out/photo.png"), photo(0))
    assert [path.name for path in list_images(tmp_path / "out")] == ["photo.png"]


def test_classes_of_photos(folder: Path, tmp_path: Path) -> None:
    """A mask with a palette, its colours over the picture but for black, names and shares in words; a sheet."""
    head = ("--head", folder / "classes.pth", "--resolution", 5)
    picture = np.ascontiguousarray(cv2.imread(str(folder / "photos/0.png"))[..., ::-1])
    plain = expected(folder / "classes.pth", picture, 40)[0].argmax(0).numpy()
    assert len(np.unique(plain)) > 1
    options = ("--save-values", "png", "--no-legend", "--opacity", 1)
    assert run_command("segment", folder / "photos/0.png", tmp_path / "one.png", *head, *options) == 0
    with Image.open(tmp_path / "one.classes.png") as mask:
        assert mask.mode == "P" and (np.asarray(mask) == plain).mean() > 0.999
        colors = np.asarray(mask.convert("RGB"))
    drawn = cv2.imread(str(tmp_path / "one.png"))[..., ::-1]
    np.testing.assert_array_equal(drawn, np.where(colors.any(-1, keepdims=True), colors, picture))
    written = dinov2cli.run(
        SegmentRequest(
            paths=(folder / "photos", tmp_path / "sheet.png"), head=str(folder / "classes.pth"), device="cpu"
        )
    )
    assert any(name in str(written) for name in NAMES) and "2 photos, " in str(written)
    assert cv2.imread(str(tmp_path / "sheet.png")).shape[1] == 1280


@pytest.mark.parametrize("command", ("depth", "segment"))
def test_every_frame_of_a_video(folder: Path, tmp_path: Path, command: str) -> None:
    kind = {"depth": "depth", "segment": "classes"}[command]
    output = (tmp_path / "out.mp4", "--head", folder / f"{kind}.pth", "--resolution", 5)
    options = ("--layout", "side-by-side", "--save-values", "npy", "--no-steady")
    assert run_command(command, folder / "in.mp4", *output, *options) == 0
    with av.open(str(folder / "in.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(str(tmp_path / "out.mp4")) as container:
        drawn = list(container.decode(video=0))
    assert [round(frame.time * 25) for frame in drawn] == list(range(7))
    assert drawn[0].width == 128 and drawn[0].height > 48
    for index, frame in enumerate(frames):
        left = drawn[index].to_ndarray(format="rgb24")[:48, :64]
        assert np.abs(left.astype(int) - frame).mean() < 6
        found = np.load(tmp_path / f"out.{kind}/frame_{index + 1:06d}.npy")
        plain = expected(folder / f"{kind}.pth", frame, 40)[0]
        if command == "depth":
            np.testing.assert_allclose(found, plain[0], atol=0.02)
        else:
            assert (found == plain.argmax(0).numpy()).mean() > 0.97
    assert run_command(command, folder / "photos", tmp_path / "photos.gif", *output[1:]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out.mp4", f"out.{kind}", "photos.gif"])


def test_what_stands_still_is_steady(folder: Path, tmp_path: Path) -> None:
    """Noise is averaged over frames, and what moves is where it is."""
    noise = np.random.default_rng(0)
    (tmp_path / "frames").mkdir()
    for index in range(12):
        image = np.full((48, 96, 3), 70.0)
        image[8:24, 4 * index : 4 * index + 24] = (240, 200, 40)
        noisy = np.clip(image + noise.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f"frames/{index:02}.png"), noisy)
    changes = {}
    for option in ("--steady", "--no-steady"):
        words = (tmp_path / "frames", tmp_path / "o.gif", "--head", folder / "depth.pth", "--resolution", 6)
        assert run_command("depth", *words, "--save-values", "npy", option) == 0
        found = np.stack([np.load(path) for path in sorted((tmp_path / "o.depth").iterdir())])
        changes[option] = [np.abs(np.diff(found[6:, part], axis=0)).mean() for part in (slice(32, 48), slice(8, 24))]
    (still, moving), (still_before, _) = changes["--steady"], changes["--no-steady"]
    assert still < 0.3 * still_before and moving > 5 * still


def test_an_interrupted_video_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def draw(drawing: DepthDrawing, picture: np.ndarray, *_: object) -> np.ndarray:
        drawn.append(1)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return picture

    monkeypatch.setattr(picture_maps, "draw", draw)
    words = ("depth", folder / "in.mp4", tmp_path / "out.mp4", "--head", folder / "depth.pth", "--save-values", "png")
    assert run_command(*words) == 130
    assert list(tmp_path.iterdir()) == []


def test_stretching_is_the_heads() -> None:
    torch.manual_seed(0)
    for low, size in (((5, 7), (48, 33)), ((9, 4), (5, 100)), ((1, 3), (70, 3))):
        logits = torch.randn(1, 4, *low)
        plain = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0]
        found = classes_of(logits[0].permute(1, 2, 0).numpy(), size)
        margin = plain.topk(2, dim=0)[0].diff(dim=0)[0].abs() > 1e-5
        assert found.shape == size and found.dtype == np.uint8 and margin.float().mean() > 0.99
        assert np.array_equal(found[margin], plain.argmax(0).numpy()[margin])
        depth = depths_of(logits[0, :1].permute(1, 2, 0).numpy(), (-0.5, 0.5), size)
        clamped = F.interpolate(logits[:, :1].clamp(-0.5, 0.5), size=size, mode="bilinear")[0, 0]
        np.testing.assert_allclose(depth, clamped, atol=1e-4)
    assert classes_of(np.zeros((2, 2, 300), np.float32), (4, 4)).dtype == np.uint16


def test_ends_of_the_scale() -> None:
    """The nearest and farthest percent, wherever they come from; what is given counts; nothing between them is said."""
    head = DepthHead(8, config=HeadConfig(task="depth", min_depth=1, max_depth=5))
    maps = [np.linspace(2, 3, 2000, dtype=np.float32).reshape(40, 50, 1), np.full((40, 50, 1), 3, np.float32)]
    found = []
    for near, far in ((None, None), (2.5, None), (None, 9.0)):
        drawing = DepthDrawing(head, near, far)
        for each in maps:
            drawing.observe(each)
        drawing.settle()
        found.append((drawing.near, drawing.far))
    np.testing.assert_allclose(found, [(2.02, 3), (2.5, 3), (2.02, 9)], atol=0.002)
    for near, far, message in (
        (4.0, None, "--near 4: nothing .* is farther"),
        (None, 1.0, "--far 1: nothing .* nearer"),
    ):
        drawing = DepthDrawing(head, near, far)
        drawing.observe(maps[0])
        with pytest.raises(DataError, match=message + "; depths are about 2.01 to 2.99 m"):
            drawing.settle()
    flat = DepthDrawing(head, None, None)
    flat.observe(np.full((4, 4, 1), 5, np.float32))
    flat.settle()
    assert flat.near < 5 <= flat.far


def test_palettes_and_legends() -> None:
    colors = voc_palette(256)
    assert len(set(colors)) == 256 and colors[:3] == [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
    assert colors[15] == (192, 128, 128)  # a person, as in VOC's masks
    assert palette_of(NAMES, 3) == colors[:3] and palette_of((), 3) == colors[1:4]
    for name in get_args(DepthMapsRequest.model_fields["colormap"].annotation):
        scale = near_is_bright(np.linspace(0, 1, 50)[None], name)[0].astype(float) @ [0.3, 0.59, 0.11]
        assert (np.diff(scale) < 0.5).all() and scale[0] > scale[-1] + 150, name
    assert (depth_legend(1, 2, 99, "viridis") != depth_legend(1, 2, 99)).any()
    for width in (20, 640):
        assert depth_legend(0.5, 12, width).shape[1] == width
        lines = [class_legend([((255, 0, 0), "a long name")] * count, width).shape[0] for count in (1, 60)]
        assert lines[1] > lines[0]
    assert not np.array_equal(depth_legend(0.5, 12, 640), depth_legend(0.5, 13, 640))


def test_a_head_on_another_model_is_told(folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    other = load_model(folder / "weights.pth")
    torch.nn.init.normal_(other.patch_embed.proj.weight)
    with caplog.at_level("WARNING", logger="dino2"):
        load_dense(folder / "depth.pth")
        assert "this is another model" not in caplog.text
        load_dense(folder / "depth.pth", other)
    assert "the head was trained on" in caplog.text and "this is another model" in caplog.text


@pytest.mark.parametrize(("words", "message"), [
    ("depth photos/0.png o.png --head classes.pth", "is a head for segmentation: dino2 segment draws it"),
    ("segment photos/0.png o.png --head depth.pth", "is a head for depth: dino2 depth draws it"),
    ("segment photos/0.png o.png", "--head is missing"),
    ("depth photos/0.png o.png --head nowhere", "--head nowhere: is no file, and no released head has that name"),
    ("depth photos/0.png o.png --head weights.pth", "no head for segmentation or depth"),
    ("depth in.mp4 o.png --head depth.pth", "in.mp4 is no image, and of a video comes a video"),
    ("depth in.mp4 photos/0.png o.mp4 --head depth.pth", "in.mp4: a video is drawn by itself"),
    ("depth photos o.png --head depth.pth --fps 5", "--fps is for a video, and o.png is none"),
    ("depth in.mp4 o.mp4 --head depth.pth --fps 5", "is a video and has its own times"),
    ("depth in.mp4 o.mp4 --head depth.pth --show-channels 0", "a video has red, green and blue"),
    ("depth photos o.png --head depth.pth --near 3 --far 3", "--near 3 must be less than --far 3"),
    ("depth photos o.jpg --head depth.pth", "unknown output type '.jpg'"),
    ("depth x.depth.png x.png --head depth.pth --save-values png", "is an input, and --save-values would write it"),
    ("depth photos o.png --head far.pth --save-values png", "holds depths up to 256 m, and the head's go to 300 m"),
    ("segment photos o.png --head wide.pth", "with 36 inputs does not fit a backbone 24 wide with 4 blocks"),
    ("segment photos o.png --head orphan.pth", "does not say which model it was trained on"),
])  # fmt: skip
def test_wrong_words(folder: Path, words: str, message: str, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    if not (folder / "x.depth.png").exists():
        cv2.imwrite("x.depth.png", photo(0))
        known = {"backbone": "weights.pth"}
        save_head(DepthHead(48, config=HeadConfig(task="depth", max_depth=300, **known)), Path("far.pth"))
        save_head(SegmentationHead(36, 2, HeadConfig(task="segmentation", **known)), Path("wide.pth"))
        save_head(SegmentationHead(24, 2), Path("orphan.pth"))
    before = sorted(path.name for path in folder.rglob("*"))
    assert run_command(*words.split()) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_other_channels(tmp_path: Path) -> None:
    """A model of one channel draws grey photos, and refuses a video."""
    torch.manual_seed(0)
    (tmp_path / "run").mkdir()
    write_weights(tmp_path / "run")
    grey = load_model(tmp_path / "run/weights.pth", in_chans=1)
    dense = DenseModel(grey, SegmentationHead(24, 3))
    assert ClassDrawing(dense.head, 0.5).names == ("class 0", "class 1", "class 2")
    torch.save(grey.state_dict(), tmp_path / "run/grey.pth")
    save_head(dense.head, tmp_path / "head.pth")
    cv2.imwrite(str(tmp_path / "a.png"), photo(0)[..., 0])
    words = ("--head", tmp_path / "head.pth", "--model", tmp_path / "run/grey.pth", "--resolution", 4)
    assert run_command("segment", tmp_path / "a.png", tmp_path / "b.png", *words) == 0
    assert run_command("segment", tmp_path / "a.png", tmp_path / "b.gif", *words) == 2
    assert not (tmp_path / "b.gif").exists()
