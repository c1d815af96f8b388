"""Images with labels for every pixel: what is recognised, read and refused, and that labels stay on their pixels."""

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from dense_sets import COLOURS, pair, write_depths, write_masks
from PIL import Image

from dinov2cli.data.datasets import UnreadableImage, make_dataset
from dinov2cli.data.datasets.dense import DenseDataset
from dinov2cli.data.datasets.dense_layouts import KITTI, NYU
from dinov2cli.data.datasets.recognise_dense import dense_dataset, dense_string
from dinov2cli.data.decoding import USUAL, Reading
from dinov2cli.data.dense_transforms import CentreCrop, DepthCrop, SegmentationCrop, counted_part, rotated, used_part
from dinov2cli.errors import DataError


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def ade(root: Path) -> Path:
    for part in ("training", "validation"):
        save(root / "images" / part / "ADE_1.jpg", np.zeros((4, 6, 3), np.uint8))
        save(root / "annotations" / part / "ADE_1.png", np.array([[0, 1, 150, 2, 3, 0]] * 4, np.uint8))
    return root


def voc(root: Path) -> Path:
    mask = Image.fromarray(np.array([[0, 20, 255]] * 2, np.uint8), "P")
    mask.putpalette([i % 251 for i in range(768)])
    for folder in ("SegmentationClass", "SegmentationClassAug"):
        (root / folder).mkdir(parents=True)
        mask.save(root / folder / "2007_1.png")
    save(root / "JPEGImages" / "2007_1.jpg", np.zeros((2, 3, 3), np.uint8))
    save(root / "JPEGImages" / "2007_2.jpg", np.zeros((2, 3, 3), np.uint8))  # without a mask, and not listed
    for name in ("train", "val", "trainaug"):
        (root / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("2007_1\n")
    return root


def cityscapes(root: Path) -> Path:
    for part in ("train", "val"):
        save(root / "leftImg8bit" / part / "ulm" / "ulm_0_leftImg8bit.png", np.zeros((2, 4, 3), np.uint8))
        save(root / "gtFine" / part / "ulm" / "ulm_0_gtFine_labelIds.png", np.array([[0, 7, 33, 29]] * 2, np.uint8))
    return root


@pytest.mark.parametrize("write, name, classes, row", [
    (ade, "ADE20k", 150, [255, 0, 149, 1, 2, 255]),
    (voc, "VOC", 21, [0, 20, 255]),
    (cityscapes, "Cityscapes", 19, [255, 0, 18, 255]),
])  # fmt: skip
def test_a_benchmark_is_recognised_by_its_folders_and_read_with_its_classes(
    write: object, name: str, classes: int, row: list[int], tmp_path: Path
) -> None:
    root = write(tmp_path / "data")  # type: ignore[operator]
    for part in ("TRAIN", "VAL"):
        string = dense_string(str(root), part, "masks")  # type: ignore[arg-type]
        assert string.startswith(f"{name}:") and f"split={part}" in string
        dataset = dense_dataset(string, "masks")
        assert dataset.n_classes == classes and len(dataset) == 1  # type: ignore[attr-defined]
        assert dataset.label(0)[0].tolist() == row
        assert dense_string(string, part, "masks") == string  # type: ignore[arg-type]
    assert dense_string(f"{name}:root={root}", "VAL", "masks", of_train=True).endswith("split=VAL")
    assert make_dataset(string).image(0).shape[2] == 3  # images like others, for a training
    assert set(make_dataset(string).targets()) == {-1}
    if name == "VOC":
        assert dense_dataset(f"VOC:root={root}:split=trainaug", "masks").label_path(0).endswith("Aug/2007_1.png")


@pytest.mark.parametrize(
    "inner", ["images/train masks/train", "train/images train/masks", "training/img training/labels"]
)
def test_any_folder_of_images_beside_masks_is_recognised(inner: str, tmp_path: Path) -> None:
    images, masks = (tmp_path / each for each in inner.split())
    save(images / "a" / "1.jpg", np.zeros((2, 2, 3), np.uint8))
    save(masks / "a" / "1.png", np.array([[0, 3], [255, 1]], np.uint8))
    (tmp_path / "classes.txt").write_text("sky\nsea\nsand\nship\n")
    dataset = dense_dataset(dense_string(str(tmp_path), "TRAIN", "masks"), "masks")
    assert dataset.label(0).tolist() == [[0, 3], [255, 1]]
    assert dataset.class_names == ("sky", "sea", "sand", "ship") and dataset.n_classes == 4  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"VAL|holds"):
        dense_string(str(tmp_path), "VAL", "masks")


