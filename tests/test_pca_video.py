"""Videos in, videos out: every frame at its time, whatever the file is like."""

import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import ready
import torch
from PIL import Image
from skimage import data

from dinov2cli.cli.main import main
from dinov2cli.config.images import Images
from dinov2cli.console import logger
from dinov2cli.data.decoding import Reading
from dinov2cli.errors import DataError, EnvironmentProblem
from dinov2cli.models.vision_transformer import VisionTransformer
from dinov2cli.visualize.basis import fit_color_basis
from dinov2cli.visualize.features import FeatureSpool, PatchFeatures
from dinov2cli.visualize.pca_pictures import fit_basis, render_images, render_video
from dinov2cli.visualize.rendering import paint, render, sheet
from dinov2cli.visualize.video.reader import HLG, PQ, VideoFile, check_source, open_source, sampling_step, tone_map
from dinov2cli.visualize.video.stills import ImageFolder, list_images
from dinov2cli.visualize.video.writer import VideoWriter, open_writer


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=56, patch_size=14, embed_dim=192, depth=1, num_heads=3).eval()


@pytest.fixture(scope="module")
def weights(model: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save(model.state_dict(), path)
    return path


def picture(index: int = 0, height: int = 48, width: int = 64) -> np.ndarray:
    """A bright square that moves over a dark gradient; its top left corner is red."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 2] = np.linspace(0, 80, width).astype(np.uint8)
    left = (4 + 2 * index) % max(width - 12, 1)
    image[height // 3 : height // 3 + 12, left : left + 12] = (240, 220, 40)
    image[: height // 4, : width // 4] = (255, 0, 0)
    return image


def write_video(
    path: Path,
    frames: int = 6,
    *,
    size: tuple[int, int] = (48, 64),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    ticks: list[int] | None = None,
    rotation: int = 0,
    audio: str | None = None,
    trc: int | None = None,
    time_base: Fraction = Fraction(1, 1000),
) -> Path:
    """A small video; `ticks` are the frames' durations in `time_base`, 100 each by default."""
    ticks = ticks or [100] * frames
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(1 / time_base) / Fraction(sum(ticks), len(ticks)))
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = time_base
        stream.codec_context.max_b_frames = 0
        if trc is not None:
            stream.codec_context.color_trc, stream.codec_context.color_primaries = trc, 9
            stream.codec_context.colorspace = 9
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream(audio, rate=16000) if audio else None
        if sound:
            sound.layout = "mono"
        at = 0
        durations = {}
        for index, duration in enumerate(ticks):
            image = picture(index, *size)
            if "a" in pix_fmt.removeprefix("yuv")[:4]:
                image = np.dstack([image, np.full(size, 255 if index else 0, np.uint8)])
            frame = av.VideoFrame.from_ndarray(image, "rgba" if image.shape[2] == 4 else "rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base, frame.duration = at, time_base, duration
            durations[at] = duration
            at += duration
            packets = stream.encode(frame) + (stream.encode(None) if len(durations) == len(ticks) else [])
            for packet in packets:
                ticks_of_packet = durations[round(packet.pts * packet.time_base / time_base)]
                packet.duration = round(ticks_of_packet * time_base / packet.time_base)
                container.mux(packet)
        if sound:
            _write_tone(container, sound, float(at * time_base))
    return path


def _write_tone(container, sound, seconds: float) -> None:
    resampler = av.AudioResampler(sound.format, "mono", 16000, frame_size=1024)
    tone = (8000 * np.sin(np.arange(int(16000 * seconds)) * 0.3)).astype(np.int16)[None]
    frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
    frame.sample_rate, frame.pts = 16000, 0
    for part in [*resampler.resample(frame), *resampler.resample(None)]:
        container.mux(sound.encode(part))
    container.mux(sound.encode(None))


def times_of(path: Path) -> list[Fraction]:
    return [frame.time for frame in open_source(path).frames()]


def duration_of(path: Path) -> float:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return float(stream.duration * stream.time_base)


def copy_through(source_path: Path, output: Path) -> None:
    """Write a source's frames as they are."""
    source = open_source(source_path)
    with open_writer(output, time_base=source.time_base, rate=source.rate) as writer:
        if isinstance(writer, VideoWriter):
            writer.add_audio(source.path, source.start)
        for frame in source.frames():
            writer.write(frame.image, frame.time, frame.duration)


def run_command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


# Reading and writing


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_variable_frame_rate_is_kept_to_the_tick(tmp_path: Path, suffix: str) -> None:
    ticks = [40, 200, 33, 33, 500, 67]
    original = write_video(tmp_path / "in.mp4", ticks=ticks)
    copy_through(original, tmp_path / f"out{suffix}")
    assert times_of(original) == [Fraction(sum(ticks[:i]), 1000) for i in range(6)]
    assert times_of(tmp_path / f"out{suffix}") == times_of(original)
    if suffix != ".mkv":  # Matroska streams carry no duration
        assert duration_of(tmp_path / f"out{suffix}") == pytest.approx(sum(ticks) / 1000)


def test_swapped_time_stamps_are_sorted(tmp_path: Path) -> None:
    """Frames of an AVI with B-frames come in the order of display, but with stamps 1, 2, 3, 5, 4, 6, ..."""
    original = write_video(tmp_path / "in.mkv", frames=12, codec="mpeg4")
    with av.open(str(original)) as source, av.open(str(tmp_path / "swapped.mkv"), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(p for p in source.demux(video=0) if p.size):
            place = index + {4: 1, 5: -1}.get(index, 0)
            packet.stream, packet.dts, packet.pts = stream, 100 * index, 100 * (place + 1)
            container.mux(packet)
    with av.open(str(tmp_path / "swapped.mkv")) as container:
        stamps = [frame.pts for frame in container.decode(video=0)]
    assert stamps != sorted(stamps)
    assert times_of(tmp_path / "swapped.mkv") == [Fraction(index, 10) for index in range(12)]


@pytest.mark.parametrize(("rotation", "corner"), [(90, (-3, 3)), (180, (-3, -3)), (-90, (3, -3))])
def test_rotation_metadata_is_applied(tmp_path: Path, rotation: int, corner: tuple[int, int]) -> None:
    source = VideoFile(write_video(tmp_path / "in.mp4", rotation=rotation))
    image = next(source.frames()).image
    assert source.size == image.shape[:2] == ((48, 64) if rotation == 180 else (64, 48))
    red, green, blue = (int(channel) for channel in image[corner])
    assert red > 180 and green < 60 and blue < 60


@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])
def test_sound_is_kept(tmp_path: Path, codec: str) -> None:
    original = write_video(tmp_path / ("in.mp4" if codec == "aac" else "in.mkv"), audio=codec, ticks=[200] * 6)
    copy_through(original, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
        assert container.streams.audio[0].codec_context.name == "aac"
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    assert len(samples) == pytest.approx(1.2 * 16000, abs=2100)
    assert 0.1 < np.abs(samples[4000:12000]).max() < 0.5  # the tone, not silence


def test_odd_sides_are_extended_by_one(tmp_path: Path) -> None:
    image = picture(0, 33, 47)
    with open_writer(tmp_path / "out.mp4", time_base=Fraction(1, 25), rate=Fraction(25)) as writer:
        writer.write(image, Fraction(0), Fraction(1, 25))
    written = next(open_source(tmp_path / "out.mp4").frames()).image
    assert written.shape == (34, 48, 3)
    with av.open(str(tmp_path / "out.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")


def test_colours_survive_the_video(tmp_path: Path) -> None:
    image = np.zeros((64, 96, 3), dtype=np.uint8)
    image[:, :32], image[:, 32:64], image[:, 64:] = (220, 40, 30), (30, 200, 60), (40, 60, 210)
    with open_writer(tmp_path / "out.mp4", time_base=Fraction(1, 25), rate=Fraction(25)) as writer:
        writer.write(image, Fraction(0), Fraction(1, 25))
    with av.open(str(tmp_path / "out.mp4")) as container:
        frame = next(container.decode(video=0))
        assert frame.colorspace == 1  # tagged BT.709
        read = frame.to_ndarray(format="rgb24")
    for column in (16, 48, 80):
        np.testing.assert_allclose(read[32, column].astype(int), image[32, column].astype(int), atol=6)


def test_gif_keeps_times_in_hundredths(tmp_path: Path) -> None:
    copy_through(write_video(tmp_path / "in.mp4", ticks=[40, 200, 30, 500]), tmp_path / "out.gif")
    assert [round(time * 100) for time in times_of(tmp_path / "out.gif")] == [0, 4, 24, 27]
    fast = write_video(tmp_path / "fast.mp4", ticks=[5] * 40)  # 200 frames a second
    copy_through(fast, tmp_path / "fast.gif")
    times = times_of(tmp_path / "fast.gif")
    assert min(later - earlier for earlier, later in pairwise(times)) >= Fraction(2, 100)


def test_png_folder_round_trip(tmp_path: Path) -> None:
    with open_writer(tmp_path / "frames", time_base=Fraction(1, 10), rate=Fraction(10)) as writer:
        for index in range(12):
            writer.write(picture(index, 33, 47), Fraction(index, 10), Fraction(1, 10))
    source = open_source(tmp_path / "frames", fps=5)
    frames = list(source.frames())
    assert source.count() == len(frames) == 12
    assert frames[11].time == Fraction(11, 5)
    for index, frame in enumerate(frames):
        np.testing.assert_array_equal(frame.image, picture(index, 33, 47))


def test_folder_with_other_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(EnvironmentProblem, match=r"holds other files \(thesis\.txt\)"):
        open_writer(tmp_path / "notes", time_base=Fraction(1, 10), rate=Fraction(10))
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["out.mp4", "out.gif", "frames"])
def test_a_failure_leaves_the_earlier_output_and_nothing_else(tmp_path: Path, name: str) -> None:
    def write(frames: int, *, fail: bool) -> None:
        with open_writer(tmp_path / name, time_base=Fraction(1, 25), rate=Fraction(25)) as writer:
            for index in range(frames):
                writer.write(picture(index), Fraction(index, 25), Fraction(1, 25))
            if fail:
                raise KeyboardInterrupt

    write(3, fail=False)
    with pytest.raises(KeyboardInterrupt):
        write(5, fail=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert len(times_of(tmp_path / name)) == 3
    write(4, fail=False)
    assert len(times_of(tmp_path / name)) == 4


@pytest.mark.parametrize(("codec", "pix_fmt", "suffix"), [("png", "rgba", ".mov"), ("qtrle", "argb", ".mov")])
def test_what_is_transparent_shows_the_background(tmp_path: Path, codec: str, pix_fmt: str, suffix: str) -> None:
    path = write_video(tmp_path / f"in{suffix}", codec=codec, pix_fmt=pix_fmt)
    for background, shown in (("mean", [124, 116, 104]), ("[0, 9, 255]", [0, 9, 255])):
        frames = list(open_source(path, reading=Reading(Images(background=background))).frames())
        assert np.unique(frames[0].image.reshape(-1, 3), axis=0).tolist() == [shown]  # wholly transparent
        np.testing.assert_array_equal(frames[1].image, picture(1))


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".png"])
def test_animated_pictures_keep_their_frames_and_times(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"in{suffix}"
    colors = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    first, *others = [Image.new("RGB", (64, 48), color) for color in colors]
    how = {"lossless": True} if suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=others, duration=[100, 200, 300], loop=0, **how)
    source = open_source(path)
    frames = list(source.frames())
    assert [frame.time for frame in frames] == [0, Fraction(1, 10), Fraction(3, 10)] and source.count() == 3
    assert [tuple(frame.image[20, 20]) for frame in frames] == colors
    assert [frame.time for frame in source.frames(2)] == [0, Fraction(3, 10)]
    if suffix == ".webp":
        assert source.rate == 5 and frames[2].duration == Fraction(3, 10)


