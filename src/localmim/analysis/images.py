"""Images to look at: whole, at their own aspect for people, at the model's size for the model.

Evaluation crops the middle out of an image; here nothing is cut off. Both sides are scaled to the model's size, each by
itself, which training's crops of 3:4 to 4:3 have prepared it for, and what is drawn has the image's own aspect again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from mindspore import nn

from localmim.config import DataConfig
from localmim.data.pipeline import resize, resolve_mean_std
from localmim.data.sources import FileSource, Source, UnreadableImage, decode, open_source, spread
from localmim.errors import UserError


class Picture(NamedTuple):
    """An image.

    Attributes:
        name: Of its file or record.
        pixels: As it is stored, uint8 [H, W, C], or float32 in [0, 1].
        inputs: For the model, float32 [C, h, w], normalised.
    """

    name: str
    pixels: np.ndarray
    inputs: np.ndarray


def load_pictures(images: Sequence[str], encoder: nn.Cell, data: DataConfig, count: int = 6) -> list[Picture]:
    """The images named, in order.

    Args:
        images: Image files, and folders, CIFAR binaries and MindRecord shards, of which `count` images each are taken,
            evenly spread.
        encoder: Has `image_size` and `in_chans`.
        data: `data` of the recipe, whose mean and deviation normalise.
        count: Images of a folder or a pack.

    Raises:
        UserError: There is no such file, it is no image, or it has other channels than the encoder.
    """
    if count < 1:
        raise UserError(f"--count is {count}, expected at least 1")
    pictures = []
    for path in images:
        where = Path(path).expanduser()
        if where.is_file() and where.suffix != ".bin" and ".mindrecord" not in where.name:
            source, samples = FileSource(Path(), [str(where)], None, [], encoder.in_chans), [0]
        elif where.exists():
            source = open_source(path, "auto", encoder.in_chans, called="IMAGE")
            samples = spread(len(source), count)
        else:
            raise UserError(f"{path} does not exist: expected an image, or a folder of images")
        for sample in samples:
            try:
                pictures.append(read_picture(source, sample, encoder, data))
            except UnreadableImage as error:
                raise UserError(f"{source.name(sample)} cannot be read as an image: {error}") from None
    if not pictures:
        raise UserError("no image is named: expected image files, or a folder of images")
    return pictures


def read_picture(source: Source, sample: int, encoder: nn.Cell, data: DataConfig) -> Picture:
    """An image of a source. UnreadableImage when it is none."""
    pixels = source[sample]
    pixels = decode(pixels, encoder.in_chans) if source.encoded else pixels
    return picture(source.name(sample), pixels, encoder, data)


def picture(name: str, pixels: np.ndarray, encoder: nn.Cell, data: DataConfig) -> Picture:
    """An image [H, W, C] that is in memory."""
    mean, std = resolve_mean_std(data, encoder.in_chans)
    scaled = pixels if pixels.shape[:2] == tuple(encoder.image_size) else resize(pixels, tuple(encoder.image_size))
    scaled = scaled.astype(np.float32) / 255 if scaled.dtype == np.uint8 else scaled
    return Picture(name, pixels, ((scaled - mean) / std).transpose(2, 0, 1).astype(np.float32))


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Pixels [..., C], uint8 or in [0, 1] -> RGB uint8 [..., 3].

    Of three channels or more the first three are red, green and blue; of one or two the first is grey.
    """
    if pixels.dtype != np.uint8:
        pixels = (np.asarray(pixels) * 255).round().clip(0, 255).astype(np.uint8)
    return pixels[..., :3] if pixels.shape[-1] >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)


def shown(pixels: np.ndarray, longest: int) -> np.ndarray:
    """An image [H, W, C] at its own aspect, RGB uint8, the longer side `longest` pixels."""
    H, W = pixels.shape[:2]
    scale = longest / max(H, W)
    size = max(1, round(W * scale)), max(1, round(H * scale))
    return cv2.resize(as_rgb(pixels), size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w, ...] -> [H, W, ...]: each pixel has the value of the cell that its centre lies in."""
    row, column = (((np.arange(n) + 0.5) * have / n).astype(int) for n, have in zip(size, values.shape))
    return values[row][:, column]
