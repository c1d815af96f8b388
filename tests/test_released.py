"""Released names and downloads, against a local HTTP server that breaks in every way it can."""

import hashlib
import http.server
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from processes import run_in_processes
from safetensors.torch import save_file
from weight_samples import assert_same_state, sample_model, save

from dinov2cli.errors import EnvironmentProblem, WeightsError
from dinov2cli.models.classifier import load_classifier
from dinov2cli.models.load import fetch as download
from dinov2cli.models.load import load_model
from dinov2cli.models.load.fetch import fetch
from dinov2cli.models.load.released import BACKBONES, RELEASED
from dinov2cli.models.vision_transformer import parameter_count
from dinov2cli.site import cache_folder

CONTENT = b"PK" + bytes(range(256)) * 20_000


@dataclass
class Site:
    """Files to serve and how the server misbehaves, one behaviour a request, then none."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    behaviours: list[str] = field(default_factory=list)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    etag: str = '"one"'


class Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        site = self.site
        wanted = self.headers.get("Range")
        site.requests.append((self.path, wanted))
        behaviour = site.behaviours.pop(0) if site.behaviours else ""
        if behaviour.isdecimal():
            return self.send_error(int(behaviour))
        content = site.files.get(self.path)
        if content is None:
            return self.send_error(404)
        start = 0
        if wanted and behaviour != "no ranges" and self.headers.get("If-Range") == site.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
        body = content[start:]
        self.send_response(206 if start else 200)
        if behaviour != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", site.etag)
        self.end_headers()
        if behaviour == "cut":
            body = body[: len(body) // 2]
        for i in range(0, len(body), 1 << 20):
            self.wfile.write(body[i : i + (1 << 20)])
            if behaviour == "slow":
                self.wfile.flush()
                time.sleep(0.02)
        return None

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("DINO2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "FIRST_WAIT_S", 0.01)
    site = Site(files={"/weights.pth": CONTENT})
    handler = type("BoundHandler", (Handler,), {"site": site})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


def leftovers() -> list[str]:
    """Files in the cache that are neither downloads nor locks."""
    return [p.name for p in cache_folder("weights").rglob("*") if p.is_file() and re.search(r"\.(part|stamp)$", p.name)]


def test_names_addresses_and_sizes_of_the_released_models() -> None:
    assert len(RELEASED) == 16 and len(BACKBONES) == 8
    base = "https://dl.fbaipublicfiles.com/dinov2"
    model = RELEASED["dinov2_vitb14_reg_lc"]
    assert model.backbone_url == f"{base}/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"
    assert model.head_url(4) == f"{base}/dinov2_vitb14/dinov2_vitb14_reg4_linear4_head.pth"
    assert RELEASED["dinov2_vits14"].head_url(1) == f"{base}/dinov2_vits14/dinov2_vits14_linear_head.pth"
    millions = [round(parameter_count(RELEASED[name].architecture) / 1e6) for name in BACKBONES[:4]]
    assert millions == [22, 87, 304, 1136]  # published as 21 M, 86 M, 300 M, 1,100 M
    assert RELEASED["dinov2_vitg14"].architecture.ffn_layer == "swiglu"
    assert RELEASED["dinov2_vitl14"].architecture.ffn_layer == "mlp"


def test_a_download_is_made_once(site: Site) -> None:
    first = fetch(f"{site.url}/weights.pth")
    assert first.read_bytes() == CONTENT
    assert fetch(f"{site.url}/weights.pth") == first
    assert len(site.requests) == 1
    assert leftovers() == []


def test_files_of_the_same_name_from_two_places_are_two(site: Site) -> None:
    site.files["/other/weights.pth"] = b"PK other"
    assert fetch(f"{site.url}/weights.pth").read_bytes() != fetch(f"{site.url}/other/weights.pth").read_bytes()


def test_an_interrupted_download_goes_on_where_it_stopped(site: Site) -> None:
    site.behaviours = ["cut", "cut"]
    assert fetch(f"{site.url}/weights.pth").read_bytes() == CONTENT
    half = len(CONTENT) // 2
    second_half = half + (len(CONTENT) - half) // 2
    assert [wanted for _, wanted in site.requests] == [None, f"bytes={half}-", f"bytes={second_half}-"]
    assert leftovers() == []


def test_a_later_process_resumes_a_download_that_was_given_up(site: Site) -> None:
    site.behaviours = ["cut", "503", "503", "503", "503"]
    with pytest.raises(WeightsError, match="HTTP 503"):
        fetch(f"{site.url}/weights.pth")
    site.requests.clear()
    assert fetch(f"{site.url}/weights.pth").read_bytes() == CONTENT
    assert [wanted for _, wanted in site.requests] == [f"bytes={len(CONTENT) // 2}-"]


def test_a_file_that_changed_meanwhile_is_not_mixed_with_the_old(site: Site) -> None:
    site.behaviours = ["cut", "503", "503", "503", "503"]
    with pytest.raises(WeightsError):
        fetch(f"{site.url}/weights.pth")
    site.files["/weights.pth"] = b"PK" + CONTENT[::-1]
    site.etag = '"two"'
    assert fetch(f"{site.url}/weights.pth").read_bytes() == site.files["/weights.pth"]


def test_a_server_without_ranges_starts_over(site: Site) -> None:
    site.behaviours = ["cut", "no ranges"]
    assert fetch(f"{site.url}/weights.pth").read_bytes() == CONTENT


def test_a_slow_server_is_waited_for(site: Site) -> None:
    site.behaviours = ["slow"]
    assert fetch(f"{site.url}/weights.pth").read_bytes() == CONTENT


def test_a_server_in_trouble_is_asked_again(site: Site) -> None:
    site.behaviours = ["500", "429", "503"]
    assert fetch(f"{site.url}/weights.pth").read_bytes() == CONTENT
    assert len(site.requests) == 4


def test_a_missing_file_is_not_asked_for_again(site: Site) -> None:
    with pytest.raises(WeightsError, match="HTTP 404") as caught:
        fetch(f"{site.url}/gone.pth")
    assert len(site.requests) == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [
    (b"<html>Please sign in</html>", "wrong content: an HTML page"),
    (b"", "wrong content: the file is empty"),
    (b"PK short", "wrong content: 8 bytes, but the weights alone are 5,120,000"),
    (b"PK" + bytes(9_000_000), "wrong content: 9,000,002 bytes, but the weights alone are 5,120,000"),
])  # fmt: skip
def test_wrong_content_is_refused_and_not_kept(site: Site, content: bytes, message: str) -> None:
    site.files["/weights.pth"] = content
    with pytest.raises(WeightsError, match=message):
        fetch(f"{site.url}/weights.pth", expect_bytes=5_120_000)
    assert not [p for p in cache_folder("weights").rglob("*") if p.is_file() and p.suffix != ".lock"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_cut_by_a_server_that_says_no_length_is_noticed(site: Site, tmp_path: Path, suffix: str) -> None:
    """Its structure says so where neither size nor digest is known."""
    whole = tmp_path / f"whole{suffix}"
    tensors = {"a": torch.ones(1000)}
    torch.save(tensors, whole) if suffix == ".pth" else save_file(tensors, whole)
    site.files[f"/m{suffix}"] = whole.read_bytes()[:-500]
    site.behaviours = ["no length"]
    with pytest.raises(WeightsError, match=r"wrong content: (cut short|not a complete safetensors)"):
        fetch(f"{site.url}/m{suffix}")
    assert leftovers() == []
    site.files[f"/m{suffix}"] = whole.read_bytes()
    site.behaviours = ["no length"]
    assert fetch(f"{site.url}/m{suffix}").read_bytes() == whole.read_bytes()


def test_a_checksum_in_the_address_is_checked(site: Site) -> None:
    right = hashlib.sha256(CONTENT).hexdigest()
    assert fetch(f"{site.url}/weights.pth#sha256={right}").read_bytes() == CONTENT
    site.files["/other.pth"] = CONTENT
    with pytest.raises(WeightsError, match=f"sha256 {right}, expected 00ff"):
        fetch(f"{site.url}/other.pth#sha256=00ff")


def test_a_damaged_file_in_the_cache_is_fetched_again(site: Site) -> None:
    file = fetch(f"{site.url}/weights.pth", expect_bytes=5_000_000)
    file.write_bytes(CONTENT[:1000])
    assert fetch(f"{site.url}/weights.pth", expect_bytes=5_000_000).read_bytes() == CONTENT


def test_offline_says_in_one_line_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO2_CACHE", str(tmp_path))
    monkeypatch.setenv("DINO2_WEIGHTS_URL", "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.setattr(download, "FIRST_WAIT_S", 0.01)
    with pytest.raises(WeightsError) as caught:
        load_model("dinov2_vits14")
    assert "\n" not in str(caught.value)
    assert "dinov2_vits14/dinov2_vits14_pretrain.pth" in str(caught.value)
    assert str(caught.value).endswith(f"put it at {tmp_path / 'weights' / 'dinov2_vits14_pretrain.pth'}")


def test_too_small_a_disk_is_noticed_first(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(EnvironmentProblem, match=r"bytes to download, 1,000 free; set DINO2_CACHE"):
        fetch(f"{site.url}/weights.pth")


def fetch_in_process(url: str) -> bytes:
    return fetch(url).read_bytes()


@pytest.mark.slow
def test_processes_share_one_download(site: Site) -> None:
    site.behaviours = ["slow"]
    assert run_in_processes(2, fetch_in_process, f"{site.url}/weights.pth") == [CONTENT] * 2
    assert len(site.requests) == 1


@pytest.mark.parametrize("folder", ["hub/checkpoints", "cache"])
def test_nothing_is_downloaded_that_torch_hub_or_an_earlier_dino2_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.setenv("DINO2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DINO2_WEIGHTS_URL", "http://127.0.0.1:9")  # the discard port: nothing listens
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    state = sample_model(RELEASED["dinov2_vits14"].architecture).state_dict()
    save(state, tmp_path / folder / "dinov2_vits14_pretrain.pth")
    assert_same_state(load_model("dinov2_vits14").state_dict(), state)


def test_other_downloads_of_an_earlier_dino2_are_found(site: Site, tmp_path: Path) -> None:
    url = f"{site.url}/weights.pth"
    there = tmp_path / "cache" / "dino2" / hashlib.sha256(url.encode()).hexdigest()[:12] / "weights.pth"
    there.parent.mkdir(parents=True)
    there.write_bytes(CONTENT)
    assert fetch(url) == there and not site.requests
    # One that is cut short is left alone, and fetched again.
    there.write_bytes(CONTENT[:1000])
    found = fetch(url, expect_bytes=5_000_000)
    assert found == tmp_path / "cache" / "weights" / there.parent.name / "weights.pth"
    assert found.read_bytes() == CONTENT and len(there.read_bytes()) == 1000


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["http", "file"])
def test_released_model_and_head_from_a_mirror(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    released = RELEASED["dinov2_vits14_reg_lc"]
    state = sample_model(released.architecture).state_dict()
    folder = tmp_path / "mirror" / "dinov2_vits14"
    backbone = save(state, folder / "dinov2_vits14_reg4_pretrain.pth")
    heads = {}
    for layers, name in ((1, "linear"), (4, "linear4")):
        heads[layers] = {"weight": torch.randn(1000, 384 * (layers + 1)), "bias": torch.randn(1000)}
        save(heads[layers], folder / f"dinov2_vits14_reg4_{name}_head.pth")
    assert 0 <= backbone.stat().st_size - released.backbone_bytes < 200_000
    if scheme == "http":
        site.files = {f"/{file.relative_to(tmp_path / 'mirror')}": file.read_bytes() for file in folder.iterdir()}
        monkeypatch.setenv("DINO2_WEIGHTS_URL", site.url)
    else:
        monkeypatch.setenv("DINO2_WEIGHTS_URL", (tmp_path / "mirror").as_uri())
    assert_same_state(load_model("dinov2_vits14_reg").state_dict(), state)
    for layers in (1, 4):
        classifier = load_classifier("dinov2_vits14_reg_lc", layers=layers)
        assert_same_state(dict(classifier.linear_head.state_dict()), heads[layers])
        assert_same_state(classifier.backbone.state_dict(), state)


def test_a_mirror_that_is_no_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINO2_WEIGHTS_URL", "somewhere")
    with pytest.raises(WeightsError, match="DINO2_WEIGHTS_URL=somewhere is no address"):
        load_model("dinov2_vits14")


def test_a_mirror_with_other_weights_under_the_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = RELEASED["dinov2_vits14"].architecture
    state = sample_model(other).state_dict()
    registers = {**state, "register_tokens": torch.zeros(1, 4, 384)}
    save(registers, tmp_path / "dinov2_vits14" / "dinov2_vits14_pretrain.pth")
    monkeypatch.setenv("DINO2_WEIGHTS_URL", tmp_path.as_uri())
    with pytest.raises(WeightsError, match="name dinov2_vits14 says num_register_tokens=0, but the weights have 4"):
        load_model("dinov2_vits14")


def test_architecture_without_weights() -> None:
    model = load_model("dinov2_vits14_reg", pretrained=False, img_size=224)
    assert model.num_register_tokens == 4 and model.pos_embed.shape == (1, 257, 384)
    assert not model.training
    with pytest.raises(WeightsError, match="'vit_small' is no released name"):
        load_model("vit_small", pretrained=False)
    with pytest.raises(WeightsError, match="do not make a model: img_size 225 is not a multiple"):
        load_model("dinov2_vits14", pretrained=False, img_size=225)
