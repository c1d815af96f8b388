"""The short form of `chaos.py`: a history or two, and what must hold. The long form is the program."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


@pytest.mark.chaos
def test_nothing_is_lost_or_changed_by_random_faults() -> None:
    program = Path(__file__).with_name("chaos.py")
    place = tempfile.mkdtemp(prefix="dino2-chaos-")  # short: the paths of sockets in it have 108 bytes
    words = [sys.executable, str(program), "--minutes", "1.5", "--seed", "0", "--place", place]
    played = subprocess.run(words, text=True, stdout=subprocess.PIPE)
    print(played.stdout)
    assert played.returncode == 0 and "0 violations" in played.stdout
    shutil.rmtree(place)
