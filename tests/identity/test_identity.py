"""What dino2 computes is what is recorded in `recorded/`: exactly, or within bounds where another processor may round.

How to record a change that is meant: README.md beside this file.
"""

import json
from pathlib import Path

import pytest
from compare import Bound, differences
from record import PARTS, Session, portable

HERE = Path(__file__).parent
NOT_COMPARED = Bound()
BOUNDS: dict[str, Bound] = {}

# Parts that take longer; what `--help` prints is left out, as it depends on the versions of typer and rich.
LONG = {"processes", "linear", "exports", "video"}
PARTS_OF_THE_TEST = [
    pytest.param(part, marks=[pytest.mark.long] if part in LONG else []) for part in PARTS if part != "help"
]


@pytest.mark.parametrize("part", PARTS_OF_THE_TEST)
def test_what_is_computed_is_what_was_recorded(part: str, tmp_path: Path) -> None:
    recorded = json.loads((HERE / "recorded" / f"{part}.json").read_text())
    computed = portable(PARTS[part](Session(tmp_path, HERE.parents[1])))
    found = differences(recorded, computed, BOUNDS, part)
    assert not found, f"{len(found)} differences:\n" + "\n".join(found[:40])
