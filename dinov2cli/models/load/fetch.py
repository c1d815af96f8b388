"""Weights over HTTP: one cache folder, resumed and retried downloads, one process at a time."""

import http.client
import os
import shutil
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from dinov2cli import __version__
from dinov2cli.console import err, logger
from dinov2cli.errors import EnvironmentProblem, WeightsError
from dinov2cli.files import digest, lock, sha256
from dinov2cli.models.load.released import RELEASED_URL
from dinov2cli.models.load.tensor_files import refuse_cut_files, refuse_other_files
from dinov2cli.site import cache_folder

ATTEMPTS = 5
FIRST_WAIT_S = 0.5  # doubled after every failed attempt
_TIMEOUT_S = 30.0
_CHUNK = 1 << 20
# A torch.save file is larger than its tensors by names and alignment: well below this.
_OVERHEAD = 2 << 20


def is_url(text: str) -> bool:
    """Whether `text` is an address that `fetch` takes (http, https or file)."""
    return text.startswith(("http://", "https://", "file://"))


def fetch(url: str, *, expect_bytes: int | None = None) -> Path:
    """The local file of `url`, downloaded into `weights` of the cache folder if torch.hub has not done so.

    Released models come from `DINO2_WEIGHTS_URL` where it is set (a mirror with the same paths, `file://` too). An
    address may end in `#sha256=<hex>`, which is then checked. Interrupted downloads resume; concurrent processes wait
    for each other.

    Args:
        url: http, https or file.
        expect_bytes: size of the float32 tensors in it, where known; another size is refused.

    Raises:
        WeightsError: not to be had, incomplete, or not what was asked for.
        EnvironmentProblem: the disk is too small.
    """
    url, _, checksum = url.partition("#sha256=")
    address = _from_mirror(url)
    if address.startswith("file://"):
        local = Path(urllib.request.url2pathname(urllib.parse.urlparse(address).path))
        if not local.is_file():
            raise WeightsError(f"{address}: no such file")
        _check(local, expect_bytes, checksum)
        return local
    name = _name(url)
    target = cache_folder("weights") / name
    with lock(target):
        for place in (target, *(folder / name for folder in _other_folders(url))):
            if not place.is_file():
                continue
            try:
                _check(place, expect_bytes, checksum)
            except WeightsError as error:
                logger.warning("%s; downloading it again", error.message)
            else:
                return place
        part = target.with_name(target.name + ".part")
        _download(address, part, target)
        try:
            _check(part, expect_bytes, checksum)
        except WeightsError as error:
            part.unlink()
            raise WeightsError(f"{address}: wrong content: {error.message.removeprefix(f'{part}: ')}") from None
        part.replace(target)
    return target


def _from_mirror(url: str) -> str:
    mirror = os.environ.get("DINO2_WEIGHTS_URL")
    if not mirror or not url.startswith(RELEASED_URL + "/"):
        return url
    if not is_url(mirror):
        raise WeightsError(f"DINO2_WEIGHTS_URL={mirror} is no address; it starts with https://, http:// or file://")
    return mirror.rstrip("/") + url.removeprefix(RELEASED_URL)


def _name(url: str) -> Path:
    """Of the file in a folder of downloads."""
    name = Path(urllib.parse.unquote(urllib.parse.urlparse(url).path)).name
    if not name:
        raise WeightsError(f"{url}: names no file")
    # As torch.hub names it, so that its downloads are found. Elsewhere, the address tells one `model.safetensors` from
    # another.
    return Path(name) if url.startswith(RELEASED_URL + "/") else Path(digest(url)[:12], name)


def _other_folders(url: str) -> list[Path]:
    """Where the file may lie already: torch.hub's downloads, and where dino2 kept its own at first."""
    folders = [Path(torch.hub.get_dir()) / "checkpoints"]
    if os.environ.get("DINO2_CACHE"):
        folders.append(cache_folder("."))
    return folders if url.startswith(RELEASED_URL + "/") else [folder / "dino2" for folder in folders]


def _check(path: Path, expect_bytes: int | None, checksum: str) -> None:
    refuse_other_files(path)
    size = path.stat().st_size
    if expect_bytes is not None and not expect_bytes <= size <= expect_bytes + _OVERHEAD:
        raise WeightsError(f"{path}: {size:,} bytes, but the weights alone are {expect_bytes:,}")
    refuse_cut_files(path)
    if checksum and (found := sha256(path)) != checksum.lower():
        raise WeightsError(f"{path}: sha256 {found}, expected {checksum}")


def _download(url: str, part: Path, target: Path) -> None:
    wait = FIRST_WAIT_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _transfer(url, part)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code == 416:  # the partial file is longer than the file on the server
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                break
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, socket.gaierror) as e:
            reason = str(getattr(e, "reason", e)) or type(e).__name__
        if attempt < ATTEMPTS:
            logger.warning("download of %s interrupted (%s); trying again in %.1f s", url, reason, wait)
            time.sleep(wait)
            wait *= 2
    raise WeightsError(f"cannot download {url} ({reason}): fetch it elsewhere and put it at {target}")


def _transfer(url: str, part: Path) -> None:
    """One attempt. Continues `part`, if the server still has the same file; raises if the end is not reached."""
    stamp_file = part.with_name(part.name + ".stamp")
    start = part.stat().st_size if part.exists() and stamp_file.exists() else 0
    headers = {"User-Agent": f"dino2/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": stamp_file.read_text()}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S) as response:
        if response.status != 206:
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        needed, free = (total or start) - start, shutil.disk_usage(part.parent).free
        if needed > free:
            raise EnvironmentProblem(f"{part.parent}: {needed:,} bytes to download, {free:,} free; set DINO2_CACHE")
        stamp = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if stamp:
            stamp_file.write_text(stamp)
        else:
            stamp_file.unlink(missing_ok=True)
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
        progress = Progress(*columns, TimeRemainingColumn(), console=err, disable=not err.is_terminal)
        with part.open("ab" if start else "wb") as file, progress as bar:
            task = bar.add_task(Path(urllib.parse.urlparse(url).path).name, total=total, completed=start)
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.advance(task, len(chunk))
            file.flush()
            os.fsync(file.fileno())
    size = part.stat().st_size
    if total is not None and size != total:
        raise ConnectionError(f"{size:,} of {total:,} bytes came")
    stamp_file.unlink(missing_ok=True)
