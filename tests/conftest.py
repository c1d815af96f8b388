"""Settings for all tests."""

import os

# Tests use tiny networks, for which threads cost more than they give; also in the processes that tests start. Set
# before torch is imported, which reads it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
