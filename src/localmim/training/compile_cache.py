"""Keeps the compiled step in the run's folder: a run that goes on reads it back instead of compiling it again.

MindSpore's compile cache writes the graph as its frontend leaves it, four fifths of the way, and reads it in a later
process. By itself it is not safe to use, so this file does what it leaves out:

* It takes the n-th graph of a process for the n-th of another, whatever they are, and sees changes only in files that
  lie beside the script. Here a folder is named by a hash of all that the graph is made of, and the cache is switched on
  for the step alone.
* Parameters come back by name, and one that is not found is zero without a word. Here names are in the hash, and a
  graph that has others is not kept.
* It reads a damaged file. Here files are written aside, moved when the first step is done, and checked by their hash.
  While they are read they lie aside as well: whatever goes wrong with them goes wrong once.

Whatever fails, the step is compiled as without a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore.train import mind_ir_pb2

import localmim
from localmim.config import Config
from localmim.files import file_sha256, replace_text
from localmim.training.layout import Layout
from localmim.training.step import TrainStep

FOLDER = "compile_cache"
HASHES = "hashes.json"
NOT_IN_A_GRAPH = ("output_dir", "max_steps")  # of a recipe; a key too many in the hash costs a compilation, no more
log = logging.getLogger("localmim.training")
_used = False  # MindSpore has one folder a process


def usable(config: Config, layout: Layout, device: str) -> bool:
    """Whether a run keeps its step: where that was tried, which is one CPU without accumulation."""
    script = hasattr(sys.modules["__main__"], "__file__")  # MindSpore asks for one
    return config.compile_cache and device == "CPU" and layout.world == 1 and layout.accumulate == 1 and script


@contextlib.contextmanager
def kept_step(output: Path, config: Config, step: TrainStep, parts: list[tuple], *scalars) -> Iterator[None]:
    """Compiles a step before its first call, out of what is kept where that fits. The call is made inside.

    Args:
        output: The run's folder; the graph is kept in it.
        config: The resolved recipe.
        step: Not called yet; nothing is accumulated.
        parts, scalars: What it will be called with.
    """
    global _used
    if _used:
        yield
        return
    _used = True
    folder, key, keep = output / FOLDER, "", False
    try:
        key = graph_key(step, parts[0], config)
        aside = folder / f".{key}.{os.getpid()}"
        take(folder / key, aside)
        with environment(MS_COMPILER_CACHE_ENABLE="1", MS_COMPILER_CACHE_PATH=str(aside)):
            step.compile(parts, *scalars)
        keep = sealed(aside, step)  # read or new: MindSpore compiles where it cannot read
    except Exception as error:  # of a cache that cannot be used, or the step's own, which comes again without it
        log.warning("the step is compiled without a cache: %s", " ".join(str(error).split())[:200])
    yield
    with contextlib.suppress(OSError):  # nothing is lost but time
        if keep:
            os.replace(aside, folder / key)
        for other in folder.iterdir():
            if not keep or other.name != key:
                shutil.rmtree(other, ignore_errors=True)


def take(kept: Path, aside: Path) -> bool:
    """Whether the folder `kept`, now named `aside`, is there and whole; if not `aside` is empty."""
    aside.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(kept, aside)
        if intact(aside):
            return True
        shutil.rmtree(aside)
    aside.mkdir()
    return False


def graph_key(step: TrainStep, inputs: tuple, config: Config) -> str:
    """A hash of all that a step's graph is made of.

    That is the sources of this package and of every layer, the recipe, MindSpore and its switches, and names, shapes
    and types of parameters and inputs. Whatever else is constant in the graph follows from these.
    """
    parts = (part for _, part in step.whole.cells_and_names())
    sources = {*Path(localmim.__file__).parent.rglob("*.py"), *(Path(inspect.getsourcefile(type(p))) for p in parts)}
    parameters = step.whole.parameters_dict().items()
    facts = {
        "sources": sorted((str(path), file_sha256(path)) for path in sources),
        "recipe": {k: v for k, v in config.as_dict().items() if k not in NOT_IN_A_GRAPH},
        "parameters": [(name, str(p.dtype), p.shape, p.requires_grad) for name, p in parameters],
        "inputs": [(str(a.dtype), a.shape) for a in inputs],
        "versions": [ms.__version__, np.__version__, platform.python_version(), platform.machine()],
        "switches": sorted(item for item in os.environ.items() if item[0].startswith("MS_")),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def sealed(folder: Path, step: TrainStep) -> bool:
    """Whether MindSpore wrote a graph that has no parameter but the step's; then the files' hashes are beside it."""
    known = step.whole.parameters_dict().keys()
    for path in folder.rglob("*.mindir"):
        model = mind_ir_pb2.ModelProto.FromString(path.read_bytes())
        names = {parameter.name.rpartition(":")[2] for parameter in model.graph.parameter}  # GRAPH:NAME
        if names and names <= known:
            replace_text(folder / HASHES, json.dumps(hashes(folder), indent=1))
            return True
    return False


def intact(folder: Path) -> bool:
    """Whether the files in a folder are those that were sealed."""
    try:
        return json.loads((folder / HASHES).read_text(encoding="utf-8")) == hashes(folder)
    except (OSError, ValueError):
        return False


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that MindSpore wrote."""
    return {
        str(path.relative_to(folder)): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != HASHES
    }


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """With these environment variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
