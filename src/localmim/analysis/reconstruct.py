"""What a checkpoint reconstructs: targets and predictions of a few images at every scale, as a picture."""

from __future__ import annotations

from pathlib import Path

import cv2
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from localmim.analysis.pictures import reconstruction_sheet
from localmim.config import Config
from localmim.data.pipeline import eval_batches, resolve_mean_std
from localmim.data.sources import Source
from localmim.errors import UserError
from localmim.mim.cells import rows_to_grid
from localmim.mim.model import MaskedImageModel
from localmim.mim.reconstructors import MixtureModel
from localmim.mim.tokenizers import StoredIds
from localmim.training.build import build_masking, build_tokenizer


class _Outputs(nn.Cell):
    def __init__(self, model: MaskedImageModel):
        super().__init__()
        self.model = model

    def construct(self, images, *arrays):
        return self.model.predict(images, *arrays), self.model.targets(images, *arrays)


def reconstruct(config: Config, model: MaskedImageModel, source: Source, count: int, path: Path) -> Path:
    """Draws `count` images, spread evenly over `source`, with the masks that they have in epoch 0.

    HOG is drawn as glyphs, pixels as they are, codebook ids each in a colour of its own. Features of networks are not
    drawn, so of a mixture of reconstructors there is the target that is made of the images alone.

    Raises:
        UserError: The images have a channel count that cannot be drawn, or the run's codebook cannot be opened.
    """
    encoder = model.encoder
    if encoder.in_chans not in (1, 3):
        raise UserError(f"only images of 1 or 3 channels can be drawn, and this model takes {encoder.in_chans}")
    mixture = isinstance(model, MixtureModel)
    tokenizer = None if mixture else build_tokenizer(config, model)
    if isinstance(tokenizer, StoredIds):
        raise UserError("the codebook ids of this run are stored for its own images: others have none to compare with")
    images = _some_images(config, encoder, source, count)
    samples = np.arange(len(images))
    mask = build_masking(config, model)(0, samples)
    ids = () if tokenizer is None else tokenizer(images, samples)
    network = _Outputs(model)
    network.set_train(False)
    predictions, targets = network(Tensor(images, ms.float32), *map(Tensor, (*mask.arrays(), *ids)))
    h, w = encoder.mask_grid
    scales = 1 if mixture else len(predictions)
    kind = model.target.own if mixture else model.target
    drawn_targets, drawn_predictions = [], []
    for k, (cell, decoder) in enumerate(zip(model.cell_sides()[:scales], model.decoders)):
        target, prediction = targets[k].asnumpy(), predictions[k].asnumpy().astype(np.float32)
        rows, ids = prediction.reshape(len(images), -1, prediction.shape[-1]), mask.tap(k).ids_mask
        grid = rows_to_grid(rows, decoder.scale, ids.reshape(len(images), -1), decoder.grid)
        if len(ids) > len(images):  # several views of an image: what one of them sees, another may predict
            grid[mask.mask().reshape(grid.shape[:3]) == 0] = np.nan
        if config.target.kind == "hog":
            drawn_targets.append(kind.histograms(target))
            drawn_predictions.append(kind.histograms(grid))
        elif config.target.kind == "codebook":
            drawn_targets.append(_palette(target[..., 0], cell))
            drawn_predictions.append(_palette(np.nan_to_num(grid).argmax(axis=-1), cell))
        else:
            drawn_targets.append(to_uint8(images, config, encoder.in_chans))
            pixels = kind.images(grid, images)
            drawn = to_uint8(np.where(np.isnan(pixels), images, pixels), config, encoder.in_chans)
            drawn_predictions.append(drawn)
    masks = mask.mask().reshape(-1, h, w)
    shown = to_uint8(images, config, encoder.in_chans)
    return reconstruction_sheet(shown, masks, drawn_targets, drawn_predictions, model.loss_names()[:scales], path)


def _some_images(config: Config, encoder: nn.Cell, source: Source, count: int) -> np.ndarray:
    """float32 [count, C, H, W], normalised, spread evenly over the source."""
    chosen = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int))
    batches = eval_batches(source, config.data, encoder.image_size, encoder.in_chans, len(chosen), chosen)
    return next(iter(batches)).images


def to_uint8(images: np.ndarray, config: Config, in_chans: int) -> np.ndarray:
    """Normalised [B, C, H, W] to pixels uint8 [B, H, W, 3]."""
    mean, std = resolve_mean_std(config.data, in_chans)
    pixels = images.transpose(0, 2, 3, 1) * std + mean
    pixels = (pixels * 255).round().clip(0, 255).astype(np.uint8)
    return pixels if in_chans == 3 else np.repeat(pixels, 3, axis=-1)


def _palette(ids: np.ndarray, cell: int) -> np.ndarray:
    """Codebook ids [B, hs, ws] as colours, the same for the same id: uint8 [B, H, W, 3]."""
    hues = np.stack([ids * 0.618034 % 1 * 180, np.full(ids.shape, 160), 140 + ids % 4 * 35], axis=-1).astype(np.uint8)
    colours = np.stack([cv2.cvtColor(image, cv2.COLOR_HSV2RGB) for image in hues])
    return colours.repeat(cell, axis=1).repeat(cell, axis=2)
