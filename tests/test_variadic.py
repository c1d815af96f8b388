"""Options of several values take them at once, and never the word that CKPT is."""

import pytest
from typer.testing import CliRunner

from dinov2cli.cli import command
from dinov2cli.cli.command import repeat_names
from dinov2cli.cli.main import app
from dinov2cli.errors import ConfigError
from dinov2cli.requests.base import Request
from dinov2cli.requests.eval import LinearRequest

LISTS = {"--nb-knn", "--test-datasets"}
VALUED = {*LISTS, "--output-dir"}


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("run --nb-knn 10 20", "run --nb-knn 10 --nb-knn 20"),
        ("run --nb-knn 10 -1 --json", "run --nb-knn 10 --nb-knn -1 --json"),
        ("run --test-datasets A:b=c D a.b=1 x", "run --test-datasets A:b=c --test-datasets D a.b=1 x"),
        ("run --test-datasets A B --output-dir o", "run --test-datasets A --test-datasets B --output-dir o"),
        ("run --test-datasets A -- B", "run --test-datasets A -- B"),
        ("run --test-datasets=A B", "run --test-datasets=A B"),
    ],
)
def test_several_values_at_once_after_the_argument(given: str, read: str) -> None:
    assert repeat_names(given.split(), LISTS, VALUED, waits=True) == read.split()


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("--nb-knn 10 20 run a.b=1", "--nb-knn 10 --nb-knn 20 run a.b=1"),
        ("--test-datasets A run", "--test-datasets A run"),
        ("--test-datasets A --output-dir o run", "--test-datasets A --output-dir o run"),
        ("--output-dir o --test-datasets A run", "--output-dir o --test-datasets A run"),
        ("a.b=1 --test-datasets A run", "a.b=1 --test-datasets A run"),
        # the second is CKPT, and the third then no change of the configuration: it is refused, not evaluated
        ("--test-datasets A B run", "--test-datasets A B run"),
        ("--test-datasets A run --test-datasets B C", "--test-datasets A run --test-datasets B --test-datasets C"),
    ],
)
def test_before_the_argument_one_word_or_numbers(given: str, read: str) -> None:
    assert repeat_names(given.split(), LISTS, VALUED, waits=True) == read.split()


def test_nothing_is_waited_for_where_an_option_gives_the_argument() -> None:
    given = "--test-datasets A B --pretrained-weights run"
    assert repeat_names(given.split(), LISTS, VALUED) == (
        ["--test-datasets", "A", "--test-datasets", "B", "--pretrained-weights", "run"]
    )


def typed(words: str, monkeypatch: pytest.MonkeyPatch) -> Request:
    """The request that the command line makes of the words."""
    made: list[Request] = []
    monkeypatch.setattr(command, "perform", made.append)
    CliRunner().invoke(app, words.split(), catch_exceptions=False)
    return made.pop()


@pytest.mark.parametrize(
    ("words", "request_"),
    [
        ("--test-datasets A run", LinearRequest(checkpoint="run", test_datasets=("A",))),
        ("--test-labels A.npy run --test-datasets A", LinearRequest(
            checkpoint="run", test_datasets=("A",), test_labels=("A.npy",)
        )),
        ("run a.b=1 --test-datasets A B", LinearRequest(
            checkpoint="run", test_datasets=("A", "B"), overrides=("a.b=1",)
        )),
        ("--pretrained-weights run --test-datasets A B", LinearRequest(checkpoint="run", test_datasets=("A", "B"))),
        ("--test-datasets A B --pretrained-weights run", LinearRequest(checkpoint="run", test_datasets=("A", "B"))),
        ("run --setup x --nodes 2", LinearRequest.model_validate(
            {"checkpoint": "run", "slurm": {"setup": ["x"], "nodes": 2}}
        )),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["linear", "eval linear"])
def test_ckpt_is_never_taken_for_a_value(
    name: str, words: str, request_: LinearRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert typed(f"{name} {words}", monkeypatch) == request_


def test_a_word_too_many_is_refused_with_what_was_taken_for_ckpt(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^'run' is no change of the configuration.*evaluated is 'B'"):
        typed("linear --test-datasets A B run", monkeypatch)
