"""Words typed, JSON and Python make the same request; a wrong one is refused by the name that was typed."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from pydantic import model_validator
from typer.testing import CliRunner

from dinov2cli.cli import command
from dinov2cli.cli.command import add_command, request_from
from dinov2cli.errors import ConfigError, DataError
from dinov2cli.requests.base import AtLeastOne, Group, Request, argument, option, run, words_of


class Where(Group):
    panel = "Elsewhere"

    nodes: AtLeastOne | None = option(None, "Machines.")
    setup: tuple[str, ...] = option((), "A line.", one_each=True)


class Probe(Request):
    """Try every kind of option.

    Example:

        dino2 probe RUN
    """

    command = "probe"
    run_by = "test_requests:answer"

    checkpoint: str = argument("What.", metavar="CKPT")
    overrides: tuple[str, ...] = argument("Keys.", default=(), completes="overrides")
    output_dir: Path | None = option(None, "Folder.", metavar="DIR")
    nb_knn: tuple[AtLeastOne, ...] = option((), "Neighbours.", flags="--nb-knn --nb_knn")
    tests: tuple[str, ...] = option((), "Datasets.")
    share: float = option(0.5, "A share.", ge=0, le=1, default_text="a half")
    kind: Literal["red", "blue"] = option("red", "A colour.")
    audio: bool = option(True, "Sound.")
    force: bool = option(False, "By force.")
    where: Where = Where()
    as_json: bool = option(False, "Print one JSON object.", flags="--json")

    @model_validator(mode="after")
    def consistent(self) -> "Probe":
        if self.force and self.kind == "blue":
            raise ValueError("--force goes with --kind red only")
        return self


def answer(request: Probe) -> dict[str, Any]:
    if request.share == 0:
        raise DataError("nothing to share")
    return {"checkpoint": request.checkpoint, "nb_knn": request.nb_knn}


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from words to the request that they make."""
    app = typer.Typer()
    app.callback()(lambda: None)
    add_command(app, "probe", Probe)
    found: list[Request] = []
    monkeypatch.setattr(command, "perform", found.append)

    def parse(words: str) -> Any:
        result = CliRunner().invoke(app, ["probe", *words.split()])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return found.pop() if result.exit_code == 0 else result.output

    return parse


SAME = [
    ("run", Probe(checkpoint="run")),
    ("run a.b=1 c.d=2", Probe(checkpoint="run", overrides=("a.b=1", "c.d=2"))),
    ("--nb_knn 10 20 run", Probe(checkpoint="run", nb_knn=(10, 20))),
    ("run --tests A B a.b=1", Probe(checkpoint="run", tests=("A", "B"), overrides=("a.b=1",))),
    ("run --output-dir out --share 0.25", Probe(checkpoint="run", output_dir=Path("out"), share=0.25)),
    ("run --kind blue --no-audio --json", Probe(checkpoint="run", kind="blue", audio=False, as_json=True)),
    ("run --nodes 2 --setup a", Probe(checkpoint="run", where=Where(nodes=2, setup=("a",)))),
]


@pytest.mark.parametrize(("words", "request_"), SAME, ids=[words for words, _ in SAME])
def test_words_and_json_make_the_request(words: str, request_: Probe, typed: Any) -> None:
    made = typed(words)
    assert made == request_
    assert made.model_fields_set == request_.model_fields_set  # what was said, and what is a default
    again = request_from(words_of(made)[1], [Probe])
    assert again == made and again.model_fields_set == made.model_fields_set


def test_running_it_gives_the_result() -> None:
    assert run(Probe(checkpoint="run", nb_knn=(3,))) == {"checkpoint": "run", "nb_knn": (3,)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run --nb-knn 0", "--nb-knn 0: must be"), ("run --share 2", "--share 2: must be a number, from 0 to 1"),
        ("run --kind green", "--kind green: must be one of red, blue"), ("", "CKPT is missing"),
        ("run --nodes 0", "--nodes 0: must be a whole number, at least 1"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_an_error_that_names_the_option(words: str, message: str, typed: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        typed(words)


def test_options_that_do_not_go_together_are_one_message(typed: Any) -> None:
    with pytest.raises(ConfigError, match=r"^--force goes with --kind red only$"):
        typed("run --force --kind blue")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"checkpoint": "run", "nb_knn": [0]}, "--nb-knn 0: must be a whole number, at least 1"),
        ({"checkpoint": "run", "where": {"nodes": 0}}, "--nodes 0: must be a whole number, at least 1"),
        ({"checkpoint": "run", "kind": "green"}, "--kind green: must be one of red, blue"),
        ({}, "CKPT is missing"),
        ({"checkpoint": "run", "colour": 1}, "colour 1: extra inputs are not permitted"),
    ],
)
def test_json_is_checked_as_words_are(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        request_from(json.dumps({"command": "probe", "request": values}), [Probe])
    assert caught.value.message == message and caught.value.exit_code == 2
