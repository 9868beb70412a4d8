"""The kept step: what it is known by, and what is refused. That a run with it ends the same: test_resume.py."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops
from mindspore.train import mind_ir_pb2

from localmim.config import Config
from localmim.models.layers import Linear
from localmim.training import compile_cache
from localmim.training.compile_cache import environment, graph_key, intact, sealed, take, usable
from localmim.training.layout import Layout
from localmim.training.optimizer import AdamW
from localmim.training.step import TrainStep

ROOT = Path(__file__).parents[2]


class Model(nn.Cell):
    """With a parameter that is trained and one that is not."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.layer = Linear(2, width)
        self.frozen = ms.Parameter(np.ones(2, np.float32), requires_grad=False)

    def construct(self, x):
        loss = self.layer(x + self.frozen).mean()
        return loss, ops.stack((loss,))


def step_of(model: Model) -> TrainStep:
    return TrainStep(model, AdamW({n: p for n, p in model.parameters_and_names() if p.requires_grad}))


def inputs(batch: int = 4, dtype=np.float32) -> tuple[np.ndarray]:
    return (np.zeros((batch, 2), dtype),)


def key(model: Model | None = None, given: tuple | None = None, **recipe) -> str:
    return graph_key(step_of(model or Model()), given or inputs(), dataclasses.replace(Config(), **recipe))


def test_the_key_follows_what_the_graph_is_made_of(monkeypatch):
    """The same again is the same; every change of recipe, inputs, parameters, switches or version is another."""
    same = key()
    assert key(max_steps=7, output_dir="elsewhere") == same
    named = Model()
    nn.SequentialCell(named)  # a cell that holds the model renames its parameters, by which they are found
    others = [key(seed=1), key(given=inputs(5)), key(given=inputs(dtype=np.float16)), key(Model(4)), key(named)]
    monkeypatch.setenv("MS_DEV_ANYTHING", "1")
    others.append(key())
    monkeypatch.delenv("MS_DEV_ANYTHING")
    monkeypatch.setattr(ms, "__version__", "2.10.1")
    others.append(key())
    assert len({same, *others}) == 1 + len(others)


def test_the_key_follows_the_sources(tmp_path, monkeypatch):
    """A constant changed in a file of the package, or in one outside that holds a layer, is another key."""
    package = shutil.copytree(ROOT / "src/localmim/models", tmp_path / "models")
    monkeypatch.setattr("localmim.__file__", str(tmp_path / "__init__.py"))
    before = key()
    operators = package / "operators.py"
    operators.write_text(operators.read_text().replace("3.61876726e-09", "3.61876727e-09"))
    after = key()
    outside = tmp_path.parent / f"{tmp_path.name}.py"
    outside.write_text("from mindspore import nn\n\n\nclass Outside(nn.Cell):\n    slope = 1\n")
    monkeypatch.syspath_prepend(outside.parent)
    model = Model()
    model.extra = __import__(outside.stem).Outside()
    first = key(model)
    outside.write_text(outside.read_text().replace("1", "2"))
    assert len({before, after, first, key(model)}) == 4


def test_a_key_that_cannot_be_made_costs_the_cache_alone(tmp_path, monkeypatch, caplog):
    """A layer without a source file, as `exec` makes it: the step is called all the same, nothing is left."""
    monkeypatch.setattr(compile_cache, "_used", False)
    monkeypatch.setattr(logging.getLogger("localmim"), "propagate", True)
    model, called = Model(), []
    space = {"nn": nn, "__name__": "nowhere"}
    exec("class Made(nn.Cell):\n    pass", space)
    model.extra = space["Made"]()
    with compile_cache.kept_step(tmp_path, Config(), step_of(model), [inputs()], 1e-3, 1):
        called.append(True)
    assert called and "the step is compiled without a cache" in caplog.text
    assert not list(tmp_path.rglob("*"))


def test_every_parameter_of_the_model_is_the_steps():
    """MindSpore fills those that it does not find with zeros: frozen ones, which no optimizer holds, are there too."""
    model = Model()
    assert {id(p) for p in model.get_parameters()} <= {id(p) for p in step_of(model).whole.parameters_dict().values()}


def write_graph(folder: Path, names: list[str]) -> Path:
    """What MindSpore writes, with these parameters."""
    graph = mind_ir_pb2.ModelProto()
    for name in names:
        graph.graph.parameter.add(name=f"main:{name}")
    path = folder / "rank_0/graph_cache/compile_cache_0.mindir"
    path.parent.mkdir(parents=True)
    path.write_bytes(graph.SerializeToString())
    return path


def test_a_graph_with_other_parameters_is_not_kept(tmp_path):
    """And none where nothing was written."""
    step = step_of(Model())
    names = list(step.whole.parameters_dict())
    assert not sealed(tmp_path, step)
    write_graph(tmp_path / "other", [*names, "unknown"])
    assert not sealed(tmp_path / "other", step)
    write_graph(tmp_path / "good", names)
    assert sealed(tmp_path / "good", step)
    assert intact(tmp_path / "good")


@pytest.mark.parametrize("damage", ["none", "cut", "changed", "gone", "no hashes"])
def test_damaged_files_are_not_read(tmp_path, damage):
    """Whatever is damaged is thrown away; what is whole is taken from its place while it is read."""
    step, kept, aside = step_of(Model()), tmp_path / "key", tmp_path / ".key.1"
    graph = write_graph(kept, list(step.whole.parameters_dict()))
    assert sealed(kept, step)
    data = graph.read_bytes()
    if damage == "cut":
        graph.write_bytes(data[:-7])
    elif damage == "changed":
        graph.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "gone":
        graph.unlink()
    elif damage == "no hashes":
        (kept / "hashes.json").write_text("{")
    assert take(kept, aside) == (damage == "none")
    assert not kept.exists()
    assert any(aside.iterdir()) == (damage == "none")
    assert not take(kept, tmp_path / ".key.2")  # another process finds nothing, and begins with an empty folder


def test_where_it_is_not_tried_nothing_is_kept():
    """Several devices, accumulation, other devices, and who asks for none."""
    one = Layout(1, 4, 1, 4)
    assert usable(Config(), one, "CPU") == hasattr(sys.modules["__main__"], "__file__")
    assert not usable(Config(compile_cache=False), one, "CPU")
    assert not usable(Config(), one, "GPU")
    assert not usable(Config(), one._replace(world=2), "CPU")
    assert not usable(Config(), one._replace(accumulate=2), "CPU")


def test_environment():
    """It is as before afterwards, after an error too."""
    before = dict(os.environ)
    with pytest.raises(KeyError), environment(HOME="a", NEW_ONE="b"):
        assert (os.environ["HOME"], os.environ["NEW_ONE"]) == ("a", "b")
        raise KeyError
    assert dict(os.environ) == before