@pytest.mark.parametrize("transfer", [PQ, HLG, None])
def test_ten_bit_input(tmp_path: Path, transfer: int | None) -> None:
    path = write_video(tmp_path / "in.mkv", codec="libx265", pix_fmt="yuv420p10le", trc=transfer)
    frames = list(open_source(path).frames())
    assert len(frames) == 6
    assert all(frame.image.shape == (48, 64, 3) and frame.image.dtype == np.uint8 for frame in frames)
    assert frames[0].image[20, 10].mean() > frames[0].image[40, 10].mean() + 50  # the square is brighter


def test_tone_mapping_keeps_greys_and_orders_highlights() -> None:
    # PQ codes of 0, 10, 100, 203, 1000 and 10000 nits (SMPTE ST 2084).
    codes = np.array([0.0, 0.3015, 0.5081, 0.5807, 0.7518, 1.0])
    grey = np.repeat((codes * 65535).astype(np.uint16)[None, :, None], 3, axis=2)
    levels = tone_map(grey, PQ)[0]
    np.testing.assert_allclose(levels, levels[:, :1].repeat(3, 1), atol=2)  # grey stays grey
    assert (np.diff(levels[:, 0].astype(int)) > 0).all()
    assert levels[0, 0] == 0
    # 100 of 203 nits is 0.493 of diffuse white: sRGB 186.
    assert abs(int(levels[2, 0]) - 186) <= 2
    assert 225 < levels[3, 0] < 250 < levels[5, 0]
    white = np.full((1, 1, 3), int(0.75 * 65535), dtype=np.uint16)
    assert 225 < tone_map(white, HLG)[0, 0, 0] < 250  # 75 % is HLG's diffuse white


