"""What the site's file says, who wins, and how it is edited."""

from pathlib import Path

import pytest
import yaml

from dinov2cli.errors import ConfigError
from dinov2cli.site import cache_folder, forget_dataset, read_site, remember_dataset, user_file


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, in which the working folder lies."""
    for variable in ("DINO2_CONFIG", "DINO2_CACHE", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_the_users_file_is_where_xdg_says(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_file() == home / ".config" / "dino2" / "dino2.yaml"
    monkeypatch.setenv("XDG_CONFIG_HOME", "/xdg")
    assert user_file() == Path("/xdg/dino2/dino2.yaml")
    monkeypatch.setenv("DINO2_CONFIG", "~/mine.yaml")
    assert user_file() == home / "mine.yaml"


def test_the_working_folders_file_wins_key_by_key(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST", "/fast")
    user, here = user_file(), Path("dino2.yaml").absolute()
    user.parent.mkdir(parents=True)
    user.write_text(
        "datasets:\n  ImageNet: {root: /a, extra: /e}\n  photos: ~/p\n"
        "slurm: {partition: long, timeout_min: 60}\nruns: $FAST/runs\n"
    )
    here.write_text("datasets:\n  ImageNet: {root: data}\nslurm:\n  partition: short\ncache: cache\n")
    site = read_site()
    place = site.settings.datasets["ImageNet"]
    assert not isinstance(place, str) and (place.root, place.extra) == (str(here.parent / "data"), None)
    assert site.settings.datasets["photos"] == str(home / "p")
    assert (site.settings.slurm.partition, site.settings.slurm.timeout_min) == ("short", 60)
    assert (site.settings.runs, site.settings.cache) == ("/fast/runs", str(here.parent / "cache"))
    assert site.sources == {
        "datasets.ImageNet": here, "datasets.photos": user, "slurm.partition": here, "slurm.timeout_min": user,
        "runs": user, "cache": here,
    }  # fmt: skip
    assert ("slurm.timeout_min", "60", user) in site.rows()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("slurm: {partitoin: x}", "slurm.partitoin: no such key; did you mean partition?"),
        ("slurm: {nodes: 4}", "slurm.nodes: the number of machines is said with each command, as --nodes N"),
        ("slurm: {timeout_min: soon}", "slurm.timeout_min=soon: must be a valid integer"),
        ("rnus: /x", "rnus: no such key; did you mean runs?"),
        ("datasets: {a: 5}", "datasets.a: must be a folder, a dataset string, or the root: and extra: of an ImageNet"),
        ("datasets: {a: {rot: /x}}", "datasets.a: must be a folder, a dataset string"),
        ("runs: [1]", "runs=[1]: must be a valid string"),
        ("runs: [", "not valid YAML"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(text: str, says: str) -> None:
    Path("dino2.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_site()
    assert says in caught.value.message and "dino2.yaml" in caught.value.message


WRITTEN = """\
# Our cluster.
slurm:  # ask Kim
  partition: gpu

datasets:
    # the big disk
    photos: /photos  # since May

    old: {root: /old,
          extra: /e}
# until the disk is full
runs: /runs
"""


def test_editing_leaves_every_other_line() -> None:
    user_file().parent.mkdir(parents=True)
    user_file().write_text(WRITTEN)
    remember_dataset("ImageNet", {"root": "/in", "extra": "/in: extra"})
    added = "    ImageNet:\n      root: /in\n      extra: '/in: extra'\n"
    assert user_file().read_text() == WRITTEN.replace("extra: /e}\n", "extra: /e}\n" + added)
    remember_dataset("photos", "/other")
    assert "    # the big disk\n    photos: /other\n\n    old:" in user_file().read_text()
    forget_dataset("old")
    assert user_file().read_text() == WRITTEN.replace("    old: {root: /old,\n          extra: /e}\n", added).replace(
        "/photos  # since May", "/other"
    )
    for name in ("photos", "ImageNet"):
        forget_dataset(name)
    assert read_site().settings.datasets == {} and read_site().settings.runs == "/runs"


@pytest.mark.parametrize("text", ["", "runs: /r", "datasets:\n", "datasets: {a: /a}\nruns: /r\n", "# only this"])
def test_a_name_is_added_to_whatever_is_there(text: str) -> None:
    user_file().parent.mkdir(parents=True)
    user_file().write_text(text)
    remember_dataset("b", "/b")
    before = yaml.safe_load(text) or {}
    expected = {**before, "datasets": {**(before.get("datasets") or {}), "b": "/b"}}
    assert yaml.safe_load(user_file().read_text()) == expected
    forget_dataset("b")
    assert (yaml.safe_load(user_file().read_text()).get("datasets") or {}) == (before.get("datasets") or {})


def test_a_wrong_file_is_not_edited() -> None:
    user_file().parent.mkdir(parents=True)
    user_file().write_text("datasets: [1]\n")
    with pytest.raises(ConfigError, match="datasets"):
        remember_dataset("b", "/b")
    assert user_file().read_text() == "datasets: [1]\n"


@pytest.mark.parametrize("kind", ["weights", "features", "listings"])
def test_one_cache_folder_holds_all(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("DINO2_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert cache_folder(kind) == tmp_path / ".cache" / "dino2" / kind
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder(kind) == Path("/xdg/dino2") / kind
    Path("dino2.yaml").write_text("cache: /site")
    assert cache_folder(kind) == Path("/site") / kind
    monkeypatch.setenv("DINO2_CACHE", "~/mine")
    assert cache_folder(kind) == tmp_path / "mine" / kind
