"""Settings for all tests."""

import os

import pytest

# Tests use tiny networks, for which threads cost more than they give; also in the processes that tests start. Set
# before torch is imported, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
