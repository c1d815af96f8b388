"""The cluster that these tests run on, where there is one."""

import os
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cluster() -> Path:
    """State folder of the running cluster; makes Slurm's commands speak to it."""
    state = os.environ.get("DINO2_TEST_CLUSTER")
    if not state:
        pytest.skip("no Slurm cluster: DINO2_TEST_CLUSTER is not set (tests/slurm/README.md)")
    os.environ["SLURM_CONF"] = f"{state}/etc/slurm.conf"
    nodes = subprocess.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%T"], capture_output=True, text=True, check=True)
    assert nodes.stdout.split() == ["idle", "idle"], f"the cluster in {state} is not ready: {nodes.stdout}"
    return Path(state)