def test_truncated_file_gives_the_frames_before_the_cut(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mkv", frames=60, codec="mpeg4")
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    assert 10 < len(times_of(cut)) < 60


def test_files_that_are_no_video_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder").mkdir()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        _write_tone(container, stream, 0.5)
    for name, message in (
        ("text.mp4", "not a video"),
        ("empty.mp4", "not a video"),
        ("sound.mp4", "no video stream in this file, only audio"),
        ("folder", "no images"),
        ("missing.mp4", "no such file"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            open_source(tmp_path / name)
        assert name in str(caught.value)


def test_images_of_a_folder_come_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        cv2.imwrite(str(tmp_path / f"shot{number}.png"), picture(number, 20 + number, 30))
    source = open_source(tmp_path)
    assert isinstance(source, ImageFolder)
    assert [path.name for path in source.paths] == ["shot1.png", "shot9.png", "shot10.png"]
    assert {frame.image.shape for frame in source.frames()} == {(21, 30, 3)}


# Features and rendering


def test_features_do_not_depend_on_the_batch(model: VisionTransformer) -> None:
    pictures = [picture(i) for i in range(5)] + [picture(5, 64, 48)]
    one_by_one, batched = (
        [features for _, features in PatchFeatures(model, 4, size).maps((None, p) for p in pictures)] for size in (1, 4)
    )
    assert [features.shape for features in batched] == [(4, 5, 192)] * 5 + [(5, 4, 192)]
    for one, many in zip(one_by_one, batched, strict=True):
        np.testing.assert_allclose(one, many, atol=1e-4)


def test_features_are_the_models_patch_tokens(model: VisionTransformer) -> None:
    square = picture(0, 56, 56)
    ((_, features),) = PatchFeatures(model, 4).maps([(None, square)])
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = torch.from_numpy(((square / 255 - mean) / std).transpose(2, 0, 1)[None]).float()
    with torch.no_grad():
        expected = model.get_intermediate_layers(images, reshape=True)[0][0].permute(1, 2, 0)
    np.testing.assert_allclose(features, expected.numpy(), atol=1e-4)


def test_spool_gives_back_what_it_got() -> None:
    spool = FeatureSpool()
    maps = [np.random.default_rng(i).normal(size=(2, 3 + i, 4)).astype(np.float32) for i in range(4)]
    for features in maps:
        spool.append(features)
    for _ in range(2):
        for ours, theirs in zip(spool(), maps, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    spool.close()


@pytest.mark.parametrize("upsampling", ["nearest", "bicubic"])
def test_layouts(model: VisionTransformer, upsampling: str) -> None:
    photo = picture(0, 70, 98)
    ((_, features),) = PatchFeatures(model, 5).maps([(None, photo)])
    basis = fit_color_basis(lambda: [features], 0.5)
    colors, opacity = paint(features, basis, (70, 98), upsampling)
    assert colors.min() >= 0 and colors.max() <= 1 and 0 < opacity.mean() < 1
    drawn = {
        layout: render(photo, features, basis, layout=layout, upsampling=upsampling)
        for layout in ("pca", "side-by-side", "overlay")
    }
    np.testing.assert_array_equal(drawn["side-by-side"], np.concatenate([photo, drawn["pca"]], axis=1))
    background = opacity[..., 0] == 0
    assert (drawn["pca"][background] == 0).all()
    np.testing.assert_array_equal(drawn["overlay"][background], photo[background])
    if upsampling == "nearest":  # each patch is one flat square
        blocks = drawn["pca"].reshape(5, 14, 7, 14, 3)
        assert (blocks == blocks[:, :1, :, :1]).all()


def test_sampling_covers_the_whole_length() -> None:
    for count in (1, 5, 64, 65, 1000, 108000):
        taken = range(0, count, sampling_step(count, 64))
        assert 1 <= len(taken) <= 64
        assert count - taken[-1] <= max(2 * count / 64, 1) + 1


def test_colours_follow_the_scene_when_the_camera_pans(tmp_path: Path, model: VisionTransformer) -> None:
    photo, step, width = data.coffee()[:336], 10, 392
    with open_writer(tmp_path / "pan.mp4", time_base=Fraction(1, 10), rate=Fraction(10)) as writer:
        for index in range(16):
            writer.write(photo[:, step * index : step * index + width], Fraction(index, 10), Fraction(1, 10))
    source, extractor = open_source(tmp_path / "pan.mp4"), PatchFeatures(model, 12)
    basis = fit_basis(extractor, [((frame.image for frame in source.frames()), Fraction(1))], foreground="none")
    render_video(extractor, basis, source, tmp_path / "pan")
    drawn = [frame.image.astype(np.float64) for frame in open_source(tmp_path / "pan").frames()]
    assert len(drawn) == 16

    def differ(first: np.ndarray, second: np.ndarray) -> float:
        return float(np.abs(first - second).mean())

    reach = 15 * step
    # What the first and the last frame both show, in the coordinates of the scene.
    same_place = differ(drawn[0][:, reach:], drawn[15][:, :-reach])
    same_pixel = differ(drawn[0], drawn[15])
    next_frame = np.mean([differ(a[:, step:], b[:, :-step]) for a, b in pairwise(drawn)])
    things = drawn[0][::28, ::28].reshape(-1, 3)
    between_things = differ(things[:, None], things[None])
    assert next_frame < 0.2 * between_things
    assert same_place < 0.25 * between_things
    assert same_place < 0.5 * same_pixel


# The commands


def test_video_command_keeps_frames_times_size_and_sound(tmp_path: Path, weights: Path) -> None:
    ticks = [40, 200, 33, 33, 500, 67]
    original = write_video(tmp_path / "in.mp4", ticks=ticks, size=(48, 64), audio="aac", rotation=90)
    assert run_command("pca-video", original, tmp_path / "out.mp4", "--model", weights, "--resolution", 4) == 0
    assert times_of(tmp_path / "out.mp4") == times_of(original)
    assert duration_of(tmp_path / "out.mp4") == pytest.approx(duration_of(original))
    assert open_source(tmp_path / "out.mp4").size == (64, 48)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert len(container.streams.audio) == 1
    arguments = ("--no-audio", "--layout", "side-by-side", "--model", weights, "--resolution", 4)
    assert run_command("pca-video", original, tmp_path / "silent.mp4", *arguments) == 0
    with av.open(str(tmp_path / "silent.mp4")) as container:
        assert not container.streams.audio
        assert container.streams.video[0].width == 96


def test_the_same_command_gives_the_same_colours(tmp_path: Path, weights: Path) -> None:
    original = write_video(tmp_path / "in.mp4")
    for name in ("first", "second"):
        run_command("pca-video", original, tmp_path / name, "--model", weights, "--resolution", 5)
    for first, second in zip(
        open_source(tmp_path / "first").frames(), open_source(tmp_path / "second").frames(), strict=True
    ):
        np.testing.assert_array_equal(first.image, second.image)


def test_several_videos_share_a_basis_and_a_saved_one_does_the_same(tmp_path: Path, weights: Path) -> None:
    videos = [write_video(tmp_path / "a.mp4"), write_video(tmp_path / "b.mkv", frames=4)]
    common = ("--model", weights, "--resolution", 5)
    basis = tmp_path / "basis.npz"
    assert run_command("pca-video", *videos, tmp_path / "both", "--format", "png", "--save-basis", basis, *common) == 0
    assert run_command("pca-video", videos[1], tmp_path / "alone", "--basis", basis, *common) == 0
    assert len(times_of(tmp_path / "both" / "a")) == 6
    for together, alone in zip(
        open_source(tmp_path / "both" / "b").frames(), open_source(tmp_path / "alone").frames(), strict=True
    ):
        np.testing.assert_array_equal(together.image, alone.image)


@pytest.mark.parametrize(("frames", "size"), [(1, (48, 64)), (3, (16, 16)), (2, (200, 16))])
def test_smallest_videos(tmp_path: Path, weights: Path, frames: int, size: tuple[int, int]) -> None:
    original = write_video(tmp_path / "in.mp4", frames=frames, size=size)
    assert run_command("pca-video", original, tmp_path / "out.mp4", "--model", weights, "--resolution", 3) == 0
    assert len(times_of(tmp_path / "out.mp4")) == frames
    assert open_source(tmp_path / "out.mp4").size == size


def test_mistakes_are_told_before_any_work(tmp_path: Path, capsys) -> None:
    video = write_video(tmp_path / "in.mp4")
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ((video, tmp_path / "out.xyz"), "unknown output type '.xyz'"),
        ((video, video), "is an input too"),
        ((video,), "name the output"),
        ((video, tmp_path / "file" / "out.mp4"), "cannot be written"),
        ((video, video.with_name("b.mp4"), tmp_path / "out.mp4"), "the output is a folder"),
        ((tmp_path / "no.mp4", tmp_path / "out.mp4"), "no such file"),
        ((video, tmp_path / "out.mp4", "--foreground", "most"), "auto, none or a number"),
        ((video, tmp_path / "out.mp4", "--fps", "5"), "--fps is for folders"),
        ((video, tmp_path / "out.mp4", "--basis", tmp_path / "no.npz"), "no such file"),
        ((video, tmp_path / "out.mp4", "--device", "abacus", "--model", "x"), "--device abacus: unknown"),
    ):
        assert run_command("pca-video", *arguments) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "in.mp4"]


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".gif"])
def test_a_video_that_is_not_from_here_is_never_replaced(tmp_path: Path, suffix: str) -> None:
    """Whoever forgets the output has named an input last."""
    path = tmp_path / f"holiday{suffix}"
    write_video(tmp_path / "in.mp4").rename(path)
    for content in (path.read_bytes(), b"no video at all"):
        path.write_bytes(content)
        with pytest.raises(EnvironmentProblem, match="is there, and dino2 has not drawn it"):
            open_writer(path, time_base=Fraction(1, 25), rate=Fraction(25))
        assert path.read_bytes() == content
    path.unlink()
    for level in (10, 200):  # its own are
        with open_writer(path, time_base=Fraction(1, 25), rate=Fraction(25)) as writer:
            writer.write(np.full((32, 48, 3), level, np.uint8), Fraction(0), Fraction(1, 25))
    assert abs(int(next(open_source(path).frames()).image[0, 0, 0]) - 200) < 9
    assert os.listdir(tmp_path) == [path.name]


