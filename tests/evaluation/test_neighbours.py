"""Which images answer and which ask: never the same."""

from __future__ import annotations

import numpy as np
import pytest

from localmim.data.builtin import write_builtin_images
from localmim.errors import UserError
from localmim.evaluation.neighbours import open_pair


def test_one_cifar_folder_is_both(tmp_path):
    """Its training part answers and its test part asks; the other way round each image would find itself."""
    records = np.random.default_rng(0).integers(0, 256, (30, 2 + 3072), np.uint8)
    records[:, :2] %= 10
    records[:25].tofile(tmp_path / "train.bin")
    records[25:].tofile(tmp_path / "test.bin")
    train, val = open_pair(str(tmp_path), str(tmp_path), 3)
    assert (len(train), len(val)) == (25, 5)


def test_the_same_images_twice_are_refused(tmp_path):
    """Top-1 would be near 100 %, of any network."""
    write_builtin_images(tmp_path, size=32, train_per_class=1, val_per_class=1, progress=False)
    train, val = str(tmp_path / "train"), str(tmp_path / "val")
    assert [len(source) for source in open_pair(train, val, 3)] == [10, 10]
    with pytest.raises(UserError, match="hold the same images"):
        open_pair(val, val, 3)
    with pytest.raises(UserError, match=r"^--data-dir: .*nowhere does not exist"):
        open_pair(train, str(tmp_path / "nowhere"), 3, called=("--data-dir",) * 2)
