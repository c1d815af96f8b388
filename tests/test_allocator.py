"""Memory that is freed stays with the process once it is asked to."""

import os
import platform
import subprocess
import sys

import pytest
import ready

from dinov2cli.train.allocator import grow_segments

CODE = """
import resource, torch
from dinov2cli.train.allocator import keep_freed_memory
assert keep_freed_memory()
torch.ones(20_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for i in range(10):
    torch.ones(10_000_000 - 10_000 * i)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
def test_large_arrays_reuse_memory() -> None:
    faults = int(ready.server().run(code=CODE).stdout)
    pages_written = 10 * 40_000_000 // 4096
    assert faults < pages_written / 20


@pytest.mark.parametrize("room", [True, False])
def test_an_evaluation_does_not_overrule_its_training(room: bool) -> None:
    code = (
        "from dinov2cli.train.allocator import keep_freed_memory\n"
        f"print(keep_freed_memory(room={room}), keep_freed_memory(), keep_freed_memory(room={not room}))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split()
    assert said == [str(room and platform.libc_ver()[0] == "glibc")] * 3


@pytest.mark.parametrize("said", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_gpus_segments_grow_unless_the_user_says_something_else(
    monkeypatch: pytest.MonkeyPatch, said: str | None
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is as it was afterwards
        monkeypatch.delenv(name)
    if said:
        monkeypatch.setenv(said, "backend:native")
    grow_segments()
    found = {name: value for name, value in os.environ.items() if name.endswith("_ALLOC_CONF")}
    assert found == ({said: "backend:native"} if said else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