def test_basis_of_another_model_is_refused(tmp_path: Path, weights: Path, capsys) -> None:
    fit_color_basis(lambda: [np.random.default_rng(0).normal(size=(4, 4, 7))]).save(tmp_path / "basis.npz")
    video = write_video(tmp_path / "in.mp4")
    options = ("--model", weights, "--basis", tmp_path / "basis.npz")
    assert run_command("pca-video", video, tmp_path / "o.mp4", *options) == 2
    assert "fitted to 7-dimensional features, and the model's have 192" in capsys.readouterr().err


def test_interrupted_command_leaves_no_output(tmp_path: Path, weights: Path) -> None:
    video = write_video(tmp_path / "in.mp4", frames=3000, codec="mpeg4", size=(32, 32))
    (tmp_path / "out").mkdir()
    words = ["pca-video", video, tmp_path / "out" / "o.mp4", "--model", weights,
             "--resolution", "6", "--fit-frames", "4", "--batch-size", "1"]  # fmt: skip
    process = ready.server().start(*words, start_new_session=True)
    aside = tmp_path / "out" / ".o.mp4.partial"
    while process.poll() is None and not (aside.exists() and aside.stat().st_size > 0):
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be interrupted"
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 130
    assert list((tmp_path / "out").iterdir()) == []