def test_the_number_of_classes_is_the_largest_of_all_masks_and_one(tmp_path: Path) -> None:
    root = write_masks(tmp_path)
    dataset = dense_dataset(dense_string(str(root), "TRAIN", "masks"), "masks")
    assert dataset.n_classes == 3  # type: ignore[attr-defined]


def test_masks_are_numbers_however_they_are_stored(tmp_path: Path) -> None:
    numbers = np.array([[0, 1, 1], [1, 0, 1]], np.uint8)
    images, masks = tmp_path / "images", tmp_path / "masks"
    for i in range(7):
        save(images / f"{i}.png", np.zeros((2, 3, 3), np.uint8))
    save(masks / "0.png", numbers)
    save(masks / "1.png", numbers.astype(bool))
    save(masks / "2.png", numbers.astype(np.uint16))
    save(masks / "3.tif", numbers)
    np.save(masks / "4.npy", numbers.astype(np.int64))
    palette = Image.fromarray(numbers, "P")
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.save(masks / "5.png", bits=2)
    write_grey_png(masks / "6.png", 3, 2, 2, [bytes([0b00010100]), bytes([0b01000100])])
    dataset = dense_dataset(f"Masks:images={images}:masks={masks}", "masks")
    for i in range(7):
        assert dataset.label(i).tolist() == numbers.tolist(), dataset.label_path(i)


def write_grey_png(path: Path, width: int, height: int, bits: int, rows: list[bytes]) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


