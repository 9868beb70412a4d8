"""What is kept of a moment of a run for its report: a few reconstructions, attention maps, and numbers of each layer.

A snapshot is a folder, report/step_00000200/ in the run's, with `snapshot.json` and the pictures that it names. It is
there whole or not at all. The images are the same at all moments, the first of which are drawn.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
from mindspore import nn

from localmim.analysis.attention import AttentionReader
from localmim.analysis.attention_pictures import draw_maps
from localmim.analysis.history import REPORT, SNAPSHOT, snapshot_path
from localmim.analysis.images import Picture, read_picture, shown
from localmim.analysis.information import layer_numbers
from localmim.analysis.reconstruct import Reconstructor, draw
from localmim.config import Config
from localmim.data.sources import Source, UnreadableImage, open_source, spread
from localmim.errors import UserError
from localmim.mim.model import MaskedImageModel
from localmim.training.checkpoint import read_checkpoint
from localmim.training.restore import model_of
from localmim.training.runlog import METRICS

RECONSTRUCTED, ATTENDED, MEASURED = 4, 2, 32  # images
BATCH = 4  # images a forward pass at most
LONGEST = 512  # side of an image that is kept for drawing, pixels


class Snapshots:
    """Takes snapshots of a model, as often as wanted: its graphs are compiled once.

    Args:
        config: The recipe.
        model: Of pre-training, or a classifier.
        source: Where images come from.
        output: The run's folder.
    """

    def __init__(self, config: Config, model: nn.Cell, source: Source, output: Path):
        self.config, self.model, self.output = config, model, output
        self.drawn, self.inputs = some_pictures(source, config, model.encoder)
        self.reader = AttentionReader(model.encoder, BATCH)
        self.reconstructor, self.without = None, "a classifier has no decoder"
        if isinstance(model, MaskedImageModel):
            try:
                self.reconstructor = Reconstructor(config, model)
            except UserError as error:  # this run's targets cannot be drawn; the rest can
                self.without = str(error)

    def take(self, step: int) -> Path:
        """The model as it is.

        Raises:
            UserError: The disk does not take it.
        """
        begin = time.perf_counter()
        path = snapshot_path(self.output, step)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            aside.mkdir(parents=True, exist_ok=True)
            about = {"step": step, **self.contents(aside)}
            about["took_s"] = round(time.perf_counter() - begin, 2)
            (aside / SNAPSHOT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            shutil.rmtree(path, ignore_errors=True)
            os.replace(aside, path)
        except OSError as error:
            raise UserError(f"cannot write {error.filename or path}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return path

    def contents(self, folder: Path) -> dict:
        """What `snapshot.json` says, its pictures being written to `folder`."""
        about: dict = {}
        if self.reconstructor is None:
            about["no_reconstructions"] = self.without
        else:
            about["loss_names"] = self.model.loss_names()
            about["reconstructions"] = []
            for i, found in enumerate(self.reconstructor(self.drawn)):
                name = f"reconstruction_{i}.png"
                draw([found], folder / name)
                about["reconstructions"].append({"name": found.name, "picture": name})
        about["attention"] = []
        for i, one in enumerate(self.drawn[:ATTENDED]):
            name = f"attention_{i}.png"
            caption = draw_maps(self.reader, one, folder / name)
            about["attention"].append({"name": one.name, "picture": name, "caption": caption})
        batches = (self.inputs[i : i + BATCH] for i in range(0, len(self.inputs), BATCH))
        about["numbers"] = layer_numbers(self.reader, batches)
        return about


def add_missing(run: Path) -> str:
    """Takes a snapshot of a run's newest weights if the run has none at all; says in a line what was done.

    A run without checkpoints, or whose images are gone, stays as it is.
    """
    if not (run / METRICS).is_file() or list((run / REPORT).glob(f"step_*/{SNAPSHOT}")):
        return ""
    try:
        checkpoint = read_checkpoint(run)
        config, model = model_of(checkpoint)
        where = config.data.val_dir or config.data.dir
        source = open_source(
            where, config.data.format, model.encoder.in_chans, evaluation=True, called="data.val_dir or data.dir"
        )
        path = Snapshots(config, model, source, run).take(checkpoint.step)
    except UserError as error:
        return f"no pictures of {run}: {error}"
    return f"snapshot: {path}"


def some_pictures(source: Source, config: Config, encoder: nn.Cell) -> tuple[list[Picture], np.ndarray]:
    """Readable images, evenly spread over a source: those that are drawn, and the inputs of all, [N, C, h, w].

    Raises:
        UserError: There are none.
    """
    found = []
    for sample in spread(len(source), MEASURED):
        try:
            one = read_picture(source, sample, encoder, config.data)
        except UnreadableImage:  # training says so
            continue
        found.append(one._replace(pixels=shown(one.pixels, min(LONGEST, max(one.pixels.shape[:2])))))
    if not found:
        raise UserError("none of the images for the report can be read")
    return [found[i] for i in spread(len(found), RECONSTRUCTED)], np.stack([one.inputs for one in found])
