"""What a model reconstructs of images: for each scale the target and the prediction, as numbers on the grid of cells.

An image is seen under one mask, that of epoch 0. Predictions stand where the mask hides something and nowhere else,
since no loss reads the others. Where a method looks at an image in several views, the first view that hides a patch
says what is predicted for it: FastConvMAE's mask is that of its first view, LoMaR's what any of its windows hides.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from localmim.analysis.canvas import picture_path
from localmim.analysis.images import Picture, load_pictures
from localmim.analysis.sheet import Reconstruction, Scale, draw
from localmim.config import Config
from localmim.data.pipeline import resolve_mean_std
from localmim.device import set_device
from localmim.errors import UserError
from localmim.files import save_arrays
from localmim.mim.cells import rows_to_grid
from localmim.mim.masking import Mask
from localmim.mim.model import MaskedImageModel
from localmim.mim.reconstructors import MixtureModel
from localmim.mim.tokenizers import StoredIds
from localmim.mim.window_masking import WindowMask
from localmim.models.classifier import Classifier
from localmim.training.build import build_masking, build_tokenizer
from localmim.training.restore import restore

BATCH = 8  # images a forward pass at most
MOST = 32  # images a picture holds


class _Outputs(nn.Cell):
    """Predictions as rows and targets as grids of the first scales, in float32."""

    def __init__(self, model: MaskedImageModel, target: nn.Cell, scales: int):
        super().__init__(auto_prefix=False)  # the model's parameters keep their names
        self.model, self.target, self.scales = model, target, scales

    def construct(self, images: Tensor, *arrays: Tensor):
        rows = self.model.predict(images, *arrays)
        grids = self.target(images, *arrays[self.model.encoder.mask_inputs :])
        predictions, targets = [], []
        for k in range(self.scales):
            predictions.append(rows[k].astype(ms.float32))
            targets.append(grids[k])
        return predictions, targets


class Reconstructor:
    """Reconstructs images with a model as it is, which may be in training: nothing of it or of its run is changed.

    Of a mixture of reconstructors there is the target that is made of the images alone, pixels or HOG.

    Args:
        config: The model's recipe.
        model: Of pre-training.

    Raises:
        UserError: The model has no decoders, or its codebook cannot be opened or is of its own images alone.
    """

    def __init__(self, config: Config, model: MaskedImageModel):
        if isinstance(model, Classifier):
            what = "an encoder alone" if config.model.num_classes == 0 else f"a classifier (task {config.task})"
            raise UserError(f"{what} has no decoder to reconstruct with: expected a pre-training run")
        mixture = isinstance(model, MixtureModel)
        self.config, self.model = config, model
        self.masking = build_masking(config, model)
        self.target = model.target.own if mixture else model.target
        self.tokenizer = None if mixture else build_tokenizer(config, model)
        if isinstance(self.tokenizer, StoredIds):
            raise UserError(
                f"target.codebook: the ids in {self.tokenizer.file} are stored for the run's own images: "
                "there are none to compare other images with"
            )
        scales = 1 if mixture else len(model.decoders)
        self.names = model.loss_names()[:scales]
        self.network = _Outputs(model, self.target, scales)

    def __call__(self, pictures: Sequence[Picture]) -> list[Reconstruction]:
        """Reconstructions of images, which have the masks of the first samples of epoch 0.

        The graph is compiled once for each number of images up to 8; more are taken 8 at a time.
        """
        batch, found = min(len(pictures), BATCH), []
        for first in range(0, len(pictures), batch or 1):
            part = list(pictures[first : first + batch])
            filled = part + part[-1:] * (batch - len(part))
            found += self._batch(filled, np.arange(first, first + batch))[: len(part)]
        return found

    def _batch(self, pictures: list[Picture], samples: np.ndarray) -> list[Reconstruction]:
        images = np.stack([picture.inputs for picture in pictures])  # [B, C, H, W]
        mask = self.masking(0, samples)
        ids = () if self.tokenizer is None else self.tokenizer(images, samples)
        predictions, targets = self._run(images, *mask.arrays(), *ids)
        hidden = _hidden(mask, self.model.encoder.mask_grid)  # [B, h, w]
        scales = []  # for each scale a Scale an image
        for k, name in enumerate(self.names):
            grid = self._grid(k, predictions[k], mask, hidden)  # [B, hs, ws, D]
            values = self._values(targets[k], images), self._values(grid, images)
            normalised = self.config.target.kind == "pixels" and self.target.normalise
            scales.append([Scale(name, self.config.target.kind, t, p, normalised) for t, p in zip(*values)])
        return [Reconstruction(p.name, p.pixels, m, list(s)) for p, m, *s in zip(pictures, hidden, *scales)]

    def _run(self, *inputs: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Predictions and targets; the model is evaluated, and then what it was before."""
        training = self.model.training
        self.network.set_train(False)
        try:
            outputs = self.network(*(Tensor(array) for array in inputs))
        finally:
            self.model.set_train(training)
        return tuple([x.asnumpy() for x in part] for part in outputs)

    def _grid(self, k: int, rows: np.ndarray, mask: Mask, hidden: np.ndarray) -> np.ndarray:
        """Predicted rows on the grid of cells [B, hs, ws, D], NaN where nothing is hidden."""
        decoder, B = self.model.decoders[k], len(hidden)
        ids = mask.tap(k).ids_mask
        V = len(ids) // B  # views an image, side by side; turned around, as the last row of a patch counts below
        rows = rows.reshape(B, V, -1, rows.shape[-1])[:, ::-1].reshape(B, -1, rows.shape[-1])
        ids = ids.reshape(B, V, -1)[:, ::-1].reshape(B, -1)
        grid = rows_to_grid(rows, decoder.scale, ids, decoder.grid)
        grid[~(hidden_share(hidden, grid.shape[1:3]) > 0)] = np.nan
        return grid

    def _values(self, grid: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Targets or predictions [B, hs, ws, D] as Scale has them, an image each."""
        kind = self.config.target.kind
        if kind == "hog":
            return self.target.histograms(grid)
        if kind == "pixels":
            mean, std = resolve_mean_std(self.config.data, images.shape[1])
            return (self.target.images(grid, images).transpose(0, 2, 3, 1) * std + mean).astype(np.float32)
        ids = grid[..., 0] if grid.shape[-1] == 1 else grid.argmax(axis=-1)  # ids, or a score for each
        return np.where(np.isnan(grid[..., 0]), np.nan, ids).astype(np.float32)


def _hidden(mask: Mask, grid: tuple[int, int]) -> np.ndarray:
    """What Reconstruction has for a mask, [B, h, w]."""
    hidden = mask.mask()
    if isinstance(mask, WindowMask):
        seen = np.zeros(hidden.shape, bool)
        np.put_along_axis(seen, mask.ids.astype(np.int64), True, axis=1)
        hidden = np.where(seen, hidden, np.nan)
    return hidden.reshape(-1, *grid)


def hidden_share(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Hidden share of each cell of a finer or coarser grid: [B, h, w] -> [B, hs, ws], by repetition or by mean."""
    for axis, cells in zip((1, 2), grid):
        have = mask.shape[axis]
        if cells % have == 0:
            mask = mask.repeat(cells // have, axis)
        else:
            mask = mask.reshape(*mask.shape[:axis], cells, have // cells, *mask.shape[axis + 1 :]).mean(axis + 1)
    return mask


def reconstruct(ckpt: str, images: Sequence[str], count: int = 6, out: str = "", device: str = "auto") -> Path:
    """What a checkpoint makes of images: a picture, and its numbers beside it as .npz (see `arrays_of`).

    Args:
        ckpt: A run's folder, one of its checkpoints, or a weights file.
        images: Image files, and folders, CIFAR binaries and MindRecord shards, of which `count` images each are taken;
            32 at most.
        count: Images of a folder or a pack, evenly spread.
        out: PNG file; empty: reconstructions.png in the folder of `ckpt`.
        device: auto, CPU, GPU or Ascend.

    Returns:
        The path of the picture.

    Raises:
        UserError: The checkpoint has no decoders, an image cannot be read, or the disk does not take the files.
    """
    path = picture_path(out, ckpt, "reconstructions.png")
    set_device(device)
    config, model, _ = restore(ckpt)
    try:
        reconstructor = Reconstructor(config, model)
    except UserError as error:
        raise UserError(f"{ckpt}: {error}") from None
    pictures = load_pictures(images, model.encoder, config.data, count)
    if len(pictures) > MOST:
        raise UserError(f"{len(pictures)} images are more than the {MOST} that a picture holds: name fewer")
    found = reconstructor(pictures)
    draw(found, path)
    numbers = path.with_suffix(".npz")
    save_arrays(numbers, arrays_of(found))
    print(f"reconstructions of {len(found)} images: {path}, numbers: {numbers}")
    return path


def arrays_of(found: Sequence[Reconstruction]) -> dict[str, np.ndarray]:
    """Reconstructions of n images by one model as arrays.

    Returns:
        names [n], mask [n, h, w], scales (names) and kind [scales], and for scale k, from 1, target_k and prediction_k
        [n, ...]. What they hold: `Reconstruction` and `Scale`.
    """
    arrays = {
        "names": np.array([one.name for one in found]),
        "mask": np.stack([one.mask for one in found]),
        "scales": np.array([scale.name for scale in found[0].scales]),
        "kind": np.array([scale.kind for scale in found[0].scales]),
    }
    for k in range(len(found[0].scales)):
        arrays[f"target_{k + 1}"] = np.stack([one.scales[k].target for one in found])
        arrays[f"prediction_{k + 1}"] = np.stack([one.scales[k].prediction for one in found])
    return arrays