@pytest.mark.parametrize("mask, words", [
    (np.zeros((4, 5, 3), np.uint8), "colours"),
    (np.zeros((4, 6), np.uint8), "is 6 x 4 pixels, and its image 5 x 4"),
    (np.full((4, 5), 300, np.uint16), "the number 300"),
    (np.full((4, 5), 7, np.uint8), "holds the class 7; there are 3, 0 to 2"),
])  # fmt: skip
def test_what_is_no_mask_is_refused_by_name(mask: np.ndarray, words: str, tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png", np.zeros((4, 5, 3), np.uint8))
    save(tmp_path / "masks" / "a.png", mask)
    dataset = dense_dataset(f"Masks:images={tmp_path}/images:masks={tmp_path}/masks:classes=3", "masks")
    with pytest.raises(UnreadableImage, match=rf"masks/a\.png.*{re.escape(words)}"):
        dataset.pair(0)


def test_images_and_labels_are_paired_by_name_or_refused(tmp_path: Path) -> None:
    root = write_masks(tmp_path)
    string = dense_string(str(root), "TRAIN", "masks")
    (root / "masks/train/3.png").rename(root / "masks/train/30.png")
    with pytest.raises(DataError, match=r"1 of 8 images have no labels in .*masks/train: 3\.png"):
        dense_dataset(string, "masks")
    (root / "images/train/3.png").unlink()
    with pytest.raises(DataError, match=r"1 of 8 files of labels have no image in .*images/train: 30\.png"):
        dense_dataset(string, "masks")
    save(root / "images/train/30.jpg", np.zeros((32, 40, 3), np.uint8))
    assert len(dense_dataset(string, "masks")) == 8
    save(root / "images/train/30.png", np.zeros((32, 40, 3), np.uint8))
    with pytest.raises(DataError, match=r"30\.jpg and 30\.png have one name"):
        dense_dataset(string, "masks")


@pytest.mark.parametrize("text, words", [
    ("SamplePhotos", "neither a folder nor a dataset with masks"),
    ("NYUd:root=/nyu", "NYUd has no masks"),
    ("{root}", "no images with masks of any layout that is known; it holds photos"),
    ("Masks:images={root}/photos:masks={root}/gone", "gone is not a folder"),
    ("VOC:root={root}:split=TEST", "no split 'TEST'; there are TRAIN and VAL and TRAINAUG"),
])  # fmt: skip
def test_what_has_no_masks_is_told_what_would_be_right(text: str, words: str, tmp_path: Path) -> None:
    save(tmp_path / "photos" / "a.png", np.zeros((4, 5, 3), np.uint8))
    with pytest.raises(DataError, match=re.escape(words)):
        dense_dataset(dense_string(text.format(root=tmp_path), "TRAIN", "masks"), "masks")


@pytest.mark.parametrize("of, orientation", [
    *(("stored", each) for each in (1, 2, 3, 6, 8)),
    ("shown", 1), ("shown", 6), ("shown", 8),  # of 2 and 3 the size does not tell
])  # fmt: skip
def test_labels_lie_on_their_pixels_whatever_exif_says(of: str, orientation: int, tmp_path: Path) -> None:
    image, classes = pair(np.random.default_rng(5), 24, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "images" / "a.png", image, exif=exif)
    shown = make_dataset(f"folder:{path.parent}").image(0)
    told = (shown[:, :, None] - COLOURS.astype(int)[None, None]).__abs__().sum(3).argmin(2)
    save(tmp_path / "masks" / "a.png", classes if of == "stored" else told.astype(np.uint8))
    dataset = dense_dataset(f"Masks:images={path.parent}:masks={tmp_path}/masks", "masks")
    pixels, labels = dataset.pair(0)
    assert np.array_equal(pixels, shown) and np.array_equal(labels, told)
    if of == "stored":
        unturned = Reading(USUAL.images.model_copy(update={"exif_orientation": False}))
        assert np.array_equal(dataset.pair(0, unturned)[1], classes)


def test_depth_is_metres_and_zero_where_it_is_not_known(tmp_path: Path) -> None:
    images, depths = tmp_path / "images", tmp_path / "depth"
    for i in range(5):
        save(images / f"{i}.png", np.zeros((1, 4, 3), np.uint8))
    whole = np.array([[0, 500, 2000, 65535]], np.uint16)
    save(depths / "0.png", whole)
    tifffile.imwrite(depths / "4.tif", whole, photometric="minisblack")
    floats = np.array([[np.nan, 0.5, -2.0, np.inf]], np.float32)
    save(depths / "1.tiff", floats)
    np.save(depths / "2.npy", floats.astype(np.float64))
    save(depths / "3.png", np.array([[0, 5, 20, 255]], np.uint8))
    dataset = dense_dataset(f"Depths:images={images}:depths={depths}:scale=500", "depth")
    assert dataset.label(0).tolist() == dataset.label(4).tolist() == [[0, 1, 4, np.float32(131.07)]]
    assert dataset.label(1).tolist() == dataset.label(2).tolist() == [[0, 0.5, 0, 0]]
    with pytest.raises(UnreadableImage, match=r"3\.png: uint8 \[1, 4, 1\] is no depth; 16-bit or floating point"):
        dataset.label(3)
    with pytest.raises(DataError, match="scale=0 is no number above 0"):
        dense_dataset(f"Depths:images={images}:depths={depths}:scale=0", "depth")


def test_lists_of_nyu_and_kitti_are_recognised(tmp_path: Path) -> None:
    nyu, kitti = tmp_path / "nyu", tmp_path / "kitti"
    save(nyu / "hall" / "rgb_1.jpg", np.zeros((480, 640, 3), np.uint8))
    save(nyu / "hall" / "sync_depth_1.png", np.full((480, 640), 1500, np.uint16))
    for name in ("nyu_train.txt", "nyu_test.txt"):
        (nyu / name).write_text("/hall/rgb_1.jpg /hall/sync_depth_1.png 518.8579\n")
    save(kitti / "input" / "d" / "1.png", np.zeros((375, 1242, 3), np.uint8))
    save(kitti / "gt_depth" / "p" / "1.png", np.full((375, 1242), 2560, np.uint16))
    for name in ("kitti_eigen_train.txt", "kitti_eigen_test.txt"):
        (kitti / name).write_text("d/1.png p/1.png 721.5377\nd/2.png None 721.5377\n")
    for root, name, metres, protocol in ((nyu, "NYUd", 1.5, NYU), (kitti, "KITTI", 10.0, KITTI)):
        string = dense_string(str(root), "VAL", "depth")
        dataset: DenseDataset = dense_dataset(string, "depth")
        assert string == f"{name}:root={root}:split=VAL" and len(dataset) == 1 and dataset.protocol is protocol  # type: ignore[attr-defined]
        image, depth = dataset.pair(0)
        assert set(np.unique(depth)) == {np.float32(metres)}
        sample = DepthCrop(protocol)(image, depth, np.random.default_rng(0))
        assert sample.image.shape[1:] == sample.labels.shape == protocol.crop
    assert used_part(image, depth, KITTI, trains=False)[1].shape == (352, 1216)
    assert counted_part(480, 640, NYU) == (slice(45, 471), slice(41, 601))


@pytest.mark.parametrize("crop", [16, 64])
def test_crops_keep_labels_on_their_pixels(crop: int) -> None:
    rng = np.random.default_rng(0)
    for k in range(20):
        _, classes = pair(rng)
        classes[1] = 255
        image = np.repeat(classes[..., None], 3, 2)  # a grey level for each class, dark but for what is ignored
        statistics = USUAL.images.statistics._replace(mean=(0.0,) * 3, std=(1.0,) * 3)
        for transform in (SegmentationCrop(32, crop, statistics=statistics), CentreCrop(32, crop, statistics)):
            again = (np.random.default_rng(k),) if isinstance(transform, SegmentationCrop) else ()
            sample = transform(image, classes, *again)  # type: ignore[operator]
            assert sample.image.shape == (3, crop, crop) and sample.labels.shape == (crop, crop)
            bright = sample.image.mean(0) > 0.5
            agrees = bright == (sample.labels == 255)
            padded = sample.image.abs().sum(0) == 0  # filled up with zeros, and ignored
            assert ((sample.labels == 255) | ~padded | ~bright).all() and (agrees | padded).float().mean() > 0.8


def test_a_crop_of_nearly_one_class_is_drawn_again() -> None:
    classes = np.zeros((100, 100), np.uint8)
    classes[:, 50:] = 1
    transform = SegmentationCrop(100, 40, (1.0, 1.0))
    shares = []
    for k in range(40):
        sample = transform(np.zeros((100, 100, 3), np.uint8), classes, np.random.default_rng(k))
        shares.append(float((sample.labels == 0).float().mean()))
    assert np.mean([max(share, 1 - share) < 0.75 for share in shares]) > 0.85  # 20 % by chance


def test_rotation_turns_depth_with_the_image_and_knows_nothing_beyond() -> None:
    depth = np.ones((60, 60), np.float32)
    depth[20:40, 10:50] = 3
    image = np.repeat((depth * 50).astype(np.uint8)[..., None], 3, 2)
    turned, labels = rotated(image, depth, 2.5)
    inside = labels > 0
    assert 0.9 < inside.mean() < 1 and (np.abs(turned[..., 0] / 50 - labels) < 0.7)[inside].mean() > 0.97


def test_channels_that_are_no_colours_pass_through_all_transforms() -> None:
    images = np.random.default_rng(0).random((30, 30, 6)).astype(np.float32)
    statistics = USUAL.images.statistics._replace(mean=(0.5,) * 6, std=(0.2,) * 6)
    rng = np.random.default_rng(0)
    masks = SegmentationCrop(28, 32, statistics=statistics)(images, np.zeros((30, 30), np.uint8), rng)
    depth = DepthCrop(NYU._replace(cut="", crop=(16, 20)), statistics=statistics)
    assert masks.image.shape == (6, 32, 32)
    assert depth(images, np.ones((30, 30), np.float32), rng).image.shape == (6, 16, 20)


def test_depths_written_for_tests_are_recognised(tmp_path: Path) -> None:
    root = write_depths(tmp_path)
    dataset = dense_dataset(dense_string(str(root), "VAL", "depth"), "depth")
    assert len(dataset) == 4 and set(np.unique(dataset.label(0))) <= {0, 1, 2, 4}
