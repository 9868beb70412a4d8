"""How much keys depend on queries: normalised mutual information of attention, layer by layer.

As in Park et al., "What Do Self-Supervised Vision Transformers Learn?" (ICLR 2023), after Strehl and Ghosh (JMLR 2002):
queries q are the patches, each as likely, p(k|q) is the attention that q gives to k, and

    NMI = I(q; k) / sqrt(H(q) H(k)).

It is 0 where all queries attend alike and 1 where each attends to a patch of its own. LocalMIM's figure 3 (Wang et al.,
CVPR 2023) shows it at every layer without a formula; this is our reading of it. Of an image and a head first, then
means over images. Attention in windows counts inside of each, windows weighing by their queries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from mindspore import nn
from tqdm import tqdm

from localmim.analysis.attention import AttentionReader, Layer
from localmim.analysis.canvas import picture_path
from localmim.analysis.history import labels
from localmim.analysis.images import read_picture
from localmim.analysis.layer_plots import draw_numbers
from localmim.config import Config, DataConfig, config_from_dict
from localmim.data.sources import Source, UnreadableImage, open_source, spread
from localmim.device import set_device
from localmim.errors import UserError
from localmim.files import replace_text
from localmim.training.checkpoint import AVERAGE, WEIGHTS, read_checkpoint
from localmim.training.restore import restore, untrained_model


def normalised_mutual_information(weights: np.ndarray) -> np.ndarray:
    """Of attention [..., n, n], query first, rows that sum to 1 -> float64 [...] from 0 to 1; 0 where keys are sure."""
    weights = np.asarray(weights, np.float64)
    of_queries = np.log(weights.shape[-1])
    of_keys = _entropy(weights.mean(axis=-2))
    information = of_keys - _entropy(weights).mean(axis=-1)
    scale = np.sqrt(of_queries * of_keys)
    return np.maximum(information, 0) / np.where(scale > 0, scale, 1)


def _entropy(shares: np.ndarray) -> np.ndarray:
    """Of distributions along the last axis, in nats, not below 0."""
    return np.maximum(-(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=-1), 0)


def layer_information(layer: Layer) -> np.ndarray:
    """Normalised mutual information of each image and head, float64 [B, nh].

    A window of one patch has nothing to choose from and is left out; a layer of such windows alone has 0.
    """
    total, queries = np.zeros(layer.windows[0].weights.shape[:2]), 0
    for patches, weights in layer.windows:
        if len(patches) > 1:
            total += len(patches) * normalised_mutual_information(weights)
            queries += len(patches)
    return total / max(queries, 1)


def layer_numbers(reader: AttentionReader, batches: Iterable[np.ndarray]) -> dict:
    """Means over images of what can be counted in an encoder's attention.

    Args:
        reader: Reads it.
        batches: Normalised images, float32 [B, C, H, W] each.

    Returns:
        For JSON: `layers`, their names; `nmi` and `distance_px`, for each layer a list of heads, distances in pixels of
        the encoder's images; `images`, how many.

    Raises:
        UserError: There is no image.
    """
    totals, images = None, 0
    for inputs in batches:
        images += len(inputs)
        found = [
            np.stack([layer_information(layer), layer.mean_distance()]).sum(axis=1)  # [2, nh]
            for layer in reader(inputs)
        ]
        totals = found if totals is None else [a + b for a, b in zip(totals, found)]
    if not images:
        raise UserError("none of the images can be read")
    means = [(total / images).tolist() for total in totals]
    return {
        "layers": reader.names,
        "nmi": [mean[0] for mean in means],
        "distance_px": [mean[1] for mean in means],
        "images": images,
    }


def nmi(
    ckpt: Sequence[str],
    data_dir: str,
    count: int = 64,
    untrained: bool = False,
    out: str = "",
    device: str = "auto",
    batch_size: int = 8,
) -> Path:
    """Normalised mutual information and mean attention distance of every layer of one or more models.

    Args:
        ckpt: Of each model a run's folder, one of its checkpoints, or a weights file; of any task.
        data_dir: Images in any form that `data.dir` takes; whole, scaled to the model's size.
        count: How many of them, evenly spread; those that cannot be read are left out.
        untrained: The first model once more, with the weights that its run began with.
        out: PNG file; empty: nmi.png in the folder of the first `ckpt`. The numbers stand beside it as JSON.
        device: auto, CPU, GPU or Ascend.
        batch_size: Images a forward pass.

    Returns:
        The path of the picture.

    Raises:
        UserError: A number is out of range, a model or the images cannot be read, or the disk does not take the files.
    """
    for name, value in (("count", count), ("batch-size", batch_size)):
        if value < 1:
            raise UserError(f"--{name} is {value}, expected at least 1")
    if not ckpt or len(set(ckpt)) < len(ckpt):
        raise UserError(f"--ckpt is {' '.join(ckpt)!r}, expected different runs, checkpoints or weights files")
    path = picture_path(out, ckpt[0], "nmi.png")
    set_device(device)
    places = [_place(one) for one in ckpt]
    different = list(dict.fromkeys(places))
    names = dict(zip(different, labels(different)))
    runs = []

    def add(one: str, place: Path, when: str, step: int, config: Config, encoder: nn.Cell) -> None:
        """A model's numbers."""
        label = f"{names[place]}, {when}"
        if label in [run["label"] for run in runs]:
            raise UserError(f"--ckpt names {label}, twice: expected different weights")
        source = open_source(data_dir, "auto", encoder.in_chans, called="--data-dir")
        samples = spread(len(source), count)
        batches = _batches(source, samples, encoder, config.data, batch_size)
        reader = AttentionReader(encoder, min(batch_size, len(samples)))
        bar = tqdm(batches, desc=names[place], unit="batch", total=-(-len(samples) // batch_size))
        runs.append({"label": label, "ckpt": str(one), "step": step, **layer_numbers(reader, bar)})

    for one, place in zip(ckpt, places):
        config, model, step = restore(one)
        average = ", average" if Path(one).name == AVERAGE else ""
        add(one, place, f"step {step}{average}", step, config, model.encoder)
    if untrained:
        config = config_from_dict(read_checkpoint(ckpt[0]).config)
        add(ckpt[0], places[0], "untrained", 0, config, untrained_model(config).encoder)
    draw_numbers(runs, path)
    written = path.with_suffix(".json")
    replace_text(written, json.dumps({"data_dir": data_dir, "runs": runs}, indent=1) + "\n")
    print(f"mutual information at each layer: {path}, numbers: {written}")
    return path


def _batches(
    source: Source, samples: Sequence[int], encoder: nn.Cell, data: DataConfig, size: int
) -> Iterator[np.ndarray]:
    """Readable images as float32 [B, C, H, W], B at most `size`."""
    found = []
    for sample in samples:
        try:
            found.append(read_picture(source, sample, encoder, data).inputs)
        except UnreadableImage:
            continue
        if len(found) == size:
            yield np.stack(found)
            found = []
    if found:
        yield np.stack(found)


def _place(ckpt: str) -> Path:
    """What a model is called by: the folder of its run, or its weights file."""
    path = Path(ckpt).expanduser().resolve()
    if path.is_file() and path.name not in (WEIGHTS, AVERAGE):
        return path
    inside = re.compile(r"checkpoints|step_\d+|.*\.safetensors")
    return next(place for place in (path, *path.parents) if not inside.fullmatch(place.name))
