"""Graph mode on the CPU for every test; MindSpore's cells are freed after each module, not at interpreter exit."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only. Before it is imported

import pytest

from localmim.device import set_device

set_device("CPU")


@pytest.fixture(scope="module", autouse=True)
def free_cells():
    """A cell that is alive when the interpreter exits complains on stderr."""
    yield
    gc.collect()
