"""Completion scripts: as generated, accepted by their shells, and offering what there is to type."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from dinov2cli.cli.completion.scripts import generate, write
from dinov2cli.cli.main import TREE
from dinov2cli.cli.tree import Command, command_tree
from dinov2cli.config import list_presets
from dinov2cli.config.tree import FIELDS
from dinov2cli.requests.base import Request, argument, option

COMPLETIONS = Path(__file__).parents[1] / "completions"
PRESETS = [preset.name for preset in list_presets()]
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
needs_zsh = pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
needs_fish = pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")


class TrainIt(Request):
    """Train: it's [quick]."""

    command = "train-it"

    overrides: tuple[str, ...] = argument("Keys: a.b=value.", default=(), completes="overrides")
    preset: str | None = option(None, "A $preset `name`.", flags="--preset -p", completes="presets")
    output_dir: Path = option(Path(), 'Where "it" goes.')
    device: Literal["cpu", "cuda"] = option("cpu", "Where it runs.")
    gpus: int = option(1, "How many.")
    quick: bool = option(True, "How fast.")


class One(Request):
    """The one."""

    command = "group one"

    weights: Path = argument("A file.")


def probe_tree() -> Command:
    """A command line with each kind of parameter once."""
    return command_tree({each.command: each for each in (TrainIt, One)}, {"group": "A group."}, name="probe")


@pytest.fixture(scope="module")
def probe_scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("completions")
    (folder / "folder").mkdir()
    (folder / "file.pth").touch()
    return {path.name: path for path in write(probe_tree(), folder)}


def test_scripts_in_the_repository_are_up_to_date() -> None:
    for name, text in generate(TREE).items():
        stored = (COMPLETIONS / name).read_text() if (COMPLETIONS / name).exists() else ""
        assert stored == text, f"completions/{name} is old: run python -m dinov2cli.cli.completion.scripts"


def test_every_command_and_option_is_in_every_script() -> None:
    root = TREE
    for name, text in generate(root).items():
        for command in root.walk():
            assert command.path[-1] in text, (name, command.path)
            for each in command.options:
                for flag in each.flags:
                    assert (flag.lstrip("-") if name.endswith(".fish") else flag) in text, (name, command.path, flag)


def test_tree_holds_what_the_help_shows() -> None:
    root = probe_tree()
    assert list(root.commands) == ["train-it", "group"]
    assert list(root.commands["group"].commands) == ["one"]
    options = {option.flags: option for option in root.commands["train-it"].options}
    assert [word for word, _ in options["--preset", "-p"].words] == PRESETS
    assert [word for word, _ in options["--device",].words] == ["cpu", "cuda"]
    assert options["--output-dir",].kind == "folders"
    assert options["--gpus",].takes_value
    assert not options["--quick", "--no-quick"].takes_value
    (overrides,) = root.commands["train-it"].arguments
    assert overrides.many
    assert {word for word, _ in overrides.words} == {f"{key}=" for key in FIELDS}


