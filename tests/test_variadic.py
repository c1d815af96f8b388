"""Options of several values take them at once, and never the word that CKPT is."""

import pytest

from dinov2cli.cli.variadic import repeat_names

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