def test_image_command_and_functions(tmp_path: Path, model: VisionTransformer, weights: Path) -> None:
    photos = [picture(0, 60, 80), picture(7, 90, 50)]
    for index, photo in enumerate(photos):
        cv2.imwrite(str(tmp_path / f"{index}.png"), photo[..., ::-1])
    inputs = (tmp_path / "0.png", tmp_path / "1.png")
    common = ("--model", weights, "--resolution", 4)
    assert run_command("pca-image", *inputs, tmp_path / "each", *common) == 0
    extractor = PatchFeatures(model, 4)
    basis = fit_basis(extractor, [(photos, Fraction(1))])
    expected = list(render_images(extractor, basis, photos, layout="pca", upsampling="bicubic"))
    for index in range(2):
        written = cv2.imread(str(tmp_path / "each" / f"{index}.png"))[..., ::-1]
        np.testing.assert_allclose(written.astype(int), expected[index].astype(int), atol=1)
    assert run_command("pca-image", *inputs, tmp_path / "sheet.png", *common) == 0
    rows = render_images(extractor, basis, photos, layout="side-by-side", upsampling="bicubic")
    written = cv2.imread(str(tmp_path / "sheet.png"))[..., ::-1]
    np.testing.assert_allclose(written.astype(int), sheet([[row] for row in rows]).astype(int), atol=1)
    assert run_command("pca-image", inputs[1], tmp_path / "one.png", *common) == 0
    assert cv2.imread(str(tmp_path / "one.png")).shape == (90, 50, 3)


