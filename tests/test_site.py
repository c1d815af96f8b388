"""What the site's file says, who wins, how it is edited; and what follows for datasets, run folders and jobs."""

from pathlib import Path

import pytest
import yaml
from PIL import Image

from dinov2cli.cluster import check, origins, partitions
from dinov2cli.config import load_config
from dinov2cli.data import known
from dinov2cli.data.datasets import make_dataset
from dinov2cli.data.datasets.strings import KINDS
from dinov2cli.data.spelling import EXAMPLES, complete
from dinov2cli.errors import ConfigError, DataError, Several
from dinov2cli.eval.first_look import datasets_for
from dinov2cli.launch.local import Elsewhere
from dinov2cli.launch.slurm import wanted_for
from dinov2cli.launch.training import launch, resolve_config
from dinov2cli.launch.typed import print_origins
from dinov2cli.requests.base import run
from dinov2cli.requests.datasets import AddDatasetRequest, ForgetDatasetRequest, ShowDatasetRequest
from dinov2cli.requests.launch import Slurm
from dinov2cli.requests.tools import PrepareImagenetRequest
from dinov2cli.requests.train import TrainRequest
from dinov2cli.site import cache_folder, read_site, remember_dataset, user_file


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
        (
            "overrides: {train: {keep: 1}}",
            "overrides: write single keys, such as train.num_workers: 8, instead of train",
        ),
        ("overrides: {train.output_dir: /r}", "overrides: train.output_dir would be the one folder of all runs"),
        ("overrides: [train.keep=1]", "overrides=['train.keep=1']: must be a valid dictionary"),
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
    remember_dataset("old", None)
    assert user_file().read_text() == WRITTEN.replace("    old: {root: /old,\n          extra: /e}\n", added).replace(
        "/photos  # since May", "/other"
    )
    for name in ("photos", "ImageNet"):
        remember_dataset(name, None)
    assert read_site().settings.datasets == {} and read_site().settings.runs == "/runs"


@pytest.mark.parametrize(
    "text", ["", "runs: /r", "datasets:  # mine\n", "datasets: ~\n", "datasets: {a: /a}\nruns: /r\n", "# only this"]
)
def test_a_name_is_added_to_whatever_is_there(text: str) -> None:
    user_file().parent.mkdir(parents=True)
    user_file().write_text(text)
    remember_dataset("b", "/b")
    before = yaml.safe_load(text) or {}
    expected = {**before, "datasets": {**(before.get("datasets") or {}), "b": "/b"}}
    assert yaml.safe_load(user_file().read_text()) == expected and ("# mine" in text) == (
        "# mine" in user_file().read_text()
    )
    remember_dataset("b", None)
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


def write_photos(folder: Path, *names: str) -> Path:
    for name in names or ("cat/1.png", "dog/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def write_imagenet(root: Path) -> Path:
    """ImageNet-1k's layout with one class."""
    for path in ("train/n01440764/n01440764_0.JPEG", "val/n01440764/ILSVRC2012_val_00000001.JPEG"):
        (root / path).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / path)
    (root / "labels.txt").write_text("n01440764,tench\n")
    return root


def write_settings(text: str) -> None:
    user_file().parent.mkdir(parents=True, exist_ok=True)
    user_file().write_text(text)


def test_every_dataset_by_name_has_an_example() -> None:
    assert {name: kind.example for name, kind in KINDS.items()} == EXAMPLES


