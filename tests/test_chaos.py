"""The short form of `chaos.py`: a history or two, and what must hold. The long form is the program."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.chaos
def test_nothing_is_lost_or_changed_by_random_faults(tmp_path: Path) -> None:
    program = Path(__file__).with_name("chaos.py")
    words = [sys.executable, str(program), "--minutes", "1.5", "--seed", "0", "--place", str(tmp_path)]
    played = subprocess.run(words, text=True, stdout=subprocess.PIPE)
    print(played.stdout)
    assert played.returncode == 0 and "0 violations" in played.stdout