def test_generating_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from dinov2cli.cli.completion.scripts import generate\n"
        "from dinov2cli.cli.main import TREE\n"
        "generate(TREE)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_typers_own_completion_imports_no_torch_either() -> None:
    environment = {
        **os.environ, "_DINO2_COMPLETE": "complete_bash", "COMP_WORDS": "dino2 presets show vitl", "COMP_CWORD": "3",
    }  # fmt: skip
    code = (
        "import sys\n"
        "from dinov2cli.cli.main import main\n"
        "sys.argv = ['dino2']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [name for name in PRESETS if name.startswith("vitl")]


OFFERS = [
    (["probe", ""], {"train-it", "group"}),
    (["probe", "tr"], {"train-it"}),
    (["probe", "group", ""], {"one"}),
    (["probe", "train-it", "--pre"], {"--preset"}),
    (["probe", "train-it", "--preset", "vitl"], {name for name in PRESETS if name.startswith("vitl")}),
    (["probe", "train-it", "--device", ""], {"cpu", "cuda"}),
    (["probe", "train-it", "optim.base"], {"optim.base_lr="}),
    (["probe", "train-it", "--preset", "demo", "train.se"], {"train.seed="}),
    (["probe", "train-it", "--output-dir", "f"], {"folder"}),
]
OFFER_IDS = [" ".join(words) for words, _ in OFFERS]


@needs_bash
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        *OFFERS,
        # bash hands over `--device=c` and `key=c` as three words
        (["probe", "train-it", "--device", "=", "cu"], {"cuda"}),
        (["probe", "train-it", "train.centering", "="], {"centering", "sinkhorn_knopp"}),
        (["probe", "train-it", "train.centering", "=", "s"], {"sinkhorn_knopp"}),
        (["probe", "group", "one", ""], set()),  # bash offers files itself
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bash_offers(words: list[str], offered: set[str], probe_scripts: dict[str, Path]) -> None:
    script = probe_scripts["probe.bash"]
    code = (
        'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _probe 2>/dev/null; '
        "printf '%s\\n' \"${COMPREPLY[@]}\"; complete -p probe"
    )
    result = subprocess.run(
        ["bash", "--norc", "-c", code, str(script), *words], capture_output=True, text=True, cwd=script.parent
    )
    assert result.stderr == ""
    *lines, registered = result.stdout.splitlines()
    assert {line for line in lines if line} == offered
    assert registered == "complete -o bashdefault -o default -F _probe probe"


@needs_fish
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        *OFFERS[:-1],
        (["probe", "train-it", "--output-dir", "f"], {"folder/"}),
        (["probe", "train-it", "train.centering=s"], {"train.centering=sinkhorn_knopp"}),
        (["probe", "group", "one", "fi"], {"file.pth"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_fish_offers(words: list[str], offered: set[str], probe_scripts: dict[str, Path]) -> None:
    script = probe_scripts["probe.fish"]
    code = f"source '{script}'; complete -C '{' '.join(words)}'"
    result = subprocess.run(["fish", "-N", "-c", code], capture_output=True, text=True, cwd=script.parent)
    assert result.stderr == ""
    assert {line.split("\t")[0] for line in result.stdout.splitlines()} == offered


@needs_zsh
@pytest.mark.parametrize(("words", "offered"), OFFERS, ids=OFFER_IDS)
def test_zsh_offers(words: list[str], offered: set[str], probe_scripts: dict[str, Path]) -> None:
    # A real interactive zsh in a pseudo-terminal. compadd is wrapped, so that it prints what it is going to offer.
    script = probe_scripts["_probe"]
    setup = [
        f"cd '{script.parent}'", f"fpath=('{script.parent}' $fpath)", "autoload -U compinit", "compinit -D -u",
        "compadd () { [[ $@[1,(i)(-|--)] == *-(O|A|D)\\ * ]] && { builtin compadd \"$@\"; return }; "
        "typeset -a __hits; builtin compadd -A __hits \"$@\"; "
        "(($#__hits)) && print -r -- OFFER:${^__hits}:; builtin compadd \"$@\" }",
        "zstyle ':completion:*' list-prompt ''", "LISTMAX=10000", "bindkey '^I' complete-word", "PS1=", "print READY",
    ]  # fmt: skip
    driver = (
        "zmodload zsh/zpty; zpty z zsh -f -i\n"
        + "".join(f"zpty -w z {quoted(line)}\n" for line in setup)
        + "zpty -r z out '*READY*READY*'\n"
        + f"zpty -w -n z {quoted(' '.join(words))}$'\\t'\n"
        # Kill the line; the marker comes out when the completion is done.
        + "zpty -w -n z $'\\x15'\nzpty -w z 'print DO''NE'\nzpty -r z out '*DONE*'; print -r -- $out; zpty -d z"
    )
    result = subprocess.run(["zsh", "-f", "-c", driver], capture_output=True, text=True, cwd=script.parent)
    text = result.stdout
    got = {part.split(":")[0] for part in text.split("OFFER:")[1:]}
    assert got == {word.removesuffix("=") for word in offered}, text


@pytest.mark.parametrize(
    ("name", "check"),
    [
        pytest.param("dino2.bash", ["bash", "-n"], marks=needs_bash),
        pytest.param("_dino2", ["zsh", "-n"], marks=needs_zsh),
        pytest.param("dino2.fish", ["fish", "-n"], marks=needs_fish),
    ],
)
def test_shells_accept_the_scripts(name: str, check: list[str], tmp_path: Path) -> None:
    write(TREE, tmp_path)
    result = subprocess.run([*check, str(tmp_path / name)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def test_command_summary_is_the_first_line() -> None:
    assert Command(("x",), "One.\n\nTwo.").summary == "One."
