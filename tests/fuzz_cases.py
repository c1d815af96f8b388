"""The cases of `fuzz.py`: valid inputs, ways to spoil them, and for each kind of input what reads it."""

import collections
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 10**6, 10**12, 2**63, -0.5, 1e300, float("nan"), "", "x", "../../out", "\0", "é" * 9, [],
    [1, 2], [[]], {}, {"a": 1}, "vit_small", "1e9", "!!python/object/apply:os.system [x]",
)  # fmt: skip


# ---- Mutations -------------------------------------------------------------------------------------------------------


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few changes: bits, bytes, numbers, pieces left out, doubled or moved, the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(min(len(changed), rng.choice((64, 512, 1 << 30))) or 1) if changed else 0
        length = rng.choice((1, 2, 4, 8, 64, 1024))
        how = rng.randrange(8)
        if how == 0 and changed:
            changed[place] ^= 1 << rng.randrange(8)
        elif how == 1:
            changed[place : place + length] = rng.randbytes(length)
        elif how == 2:
            number = rng.choice(NUMBERS)
            size = rng.choice([n for n in (1, 2, 4, 8) if number < 1 << 8 * n])
            changed[place : place + size] = number.to_bytes(size, rng.choice(("big", "little")))
        elif how == 3:
            del changed[place : place + length]
        elif how == 4:
            changed[place:place] = changed[place : place + length]
        elif how == 5 and rng.random() < 0.3:
            del changed[place:]
        elif how == 6:
            changed[place : place + length] = bytes([rng.choice((0, 0xFF, 0x20))]) * length
        else:
            other = rng.randrange(len(changed) or 1)
            changed[place : place + length] = changed[other : other + length]
    return bytes(changed)


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """A mapping with a value, a key or a whole group replaced."""
    copy = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 2, 5))):
        node, parent, key = copy, None, None
        while isinstance(node, dict) and node and rng.random() < 0.85:
            parent, key = node, rng.choice(list(node))
            node = node[key]
        if parent is None:
            return rng.choice(VALUES)
        how = rng.randrange(4)
        if how == 0:
            del parent[key]
        elif how == 1:
            parent[rng.choice(("x", "", "student", str(key) + "s"))] = parent.pop(key)
        else:
            parent[key] = rng.choice(VALUES)
    return copy


