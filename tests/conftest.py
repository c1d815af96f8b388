"""Settings for all tests."""

import gc
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Tests use tiny networks, for which threads cost more than they give; also in the processes that tests start. Set
# before torch is imported, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nor do they have kernels enough for PyTorch's compiler to begin processes that compile them.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# What the person who runs the tests has told dino2 of the site is nothing to them, and they write nothing there.
SITE_FILE = Path(tempfile.mkdtemp(prefix="dino2-tests-")) / "dino2.yaml"
os.environ["DINO2_CONFIG"] = str(SITE_FILE)


@pytest.fixture(autouse=True)
def _nothing_known_yet() -> None:
    """What one test has made known, such as a prepared ImageNet, the next does not know."""
    SITE_FILE.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A command takes over the logger of its process: the next test has it as it is without one."""
    _free_logger()  # fixtures of a module may have run a command before
    yield
    _free_logger()


def _free_logger() -> None:
    logger = logging.getLogger("dino2")
    logger.propagate = True
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests of distillation: a folder with `data`, a run `teacher` with heads, and its `backbone` alone."""
    from tiny_run import write_images, write_teacher

    folder = tmp_path_factory.mktemp("place")
    write_images(folder / "data")
    for heads in (True, False):
        write_teacher(folder, heads=heads)
    return folder


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, a process that has no tests left takes half of another's: files stay together, and none ends alone."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


def pytest_collection_finish() -> None:
    """What all tests import, a million objects, is looked through for cycles once, not again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """The server that some tests begin ends with them."""
    if (ready := sys.modules.get("ready")) and ready.server.cache_info().currsize:
        ready.server().close()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