def test_what_is_prepared_is_known(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, extra = write_imagenet(home / "in: 1k"), home / "extra"
    run(PrepareImagenetRequest(root=root, extra=extra))
    said = capsys.readouterr().out.splitlines()
    assert said[-2] == "known as ImageNet in ~/.config/dino2/dino2.yaml"
    assert said[-1].startswith("next: dino2 train --preset vitl16_short")
    place = f'root="{root}":extra={extra}'
    assert complete("ImageNet:split=VAL") == f"ImageNet:split=VAL:{place}"
    assert complete("2*ImageNet + SamplePhotos", "TRAIN") == f"2*ImageNet:split=TRAIN:{place} + SamplePhotos"
    assert len(make_dataset("ImageNet:split=TRAIN")) == len(make_dataset(complete("ImageNet", "VAL"))) == 1
    assert datasets_for(None, None, None) == (f"ImageNet:split=TRAIN:{place}", f"ImageNet:split=VAL:{place}")
    config = resolve_config(TrainRequest(preset="vitl16_short"))
    assert (
        config.train.dataset_path == f"ImageNet:split=TRAIN:{place}" and config.train.output_dir == "runs/vitl16_short"
    )
    shown = str(run(ShowDatasetRequest(name="ImageNet")))
    assert "TRAIN" in shown and "VAL" in shown and "1 classes" in shown


def test_another_imagenet_does_not_take_the_name_by_itself(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_imagenet(home / "first"), write_imagenet(home / "second")
    run(PrepareImagenetRequest(root=first))
    run(PrepareImagenetRequest(root=second))
    command = f"dino2 datasets add ImageNet {second} --extra {second} --overwrite"
    assert command in capsys.readouterr().out and str(first) in complete("ImageNet", "VAL")
    with pytest.raises(ConfigError, match="known already"):
        run(AddDatasetRequest(name="ImageNet", dataset=str(second)))
    run(AddDatasetRequest(name="ImageNet", dataset=str(second), force=True))
    assert str(second) in complete("ImageNet", "VAL")
    second.rename(home / "third")
    with pytest.raises(DataError, match=r"second, where it lies by ~/.config/dino2/dino2.yaml, is not there"):
        complete("ImageNet", "VAL")
    run(PrepareImagenetRequest(root=first))
    assert str(first) in complete("ImageNet", "VAL"), "what is gone gives its name to what is there"


@pytest.mark.parametrize(
    ("data", "message", "remedy"),
    [
        ("ImageNet", "ImageNet needs root=...", "dino2 prepare-imagenet --root ROOT"),
        ("ImageNet22k", "ImageNet22k needs root=...", "dino2 prepare-imagenet --variant 22k --root ROOT"),
        ("photso", "did you mean photos?", "photos"),
        ("photos:split=x", "takes no keys", ""),
    ],
)
def test_what_is_not_known_ends_in_the_line_that_mends_it(data: str, message: str, remedy: str) -> None:
    write_settings("datasets: {photos: /}")
    with pytest.raises(DataError) as caught:
        make_dataset(data)
    assert message in caught.value.message and remedy in str(caught.value.hint)


def test_a_preset_of_22k_where_1k_is_known(home: Path) -> None:
    run(PrepareImagenetRequest(root=write_imagenet(home / "in")))
    with pytest.raises(DataError) as caught:
        resolve_config(TrainRequest(preset="vitl14"))
    assert "--data ImageNet" in str(caught.value.hint) and "--variant 22k" in str(caught.value.hint)
    assert resolve_config(TrainRequest(preset="vitl14", data="ImageNet")).train.dataset_path.startswith(
        "ImageNet:split=TRAIN"
    )


def test_names_of_ones_own(home: Path) -> None:
    photos = write_photos(home / "photos")
    assert "2 images, 2 classes" in run(AddDatasetRequest(name="mine", dataset="../photos"))
    assert complete("mine + 2*mine") == f"{photos} + 2*{photos}" and len(make_dataset("mine")) == 2
    run(AddDatasetRequest(name="joined", dataset="2*folder:../photos + Folder:root=../photos"))
    assert complete("joined") == f"2*folder:{photos} + Folder:root={photos}"
    run(ForgetDatasetRequest(name="joined"))
    write_photos(Path("mine"), "1.png")
    with pytest.raises(DataError, match=r"mine is a folder here, and in .* the name of"):
        complete("mine")
    assert complete("./mine") == "./mine"
    with pytest.raises(ConfigError, match="a kind of dataset"):
        run(AddDatasetRequest(name="Folder", dataset=str(photos)))
    with pytest.raises(DataError):
        run(AddDatasetRequest(name="none", dataset=str(home / "none")))
    assert "its files stay" in run(ForgetDatasetRequest(name="mine")) and photos.is_dir()
    with pytest.raises(ConfigError, match="no dataset is known as mine; known: none yet"):
        known.find("mine")


def test_a_run_folder_is_named_after_preset_file_or_data(home: Path) -> None:
    write_photos(home / "my photos")
    Path("long.yaml").write_text("optim: {epochs: 200}")
    photos = str(home / "my photos")
    for words, name in (
        ({"preset": "vits14", "data": photos}, "vits14"),
        ({"config_file": "long.yaml", "data": photos}, "long"),
        ({"data": photos}, "my-photos"),
        ({"data": "SamplePhotos:split=TRAIN"}, "SamplePhotos"),
    ):
        assert resolve_config(TrainRequest(**words)).train.output_dir == f"runs/{name}"
    write_settings("runs: /scratch/runs")
    assert resolve_config(TrainRequest(preset="vits14", data=photos)).train.output_dir == "/scratch/runs/vits14"
    assert resolve_config(TrainRequest(preset="vits14", data=photos, output_dir="x")).train.output_dir == "x"


def test_keys_of_the_site_stand_between_preset_and_file(capsys: pytest.CaptureFixture[str]) -> None:
    write_settings("overrides: {train.keep: 7, optim.epochs: 30, train.batch_size_per_gpu: 16, train.wandb: false}")
    Path("dino2.yaml").write_text("overrides: {train.keep: 8}")
    Path("mine.yaml").write_text("optim: {epochs: 40}")
    photos = str(write_photos(Path("photos")))
    of_preset = TrainRequest(preset="vitb14", data=photos, overrides=("train.batch_size_per_gpu=2",))
    config = resolve_config(of_preset)
    assert (config.train.keep, config.optim.epochs, config.train.batch_size_per_gpu) == (8, 30, 2)
    assert load_config("vitb14").optim.epochs != 30, "the preset says another number"
    config.save("run/config.yaml")
    of_file = resolve_config(TrainRequest(config_file=Path("mine.yaml"), data=photos))
    assert (of_file.train.keep, of_file.optim.epochs) == (8, 40)
    print_origins(of_preset, config)
    said = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert f"train.keep 8 {Path('dino2.yaml').absolute()}".replace(str(Path.home()), "~") in said
    assert "optim.epochs 30 ~/.config/dino2/dino2.yaml" in said and "batch_size" not in str(said)
    write_settings("overrides: {train.keep: 9}")
    assert resolve_config(TrainRequest(config_file=Path("run/config.yaml"))) == config, "config.yaml alone says all"


def test_a_wrong_key_of_the_site_is_named_with_its_file() -> None:
    write_settings("overrides: {optim.epoch: 3, train.keep: 0, optim.warmup_epochs: 200, optim.epochs: 100}")
    photos = str(write_photos(Path("photos")))
    with pytest.raises(ConfigError) as caught:
        resolve_config(TrainRequest(data=photos))
    file = "(in ~/.config/dino2/dino2.yaml)"
    assert f"optim.epoch=3: no such key; did you mean optim.epochs? {file}" in caught.value.message
    assert f"train.keep=0: must be a whole number, at least 1 {file}" in caught.value.message
    write_settings("overrides: {optim.warmup_epochs: 200, optim.epochs: 100}")
    with pytest.raises(ConfigError, match=r"optim.warmup_epochs=200: .* \(in ~/.config/dino2/dino2.yaml\)"):
        resolve_config(TrainRequest(data=photos))
    assert resolve_config(TrainRequest(data=photos, overrides=("optim.warmup_epochs=1",))).optim.epochs == 100


@pytest.mark.parametrize(("missing", "state"), [(0, "a finished run"), (1, "an unfinished run")])
def test_another_run_in_the_default_folder_is_not_touched(missing: int, state: str) -> None:
    request = TrainRequest(preset="demo", data="SamplePhotos:split=TRAIN")
    config = resolve_config(request)
    config.save("runs/demo/config.yaml")
    (Path("runs/demo/checkpoints") / f"iteration_{config.iterations() - missing:07d}").mkdir(parents=True)
    assert resolve_config(request) == config, "the same command goes on"
    if not missing:  # and where there is nothing left to do, it says so: no job waits in a queue for that
        assert launch(request.model_copy(update={"slurm": Slurm(nodes=2)})) == Elsewhere(None)
        assert not Path("runs/demo/slurm").exists()
    other = request.model_copy(update={"overrides": (*request.overrides, "train.seed=1")})
    with pytest.raises(ConfigError) as caught:
        resolve_config(other)
    assert f"runs/demo holds {state}" in caught.value.message and "train.seed (0 there, 1 here)" in caught.value.message
    for choice in ("--output-dir runs/demo-2", "--output-dir runs/demo ", "--no-resume"):
        assert choice in str(caught.value.hint)
    for chosen in ({"output_dir": Path("runs/demo")}, {"no_resume": True}):
        assert resolve_config(other.model_copy(update=chosen)).train.seed == 1


SINFO = """#!/bin/sh
printf 'main*|3\\nmain*|1\\nhigh|2\\n'
"""


@pytest.fixture
def sinfo(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's answer on a cluster of four machines (`tests/slurm` asks a real one)."""
    program = home / "bin" / "sinfo"
    program.parent.mkdir()
    program.write_text(SINFO)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def test_more_machines_than_there_are(sinfo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    main, high = partitions()
    assert (main.name, main.nodes, main.is_default) == ("main", 4, True)
    assert (high.name, high.nodes, high.is_default) == ("high", 2, False)
    with pytest.raises(ConfigError) as caught:
        wanted_for(Slurm(nodes=12), None, cpu=False, usual=8)
    assert caught.value.message == "--nodes 12: partition main has 4 machines"
    assert "Type --nodes 4" in str(caught.value.hint) and "fewer_nodes: true" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="--partition gpu: Slurm has no partition gpu\nThere are: main, high"):
        wanted_for(Slurm(partition="gpu"), None, cpu=False, usual=8)
    write_settings("slurm: {partition: gpu, mem: plenty}")
    with pytest.raises(Several) as several:
        check(Slurm(nodes=12), submits=False)
    said = "slurm.{0} in ~/.config/dino2/dino2.yaml {1}: "
    assert [each.message.startswith(said.format(*start)) for each, start in zip(
        several.value.found, [("mem", "plenty"), ("partition", "gpu")], strict=True)] == [True, True]  # fmt: skip
    with pytest.raises(ConfigError, match="--nodes 12: partition high has 2 machines"):
        check(Slurm(nodes=12, partition="high", mem="9G"), submits=False)
    write_settings("slurm: {partition: high, fewer_nodes: true}")
    assert wanted_for(Slurm(nodes=12), None, cpu=False, usual=8).slurm.nodes == 2
    assert wanted_for(Slurm(nodes=12, partition="main"), None, cpu=False, usual=8).slurm.nodes == 4
    monkeypatch.setenv("PATH", "/nowhere")
    assert wanted_for(Slurm(nodes=12), None, cpu=False, usual=8).slurm.nodes == 12, "where nobody can tell"


def test_what_is_typed_wins_over_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    write_settings(
        "slurm: {partition: long, timeout_min: 60, setup: [module load a], parameters: [nice=1, reservation=r],\n"
        "        gpus: 0}"
    )
    typed = Slurm(nodes=2, partition="short", parameters=("nice=2",))
    wanted = wanted_for(typed, None, cpu=False, usual=8)
    assert (wanted.gpus, wanted.cpu) == (1, True) and wanted_for(typed, 4, cpu=False, usual=8)[1:] == (4, False)
    slurm = wanted.slurm
    assert (slurm.nodes, slurm.partition, slurm.timeout_min, slurm.setup) == (2, "short", 60, ("module load a",))
    assert slurm.parameters == ("nice=1", "reservation=r", "nice=2"), "the last of a name counts"
    file = "~/.config/dino2/dino2.yaml"
    assert {name: source for name, _, source in origins(typed)} == {
        "nodes": "typed", "partition": "typed", "timeout_min": file, "setup": file, "parameters": f"typed and {file}",
    }  # fmt: skip
