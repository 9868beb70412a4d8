"""benchmarks/peers: what can be told without PyTorch, which is an optional extra: clear refusals, groups of windows."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from localmim.errors import UserError
from localmim.models.windows import window_labels

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize(
    "recipe, absent, words",
    [
        ("localmim_vit_base_hog", True, "pip install -r requirements-torch.txt"),
        ("localmim_swin_base_pixels", False, "target.kind hog"),
        ("mae_vit_base", False, "mae_vit_base_patch16_224"),
    ],
)
def test_refused(recipe, absent, words, monkeypatch):
    """Without PyTorch, and for what the peer is not written for, there is one line before anything is built."""
    from peers import torch_localmim

    monkeypatch.setattr(torch_localmim, "find_spec", lambda name: None if absent else object())
    with pytest.raises(UserError, match=words):
        torch_localmim.build(["--config", str(ROOT / f"config/pretrain/{recipe}.yaml")], 2)


def test_one_version():
    """Both ways to the optional extra install the same PyTorch."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["torch"]
    assert (ROOT / "requirements-torch.txt").read_text().split("\n")[1:-1] == extra


def test_no_mindspore():
    """What the PyTorch side's process imports before PyTorch is free of MindSpore, whose memory would count as its."""
    code = "import sys, step_time; from peers import grouping, torch_localmim; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", timeout=60).returncode == 0


@pytest.mark.parametrize("shift", [0, 3])
def test_groups(shift):
    """Each token has one slot, and attends to exactly the tokens of its window, through the right row of the table."""
    from peers.grouping import coordinates, group_windows

    visible = np.sort(np.random.default_rng(0).permutation(49)[:12])
    places = coordinates(visible, 8, (56, 56), (7, 7), first=True)
    slots, place, index, mask = group_windows(places, 7, shift)
    G, S, _ = index.shape
    assert S <= 49 and len(places) <= G * S < len(places) + 2 * S  # packed well, too
    np.testing.assert_array_equal(slots[place], np.arange(len(places)))
    group, slot = np.divmod(place, S)
    together = group[:, None] == group
    attends = together & (mask[group[:, None], 0, slot[:, None], slot] == 0)
    labels = window_labels(places, (56, 56), 7, shift)
    np.testing.assert_array_equal(attends, labels[:, None] == labels)
    rows, columns = np.moveaxis(places[:, None] - places + 6, -1, 0)
    np.testing.assert_array_equal(index[group[:, None], slot[:, None], slot][attends], (rows * 13 + columns)[attends])
