"""Graph mode on the CPU for every test; MindSpore's cells are freed after each module, not at interpreter exit."""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")  # MindSpore's own log: errors only. Before it is imported

import pytest

from localmim.device import set_device

set_device("CPU")


SLOW = (  # files that take longest: they begin first, so that no process works on one alone at the end
    "distributed/test_survive.py",  # jobs of several processes, which often wait, beside files that compute
    "test_parity.py",
    "distributed/test_equal.py",
    "training/test_methods.py",
    "launch/test_launch.py",
    "mim/test_model.py",
    "distributed/test_ranks.py",
    "training/test_classification.py",
    "test_export.py",
    "models/test_swin.py",
    "training/test_resume.py",
    "training/test_loop.py",
    "training/test_mixture_runs.py",
)


def pytest_collection_finish():
    """What the imports made stays: left out of garbage collection, which then takes no time to speak of."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """The order in which files begin (with --no-loadscope-reorder)."""
    place = {file: n for n, file in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(item.path.relative_to(Path(__file__).parent).as_posix(), len(SLOW)))


@pytest.fixture(scope="module", autouse=True)
def free_cells():
    """A cell that is alive when the interpreter exits complains on stderr."""
    yield
    gc.collect()
