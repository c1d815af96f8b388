"""Words that no request can be made of are refused, all of them at once, with what would be right."""

import pytest

from dinov2cli.cli.main import TREE
from dinov2cli.cli.refusals import refuse
from dinov2cli.cli.tree import Command
from dinov2cli.errors import Dino2Error

COMMANDS = [command for command in TREE.walk() if command.request]
every_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.words)
HELP = {"--help", "-h"}


def refused(words: str) -> str:
    """What is said of the words behind `dino2`."""
    path, rest = TREE, words.split()
    while rest and rest[0] in path.commands:
        path = path.commands[rest.pop(0)]
    with pytest.raises(Dino2Error) as error:
        refuse(rest, path.parameters, path.words, HELP)
    return str(error.value)


@every_command
def test_every_option_says_what_it_takes(command: Command) -> None:
    words = command.words.removeprefix("dino2 ")
    for flag in (flag for option in command.options if option.takes_value for flag in option.flags):
        assert f"{flag}: its value is missing; it takes " in refused(f"{words} {flag}")
        assert f"{flag}: its value is missing; it takes " in refused(f"{words} {flag} --quiet")
    for flag in (flag for option in command.options if not option.takes_value for flag in option.flags):
        assert flag in HELP or f"{flag}=x: {flag} takes no value" in refused(f"{words} {flag}=x")


@every_command
def test_every_wrong_value_is_named_with_what_would_be_right(command: Command) -> None:
    words = command.words.removeprefix("dino2 ")
    for option in command.options:
        flag, bounds = option.flags[0], option.bounds
        if option.plain in (int, float):
            kind = "a whole number" if option.plain is int else "a number"
            limits = f", from {bounds.get('ge')} to {bounds.get('le')}" if len(bounds) == 2 else ""
            limits = f", at least {bounds['ge']}" if [*bounds] == ["ge"] else limits
            beyond = [bounds[side] + step for side, step in (("ge", -1), ("le", 1)) if side in bounds]
            for value in ("x", *beyond):
                assert f"{flag} {value}: must be {kind}{limits}" in refused(f"{words} {flag} {value}")
        elif option.kind == "words":
            known = [word for word, _ in option.words]
            said = refused(f"{words} {flag} {known[0].lower()}x")
            assert f"{flag} {known[0].lower()}x: must be one of {', '.join(known)}; did you mean {known[0]}?" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("status", "RUN is missing\ndino2 status --help shows what it takes."),
        ("plot --smooth 3", "RUN is missing"),
        ("export x", "--format and --output are missing"),
        ("datasets add photos", "DATASET is missing"),
        ("presets show a b c", "b c: dino2 presets show takes NAME alone"),
        ("presets list a", "a: dino2 presets list takes options alone"),
        ("pca-image a.png b.png --model x --model=y", "--model is given twice: x and y\nLeave one of them out."),
        ("knn RUN --temperature 1 --nb-knn 3 --nb-knn 5 --temperature 2", "--temperature is given twice: 1 and 2"),
        ("embed RUN --data a --output x.csv --batch-size 3 --batch_size 4", "--batch-size is given twice: 3 and 4"),
        ("train --gpus x --timeout-min 0 --cpu=1", "3 things are wrong:\n1. --gpus x: must be a whole number"),
        ("export x --format onx", "1. --output is missing\n   dino2 export --help shows what it takes.\n2. --form"),
        ("train --epochs 10 --lr=1e-3 --quit", "2. --lr: no such option; did you mean optim.base_lr=1e-3?\n3. --quit:"),
    ],
)  # fmt: skip
def test_what_is_said(words: str, said: str) -> None:
    assert said in refused(words)


@pytest.mark.parametrize(
    "words",
    [
        "--output-dir run --comment=--json --gpus 2 optim.epochs=3 --nodes 2",
        "--slurm a=b --slurm c=d --help",
        "-- --epochs",
    ],
)
def test_what_can_be_a_request_passes(words: str) -> None:
    refuse(words.split(), TREE.commands["train"].parameters, "dino2 train", HELP)
    refuse(["--help"], TREE.commands["export"].parameters, "dino2 export", HELP)  # nothing else need be given then