def test_a_folders_own_pictures_are_no_photos(
    tmp_path: Path, weights: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), picture(0, 60, 80)[..., ::-1])
    for command, output in (("pca-image", "out.png"), ("attention", "maps.png"), ("pca-image", "out.png")):
        assert run_command(command, folder, folder / output, "--model", weights, "--resolution", 4) == 0
    first = (folder / "out.png").read_bytes()
    monkeypatch.setattr(logger, "propagate", True)  # which a command has switched off
    with caplog.at_level("INFO", logger="dino2"):
        assert list_images(folder) == [folder / "a.png"]
    assert "maps.png, out.png" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", logger="dino2"):
        check_source(folder, 5.0)
        assert open_source(folder, 5.0).count() == 1
    assert caplog.text.count("left out") == 1  # and each picture opened once to tell
    assert run_command("pca-image", folder, folder / "out.png", "--model", weights, "--resolution", 4) == 0
    assert (folder / "out.png").read_bytes() == first
    (folder / "a.png").unlink()  # where there is nothing else, they are meant
    assert len(list_images(folder)) == 2


@pytest.mark.long
@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(tmp_path: Path, weights: Path) -> None:
    code = (
        "import resource, sys\n"
        "from dinov2cli.cli.main import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = []
    for frames in (150, 1500):  # the shorter one fills the encoder's look-ahead as well
        video = write_video(tmp_path / f"{frames}.mp4", frames=frames, size=(128, 160))
        arguments = ["pca-video", video, tmp_path / "out.mp4", "--model", weights, "--resolution", "4"]
        result = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
        )
        peaks.append(int(result.stdout.splitlines()[-1]))
    assert peaks[1] < 1.05 * peaks[0]


def test_render_counts_frames_and_reports_progress(tmp_path: Path, model: VisionTransformer) -> None:
    source = open_source(write_video(tmp_path / "in.mp4", frames=7))
    extractor = PatchFeatures(model, 4)
    fitted: list[int] = []
    sampled = (frame.image for frame in source.frames(sampling_step(source.count(), 3)))
    basis = fit_basis(extractor, [(sampled, source.pixel_aspect)], advance=fitted.append)
    rendered: list[int] = []
    count = render_video(extractor, basis, source, tmp_path / "o.gif", advance=rendered.append)
    assert (sum(fitted), sum(rendered), count) == (3, 7, 7)
