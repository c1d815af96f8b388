"""Files and folders appear whole or not at all."""

import hashlib
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from filelock import Timeout

import dinov2cli
from dinov2cli.errors import EnvironmentProblem
from dinov2cli.files import digest, lock, replacing, sha256, user_path, write_array, write_bytes, write_text, writing


@pytest.mark.parametrize("flush", [False, True])
def test_a_file_is_replaced_with_the_permissions_of_a_new_one(tmp_path: Path, flush: bool) -> None:
    path = tmp_path / "new" / "folders" / "file.txt"
    write_text(path, "first\r\n", flush=flush)
    write_text(path, "größer\n", flush=flush)
    assert path.read_bytes() == "größer\n".encode()
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("folder", [False, True])
def test_what_fails_leaves_what_was_there(tmp_path: Path, failure: type[BaseException], folder: bool) -> None:
    path = tmp_path / "output"
    with replacing(path) as aside:
        aside.mkdir()
        (aside / "old").touch()
    with pytest.raises(failure), replacing(path) as aside:
        if folder:
            aside.mkdir()
            (aside / "half").touch()
        else:
            aside.write_text("half")
        raise failure
    assert os.listdir(tmp_path) == ["output"] and os.listdir(path) == ["old"]


def test_a_whole_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with replacing(tmp_path / "output") as aside:
            aside.mkdir()
            (aside / name).touch()
    assert os.listdir(tmp_path) == ["output"] and os.listdir(tmp_path / "output") == ["new"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "output"):
        pass
    assert not os.listdir(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "below"
    with pytest.raises(OSError):
        write_bytes(path, b"")
    with pytest.raises(EnvironmentProblem, match=f"{path}: cannot be written \\((Not a directory|File exists)\\)"):
        write_array(path, np.zeros(1))
    with pytest.raises(EnvironmentProblem, match="cannot be written"), writing(path):
        write_text(path, "")


def test_arrays_are_read_as_they_were(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    write_array(tmp_path / "array.npy", array)
    np.testing.assert_array_equal(np.load(tmp_path / "array.npy"), array, strict=True)


def test_a_lock_is_held_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with lock(path):
        assert os.listdir(path.parent) == ["file.lock"]
        with pytest.raises(Timeout):
            lock(path).acquire(timeout=0)  # type: ignore[attr-defined]


def test_digests_are_sha256(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    assert sha256(tmp_path / "a", tmp_path / "b") == digest("ab") == hashlib.sha256(b"ab").hexdigest()


def test_the_home_of_nobody_is_a_name_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert user_path("~/x") == Path("/home/somebody/x")
    assert user_path("~nobody-is-called-so/x") == Path("~nobody-is-called-so/x")
    package = Path(dinov2cli.__file__).parent
    assert not [path for path in package.rglob("*.py") if ").expanduser()" in path.read_text()]
