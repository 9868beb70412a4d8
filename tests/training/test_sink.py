"""Sinking data to a device: refused without one, and the same run where there is one."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest

from localmim.config import load_config
from localmim.data.builtin import write_builtin_images
from localmim.errors import UserError
from localmim.training import sink
from localmim.training.checkpoint import read_checkpoint
from localmim.training.loop import train

RECIPE = """
epochs: 2
batch_size: 4
accumulate: 2
log_every: 2
report_every: null
compile_cache: false
device: CPU
model: {name: mae_vit_tiny_patch16_224, image_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2,
        decoder_dim: 16, decoder_depth: 1, decoder_heads: 2}
optimizer: {blr: 1.0e-1, warmup_epochs: 1}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function that trains the recipe into a folder of this name."""
    folder = tmp_path_factory.mktemp("sink")
    write_builtin_images(folder / "images", size=40, train_per_class=2, val_per_class=1, progress=False)
    (folder / "recipe.yaml").write_text(RECIPE + f"data: {{dir: {folder / 'images' / 'train'}, workers: 1}}\n")

    def run(name: str, *more: str):
        arguments = ["--config", str(folder / "recipe.yaml"), "--output_dir", str(folder / name), *more]
        train(load_config(arguments))
        return read_checkpoint(folder / name)

    return run


def test_a_cpu_has_no_queue(run):
    """One line, before anything is written."""
    with pytest.raises(UserError, match=r"data\.sink is true, but a CPU has no queue"):
        run("refused", "--data.sink", "true")


def test_the_same_weights(run, monkeypatch):
    """MindSpore's queue is played by the data set's own iterator, which gives the same rows: a run that goes on with
    sinking turned on ends as one without it."""

    def data_sink(call, dataset):
        assert dataset.get_dataset_size() == 3
        rows = dataset.create_tuple_iterator(num_epochs=1)
        return lambda: call(*next(rows))

    whole = run("whole")
    monkeypatch.setattr(ms, "data_sink", data_sink)
    monkeypatch.setattr("localmim.training.loop.require_sink", lambda device: None)
    run("sunk", "--max_steps", "1")
    sunk = run("sunk", "--data.sink", "true")
    assert sunk.step == whole.step == 4
    expected, found = whole.weights(), sunk.weights()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


class Broken:
    """Three rows, and an error in place of the second."""

    def __len__(self):
        return 3

    def __iter__(self):
        yield np.zeros(2, np.int32), [(np.zeros((2, 3), np.float32),)]
        raise UserError("data.dir: too many of them cannot be read")


def test_errors_and_the_end_of_a_run(monkeypatch):
    """What goes wrong in making a row is that error, not MindData's; a run without steps left asks for no row."""

    def data_sink(call, dataset):
        rows = dataset.create_tuple_iterator(num_epochs=1)
        return lambda: call(*next(rows))

    monkeypatch.setattr(ms, "data_sink", data_sink)
    with pytest.raises(UserError, match="too many of them"):
        list(sink.sunk(Broken()))
    assert list(sink.sunk([])) == []


def test_accelerators_are_let_through():
    """Only a CPU is refused."""
    for device in ("GPU", "Ascend"):
        sink.require_sink(device)