def zipped(members: Iterable[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


def unzipped(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


class Calls:
    """What pickles as a call: executed by whoever unpickles without care."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


# ---- Kinds: each writes a case into a folder and returns what reads it -----------------------------------------------


class Seeds:
    """Valid inputs, made once."""

    def __init__(self) -> None:
        import numpy as np
        import torch
        import yaml
        from PIL import Image
        from weight_samples import PLAIN, export_model, sample_state, save

        from dinov2cli.config import Config

        made = Path(tempfile.mkdtemp(prefix="fuzz-seeds-"))
        self.architecture = PLAIN.changed(embed_dim=24, num_heads=2, hidden_dim=96, depth=2, img_size=28)
        self.state = sample_state(self.architecture)
        self.pth = save({"teacher": {f"backbone.{k}": v for k, v in self.state.items()}}, made / "t.pth").read_bytes()
        torch.save(self.state, made / "old.pth", _use_new_zipfile_serialization=False)
        self.old_pth = (made / "old.pth").read_bytes()
        self.config = json.loads(json.dumps(yaml.safe_load(Config().to_yaml())))
        (made / "student.yaml").write_text("student: {embed_dim: 24, depth: 2, num_heads: 2, patch_size: 14}\n")
        for form, name in (("safetensors", "m.safetensors"), ("hf", "hf"), ("timm", "timm.safetensors")):
            export_model(made / "t.pth", form, made / name, config_file=made / "student.yaml")
        self.safetensors = [in_order((made / name).read_bytes()) for name in ("m.safetensors", "timm.safetensors")]
        self.hf = {file.name: file.read_bytes() for file in (made / "hf").iterdir()}
        y, x = np.mgrid[:24, :36]
        rgb = np.stack([x * 7 % 256, y * 5 % 256, (x + y) * 3 % 256], -1).astype(np.uint8)
        self.rgb, self.images = rgb, {}
        pictures = {"rgb": Image.fromarray(rgb), "gray": Image.fromarray(rgb[..., 0])}
        pictures |= {"palette": pictures["rgb"].quantize(16), "alpha": Image.fromarray(np.dstack([rgb, rgb[..., :1]]))}
        for suffix, kinds in (("png", pictures), ("jpg", ("rgb", "gray")), ("gif", ("palette",)), ("bmp", ("rgb",)),
                              ("tif", ("rgb", "gray", "alpha")), ("webp", ("rgb", "alpha")), ("ppm", ("rgb",)),
                              ("pgm", ("gray",)), ("ico", ("alpha",))):  # fmt: skip
            for kind in kinds:
                file = io.BytesIO()
                names = {"jpg": "jpeg", "tif": "tiff", "pgm": "ppm"}
                pictures[kind].save(file, names.get(suffix, suffix))
                self.images[f"{kind}.{suffix}"] = file.getvalue()
        for name, array in (("a.npy", rgb), ("b.npy", rgb[..., 0] / np.float32(255))):
            np.save(made / name, array)
            self.images[name] = (made / name).read_bytes()
        np.savez_compressed(made / "c.npz", rgb)
        self.images["c.npz"] = (made / "c.npz").read_bytes()
        self.videos = {suffix: _video(made / f"v{suffix}", rgb) for suffix in (".mp4", ".mkv", ".gif")}
        jpeg, png = self.images["rgb.jpg"], self.images["rgb.png"]
        self.members = [("a/1.jpg", jpeg), ("a/1.cls", b"3"), ("a/2.png", png), ("a/2.cls", b"0")]
        shutil.rmtree(made)


def in_order(data: bytes) -> bytes:
    """A safetensors file with a sorted header: the library writes metadata in another order each time."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _video(path: Path, rgb: Any) -> bytes:
    from dinov2cli.visualize.video.writer import open_writer

    with open_writer(path, time_base=Fraction(1, 10), rate=Fraction(10)) as writer:
        for i in range(4):
            writer.write(rgb, Fraction(i, 10), Fraction(1, 10))
    return path.read_bytes()


Case = Callable[[Seeds, random.Random, Path], Callable[[], Any]]


def weights(seeds: Seeds, rng: random.Random, folder: Path) -> Callable[[], Any]:
    """PyTorch files: bytes, zip members, pickles that call, tensors of wrong kinds, bombs."""
    import torch

    how, file = rng.randrange(7), folder / "w.pth"
    if how == 0:
        data = mutate(rng.choice((seeds.pth, seeds.old_pth)), rng)
    elif how == 1:
        members = unzipped(seeds.pth)
        at = rng.randrange(len(members)) if rng.random() < 0.5 else 0
        members[at] = (members[at][0], mutate(members[at][1], rng))
        if rng.random() < 0.2:
            members.append((rng.choice(("../../out", "/tmp/fuzz-out", "archive/code/x.py")), b"x"))
        data = zipped(members)
    elif how == 2:
        out = str(folder.parent / "canary")
        calls = (Calls(os.system, f"touch {out}"), Calls(eval, "1+1"), Calls(open, out, "w"), Calls(exec, "x=1"),
                 Calls(shutil.rmtree, out), Calls(subprocess.run, ["touch", out]), Calls(torch.load, out),
                 Calls(bytearray, 1 << 40), Calls(collections.Counter, "a" * 99))  # fmt: skip
        content: Any = {"teacher": {"x": rng.choice(calls)}}
        file_like = io.BytesIO()
        if rng.random() < 0.4:
            torch.save(content, file_like)
            data = file_like.getvalue()
        else:
            data = pickle.dumps(content, protocol=rng.choice((0, 2, 4)))
    elif how == 3:  # a bomb: a member that unpacks to more than there is memory
        members = unzipped(seeds.pth)
        at = rng.randrange(len(members))
        members[at] = (members[at][0], bytes(64 << 20))
        data = zipped(members, zipfile.ZIP_DEFLATED)
        if rng.random() < 0.5:
            data = data.replace(struct.pack("<I", 64 << 20), struct.pack("<I", 0xFFFFFFF0))
    else:
        state: dict[Any, Any] = dict(seeds.state)
        for _ in range(rng.choice((1, 1, 3))):
            state[rng.choice(list(state))] = _odd_value(rng)
        if rng.random() < 0.1:
            state = {rng.choice((1, None, (1, 2), "x")): value for value in state.values()}
        content = rng.choice(
            (state, {"teacher": state}, {"model": {"a": state}}, [state], {"state_dict": state, "x": {}})
        )
        file_like = io.BytesIO()
        torch.save(content, file_like)
        data = file_like.getvalue()
    file.write_bytes(data)
    if rng.random() < 0.7:
        (folder / "config.yaml").write_text("student: {embed_dim: 24, depth: 2, num_heads: 2, patch_size: 14}\n")
    head = rng.random() < 0.15

    def read() -> None:
        from dinov2cli.models.classifier import read_linear_head
        from dinov2cli.models.load import load_model

        read_linear_head(file) if head else load_model(file, **({"num_heads": 2} if len(data) % 2 else {}))

    return read


def _odd_value(rng: random.Random) -> Any:
    import torch

    return rng.choice((
        lambda: rng.choice(VALUES), lambda: torch.zeros(()), lambda: torch.zeros(0), lambda: torch.zeros(3, 0, 2),
        lambda: torch.randn(rng.choice((1, 24, 96)), rng.choice((1, 24, 72))), lambda: torch.zeros(1, 2, 3, 4, 5),
        lambda: torch.zeros(1).expand(10**7, 10**5),
        lambda: torch.zeros(1, dtype=torch.bfloat16).expand(10**7, 10**5), lambda: torch.randn(24, 24).to_sparse(),
        lambda: torch.sparse_coo_tensor(torch.tensor([[0], [10**8]]), torch.ones(1), (10**9, 10**9)),
        lambda: torch.ones(24, dtype=torch.complex64), lambda: torch.ones(24, dtype=torch.int64),
        lambda: torch.ones(24, dtype=torch.bool), lambda: torch.ones(24, dtype=torch.float16),
        lambda: torch.full((24,), float("nan")), lambda: torch.empty(10**9, 10**9, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(24), 0.1, 0, torch.qint8), lambda: {"nested": torch.ones(2)},
        lambda: torch.nn.Parameter(torch.ones(24)),
    ))()  # fmt: skip


def safetensors(seeds: Seeds, rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Headers (lengths, offsets, types, shapes, metadata) and bytes."""
    data = rng.choice(seeds.safetensors)
    if rng.random() < 0.3:
        data = mutate(data, rng)
    else:
        (length,) = struct.unpack("<Q", data[:8])
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        if rng.random() < 0.5:
            metadata = header["__metadata__"]
            key = rng.choice(list(metadata))
            text = metadata[key]
            try:
                tree = json.loads(text)
            except ValueError:
                tree = {}
            odd = json.dumps(mutate_tree(tree, rng))
            metadata[key] = rng.choice(
                (odd, odd, odd, "", "null", "[]", "{", "[" * 9000, mutate(text.encode(), rng).decode("latin1"))
            )
        else:
            header = mutate_tree(header, rng)
        written = json.dumps(header).encode()
        told = len(written) if rng.random() < 0.9 else rng.choice(NUMBERS)
        data = struct.pack("<Q", told) + written + body
    (folder / "m.safetensors").write_bytes(data)

    def read() -> None:
        from dinov2cli.export.description import run
        from dinov2cli.requests.tools import InfoRequest

        str(run(InfoRequest(checkpoint=str(folder / "m.safetensors"))).__rich__())

    return read


def dense_head(seeds: Seeds, rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Heads of every kind, as they are written: bytes, tensors of wrong kinds, what they say of themselves."""
    import torch

    from dinov2cli.models.dense_heads import DepthHead, DPTHead, SegmentationHead
    from dinov2cli.models.load.dense import SAID, read_head, save_head

    suffix = rng.choice((".pth", ".safetensors"))
    file = folder / f"{rng.choice(('head', 'dinov2_vits14_nyu_linear_head'))}{suffix}"
    save_head(rng.choice((SegmentationHead(24, 3), DepthHead(48, 5), DPTHead(64, 4))), file)
    if rng.random() < 0.3:
        file.write_bytes(mutate(file.read_bytes(), rng))
    elif suffix == ".pth":
        content = torch.load(file, weights_only=True)
        state = content["state_dict"]
        if rng.random() < 0.5:
            state[rng.choice(list(state))] = _odd_value(rng)
        else:
            said = {"task": "depth", "layers": [1, 2], "max_depth": 80.0, "classes": ["a"], "palette": [[0, 0, 0]]}
            content["meta"] = rng.choice(({SAID: mutate_tree(said, rng)}, mutate_tree({"CLASSES": ["a", "b"]}, rng)))
        torch.save(rng.choice((content, state, {"state_dict": [state]}, [content])), file)

    def read() -> None:
        read_head(file)

    return read


def hf_folder(seeds: Seeds, rng: random.Random, folder: Path) -> Callable[[], Any]:
    """config.json, preprocessor_config.json, an index of shards, configs beside weights."""
    for name, content in seeds.hf.items():
        (folder / name).write_bytes(content)
    name = rng.choice(("config.json", "preprocessor_config.json", "index", "config.yaml", "m.dino2.yaml"))
    if name == "index":
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        index = {
            "metadata": {},
            "weight_map": {"x": rng.choice(("part.safetensors", "../../etc/passwd", "/etc/passwd"))},
        }
        text = json.dumps(mutate_tree(index, rng) if rng.random() < 0.7 else index)
        (folder / "model.safetensors.index.json").write_text(text)
    elif name.endswith(".json"):
        content = seeds.hf[name]
        odd = mutate(content, rng) if rng.random() < 0.4 else json.dumps(mutate_tree(json.loads(content), rng)).encode()
        (folder / name).write_bytes(odd)
    else:
        (folder / "config.json").unlink()
        (folder / name.replace("m.", "model.safetensors.")).write_bytes(
            _odd_yaml({"student": seeds.config["student"]}, rng)
        )

    def read() -> None:
        from dinov2cli.models.load import load_model

        load_model(folder)

    return read


def _odd_yaml(tree: Any, rng: random.Random) -> bytes:
    import yaml

    how = rng.randrange(6)
    if how == 0:
        return mutate(yaml.safe_dump(tree).encode(), rng)
    if how == 1:  # each line ten times the one before
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, rng.choice((3, 9, 12)))]
        return "\n".join([*lines, f"student: {{arch: *a{len(lines) - 1}}}"]).encode()
    if how == 2:
        return (b"[" if rng.random() < 0.5 else b"{a: ") * rng.choice((10, 300, 5000))
    if how == 3:
        tags = ("!!python/object/apply:os.system ['touch canary']", "!!python/name:os.system", "!!binary aGk=",
                "!x y", "&a [*a]", "2001-01-01", "2001-19-99", "!!set {a, b}", "0o17", "1_000", "? [a]\n: b",
                "<<: {a: b}", ".nan")  # fmt: skip
        return f"student:\n  arch: {rng.choice(tags)}\ntrain: {rng.choice(tags)}\n".encode()
    return yaml.safe_dump(mutate_tree(tree, rng)).encode()


def config(seeds: Seeds, rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Config files and overrides."""
    (folder / "c.yaml").write_bytes(_odd_yaml(seeds.config, rng))
    overrides = []
    for _ in range(rng.choice((0, 0, 1, 3))):
        group = rng.choice(list(seeds.config))
        key = rng.choice(list(seeds.config[group]))
        text = f"{group}.{key}={rng.choice(VALUES)}"
        overrides.append(mutate(text.encode(), rng).decode("utf8", "surrogateescape") if rng.random() < 0.4 else text)
    alone = rng.random() < 0.3

    def read() -> None:
        from dinov2cli.config import load_config

        load_config(config_file=None if alone else folder / "c.yaml", overrides=overrides)

    return read


def dataset(seeds: Seeds, rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Dataset strings, and folders with odd names in them."""
    photos = folder / rng.choice(("p", "p:q=r", "p + q", "'p'", "p\n", "\udcff", "2*p"))
    (photos / "class").mkdir(parents=True)
    (photos / "class" / rng.choice(("a.png", "a b.PNG", "\udcfe.png", "a\n.png"))).write_bytes(seeds.images["rgb.png"])
    if rng.random() < 0.3:
        (photos / "loop").symlink_to(photos)
        (photos / "gone.png").symlink_to(folder / "nothing.png")
    if rng.random() < 0.2:
        os.mkfifo(photos / "class" / "pipe.png")
    words = (str(photos), "Folder:root=", "ImageNet:split=TRAIN:root=", "ImageNet22k:root=", "Shards:root=", ":extra=",
             " + ", "+", "2*", "0*", "1e9*", "SamplePhotos", ":split=", "TRAIN", "'", '"', "/dev/zero",
             "/proc/self/mem", "\0", "~", "~nobody/x", "x" * 5000, "é", ":", "=", "*", "-1*", "9999999999999999999*",
             "nan*", "")  # fmt: skip
    text = "".join(rng.choice(words) for _ in range(rng.randrange(1, 6)))
    text = rng.choice((text, f"Folder:root={photos}", str(photos), f"2*{photos} + {text}"))

    def read() -> None:
        from dinov2cli.data.datasets import make_dataset

        found = make_dataset(text)
        found.describe()
        for i in range(min(len(found), 3)):
            found.path(i)
            found.image(i)

    return read


def tar(seeds: Seeds, rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Shards: bytes of headers, paths that lead out, links, devices, sizes beyond the file."""
    file = io.BytesIO()
    form = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in seeds.members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if rng.random() < 0.3:
                member.name = rng.choice(
                    ("../../out.jpg", "/tmp/fuzz-out.jpg", "a/\n.jpg", "é.png", "x" * 90 + ".jpg", ".jpg")
                )
            if rng.random() < 0.2:
                types = ["LNKTYPE", "SYMTYPE", "CHRTYPE", "FIFOTYPE", "DIRTYPE", "GNUTYPE_SPARSE", "CONTTYPE"]
                member.type = getattr(tarfile, rng.choice(types))
                member.linkname = rng.choice(("/etc/passwd", "../../../etc/passwd", "a/1.jpg", member.name))
            if name.endswith(".cls") and rng.random() < 0.3:
                content = rng.choice((b"-7", b"99999999999999999999", b"x", b"", b"3.5", b"9" * 5000, b"2147483647"))
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    data = file.getvalue()
    if rng.random() < 0.6:
        data = mutate(data, rng)
    if rng.random() < 0.3 and len(data) >= 512:  # a header that is whole, with another size or content
        at = 512 * rng.randrange(len(data) // 512)
        header = bytearray(data[at : at + 512].ljust(512, b"\0"))
        header[124:136] = rng.choice((b"77777777777\0", b"\x80" + b"\xff" * 11, b"-0000000001\0", b"00000000000\0"))
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        data = data[:at] + bytes(header) + data[at + 512 :]
    (folder / "s").mkdir()
    if rng.random() < 0.3:
        packed = zipped(seeds.members, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)))
        (folder / "s.zip").write_bytes(mutate(packed, rng))
    (folder / "s" / "0.tar").write_bytes(data)
    if rng.random() < 0.1:
        (folder / "s" / "1.tar").symlink_to(rng.choice(("/dev/zero", "/etc/passwd", "0.tar", "nothing")))

    def read() -> None:
        from dinov2cli.data.datasets import make_dataset
        from dinov2cli.errors import Dino2Error

        found = make_dataset(str(folder / ("s.zip" if (folder / "s.zip").exists() else "s")))
        for i in range(min(len(found), 8)):
            try:
                found.image(i)
            except Dino2Error:
                continue

    return read


def table(seeds: Seeds, rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Text and arrays beside data: labels.txt, ground truth of ImageNet, entries, class mappings, results, metrics."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = b'n01440764,tench\nn01443537,goldfish\nn01484850,"great white, shark"\n'
    truth = b"ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2 3 4\n"
    metrics = b'{"iteration": 9, "total_loss": 1.5, "lr": 1e-3}\n{"iteration": 19, "total_loss": null}\n'
    results = b'{"format": 1, "evaluations": [{"task": "knn", "checkpoint": "c", "iteration": 1, "rows": []}]}'
    entries = io.BytesIO()
    kinds = [("actual_index", "<u4"), ("class_index", "<u4"), ("class_id", "U9"), ("class_name", "U9")]
    np.save(entries, np.array([(1, 0, "n01440764", "tench")], np.dtype(kinds)))
    basis = io.BytesIO()
    np.savez(basis, format="dino2-color-basis-1", threshold=0.5, score_range=(0, 1), low=np.zeros(3), high=np.ones(3))
    parquet = io.BytesIO()
    images = [{"bytes": seeds.images["rgb.png"], "path": "a.png"}, {"bytes": seeds.images["rgb.jpg"], "path": "b.jpg"}]
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), parquet)
    name, content = rng.choice((("p.parquet", parquet.getvalue()), ("labels.txt", labels), ("val.csv", truth),
                                ("training_metrics.json", metrics),
                                ("results.json", results), ("entries-TRAIN.npy", entries.getvalue()),
                                ("basis.npz", basis.getvalue()),
                                ("train.csv", b"path,label\na.png,cat\nb.png,dog\n")))  # fmt: skip
    odd = mutate(content, rng)
    others = b"\0" * 99, b'"' + content * 50, b"[" * 5000, content.replace(b",", b'","'), b"\xff\xfe" + content
    odd = rng.choice((odd, odd, odd, *others))
    if name == "entries-TRAIN.npy" and rng.random() < 0.3:
        array = io.BytesIO()
        np.save(
            array,
            rng.choice((np.zeros(3), np.array([{"a": 1}], object), np.array("x"), np.zeros((2, 2), np.dtype(kinds)))),
        )
        odd = array.getvalue()
    (folder / name).write_bytes(odd)
    (folder / "train" / "n01440764").mkdir(parents=True)
    (folder / "train" / "n01440764" / "n01440764_1.JPEG").write_bytes(seeds.images["rgb.jpg"])

    def read() -> None:
        from dinov2cli.data.datasets import make_dataset
        from dinov2cli.data.prepare.labels import read_labels, read_val_labels
        from dinov2cli.eval.reports import read_results
        from dinov2cli.visualize.basis import ColorBasis
        from dinov2cli.visualize.run_plot import read_run

        readers: dict[str, Callable[[], Any]] = {
            "labels.txt": lambda: read_labels(folder),
            "val.csv": lambda: read_val_labels(folder / name),
            "training_metrics.json": lambda: read_run(folder),
            "results.json": lambda: (read_results(folder), read_run(folder)),
            "entries-TRAIN.npy": lambda: make_dataset(f"ImageNet:split=TRAIN:root={folder}:extra={folder}").image(0),
            "basis.npz": lambda: ColorBasis.load(folder / name),
            "p.parquet": lambda: make_dataset(str(folder / name)).image(0),
            "train.csv": lambda: make_dataset(str(folder / name)).image(0),
        }
        readers[name]()

    return read


def image(seeds: Seeds, rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Pictures of all types, and headers that promise more pixels than there is memory."""
    name = rng.choice(list(seeds.images))
    data = mutate(seeds.images[name], rng)
    if name.endswith(".png") and rng.random() < 0.4:  # a header with its checksum right
        header = bytearray(seeds.images[name][12:29])
        header[4:12] = struct.pack(">II", *(min(rng.choice(NUMBERS), 0xFFFFFFFF) for _ in range(2)))
        header[12:14] = bytes([rng.choice((1, 2, 4, 8, 16, 3)), rng.choice((0, 2, 3, 4, 6, 5))])
        data = seeds.images[name][:12] + bytes(header) + struct.pack(">I", zlib.crc32(header)) + seeds.images[name][33:]
    (folder / name).write_bytes(data)
    shrink = rng.choice((1, 1, 2, 8))

    def read() -> None:
        from dinov2cli.data.decoding import decode_image, read_image

        read_image(folder / name)
        decode_image((folder / name).read_bytes(), name, shrink=shrink)

    return read


def video(seeds: Seeds, rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Videos, and texts that FFmpeg takes for lists of other files."""
    suffix = rng.choice(list(seeds.videos))
    data = mutate(seeds.videos[suffix], rng)
    if rng.random() < 0.15:
        suffix = rng.choice((".m3u8", ".mp4", ".ffconcat", ".sdp"))
        lists = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n"
        data = rng.choice((*lists, b"ffconcat version 1.0\nfile /etc/passwd\n", b"v=0\nm=video 9 RTP/AVP 96\n"))
    (folder / f"v{suffix}").write_bytes(data)

    def read() -> None:
        from dinov2cli.visualize.video.reader import open_source

        source = open_source(folder / f"v{suffix}")
        source.count()
        for count, _ in enumerate(source.frames()):
            if count > 50:
                break

    return read


def dicom(seeds: Seeds, rng: random.Random, folder: Path) -> Callable[[], Any]:
    """DICOM files: bytes, and elements that do not fit each other."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless, SecondaryCaptureImageStorage

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    file = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    file.Rows, file.Columns, file.SamplesPerPixel, file.PhotometricInterpretation = 24, 36, 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 8, 8, 7, 0
    file.PixelData = seeds.rgb[..., 0].tobytes()
    small = (0, 1, 2, 3, 7, 8, 12, 16, 24, 32, 64, 255, 65535)
    odd: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit"), small),
        "PixelRepresentation": small, "PlanarConfiguration": small, "NumberOfFrames": (0, 1, 2, 10**6, 2**31 - 1),
        "PhotometricInterpretation": ("MONOCHROME1", "RGB", "YBR_FULL_422", "PALETTE COLOR", "x", ""),
        "WindowWidth": (0, -1, 1e300, 1), "WindowCenter": (0, -1e300), "RescaleSlope": (0, -1, 1e300),
        "RescaleIntercept": (0, 1e300), "PixelData": (b"", b"\0", bytes(24 * 36 * 3)),
        "PixelPaddingValue": (0, 255),
    }  # fmt: skip
    for name in rng.sample(list(odd), rng.choice((0, 1, 1, 2, 4))):
        setattr(file, name, rng.choice(odd[name]))
    if rng.random() < 0.2:
        file["PixelData"].VR = "OB"
        meta.TransferSyntaxUID = rng.choice((JPEGBaseline8Bit, RLELossless, "1.2.840.10008.1.2.4.90", "1.2.3.4"))
    written = io.BytesIO()
    try:
        file.save_as(written, enforce_file_format=True)
    except Exception:  # pydicom does not write everything
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        for name in odd:
            if name not in ("Rows", "Columns"):
                file.pop(name, None)
        written = io.BytesIO()
        file.save_as(written, enforce_file_format=True)
    data = written.getvalue()
    (folder / "x.dcm").write_bytes(mutate(data, rng) if rng.random() < 0.6 else data)

    def read() -> None:
        from dinov2cli.data.decoding import read_image

        read_image(folder / "x.dcm")

    return read


def site_file(seeds: Seeds, rng: random.Random, folder: Path) -> Callable[[], Any]:
    """What a site's file says, of datasets, Slurm and folders."""
    tree = {"datasets": {"Photos": "/data/photos", "ImageNet": {"root": "/data/imagenet", "extra": "/x"}},
            "slurm": {"partition": "main", "gpus": 4, "timeout_min": 20, "setup": ["module load x"]},
            "runs": "~/runs", "cache": "~nobody-is-called-so/cache"}  # fmt: skip
    (folder / "dino2.yaml").write_bytes(_odd_yaml(tree, rng))

    def read() -> None:
        from dinov2cli.site import cache_folder, read_site, remember_dataset

        before = os.environ["DINO2_CONFIG"]
        os.environ["DINO2_CONFIG"] = str(folder / "dino2.yaml")
        try:
            read_site().rows()
            cache_folder("weights")
            remember_dataset("Others", str(folder))
        finally:
            os.environ["DINO2_CONFIG"] = before

    return read


def checkpoint(seeds: Seeds, rng: random.Random, folder: Path) -> Callable[[], Any]:
    """Training checkpoints: any file of one, with a manifest that fits, so that PyTorch reads it."""
    import torch

    from dinov2cli.checkpoint import Checkpointer

    state = {"model": {"w": torch.ones(6, 4), "b": torch.ones(3)}, "optimizer": {"lr": 0.1, "betas": (0.9, 0.99)}}
    checkpointer = Checkpointer(folder / "checkpoints", keep=2)
    checkpointer.save(7, state, facts={"world_size": 2})
    path = checkpointer.list()[0][1]
    file = path / rng.choice((".metadata", ".metadata", "__0_0.distcp", "__0_0.distcp", "manifest.json"))
    if file.name == ".metadata" and rng.random() < 0.4:
        out = str(folder.parent / "canary")
        calls = Calls(os.system, f"touch {out}"), Calls(eval, "1+1"), Calls(open, out, "w"), Calls(bytearray, 1 << 40)
        file.write_bytes(pickle.dumps({"x": rng.choice(calls)}, protocol=rng.choice((0, 2, 4))))
    else:
        file.write_bytes(mutate(file.read_bytes(), rng))
    if file.name != "manifest.json":
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][file.name] = {"bytes": file.stat().st_size, "crc32": zlib.crc32(file.read_bytes())}
        manifest.pop("crc32")
        (path / "manifest.json").write_text(json.dumps(manifest))

    def read() -> None:
        again = Checkpointer(folder / "checkpoints", keep=2)
        again.newest()
        again.load_latest(
            {"model": {"w": torch.zeros(6, 4), "b": torch.zeros(3)}, "optimizer": {"lr": 0.0, "betas": ()}}
        )

    return read


KINDS: dict[str, Case] = {
    each.__name__: each
    for each in (
        weights,
        safetensors,
        dense_head,
        hf_folder,
        config,
        dataset,
        tar,
        table,
        image,
        video,
        dicom,
        site_file,
        checkpoint,
    )
}
