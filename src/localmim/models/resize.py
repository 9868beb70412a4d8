"""Weights whose shape follows the image size, for another size: position codes and bias tables.

Bicubic (a = -0.75, pixel centres aligned), as PyTorch's interpolate without antialiasing, which the authors use for
position codes and the official Swin for bias tables.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

from localmim.errors import UserError
from localmim.models.layers import to_pair

_CHANNELS = 512  # the most that OpenCV takes at once
_SHARED_TABLE = "encoder.relative.table"  # of BEiT's and SimMIM's pre-training


def resize_grid(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w, D] -> [*size, D], float32."""
    parts = [
        cv2.resize(np.ascontiguousarray(values[..., i : i + _CHANNELS]), size[::-1], interpolation=cv2.INTER_CUBIC)
        for i in range(0, values.shape[-1], _CHANNELS)
    ]
    return np.concatenate([part.reshape(*size, -1) for part in parts], axis=-1)


def resize_position_code(code: np.ndarray, before: tuple[int, int], after: tuple[int, int]) -> np.ndarray:
    """Codes of a grid, those of class tokens first and kept: [1, n + h*w, D] -> [1, n + h'*w', D]."""
    tokens = code.shape[1] - before[0] * before[1]
    if tokens < 0:
        raise ValueError(f"{code.shape[1]} position codes are fewer than the {before[0]}x{before[1]} of the grid")
    grid = resize_grid(code[0, tokens:].reshape(*before, -1), after)
    return np.concatenate([code[:, :tokens], grid.reshape(1, after[0] * after[1], -1)], axis=1)


def resize_offset_table(table: np.ndarray, before: tuple[int, int], after: tuple[int, int]) -> np.ndarray:
    """Biases of a ViT's offsets, the three rows of the class token kept: [(2h-1)(2w-1) + 3, heads] for another grid."""
    (h, w), (H, W) = ((2 * a - 1, 2 * b - 1) for a, b in (before, after))
    if len(table) != h * w + 3:
        raise ValueError(f"{len(table)} biases are not those of the offsets on a grid of {before[0]}x{before[1]}")
    grid = resize_grid(table[:-3].reshape(h, w, -1), (H, W)).reshape(H * W, -1)
    return np.concatenate([grid, table[-3:]])


def resize_bias_table(table: np.ndarray, window: int) -> np.ndarray:
    """Relative position biases for windows of another side: [(2w-1)^2, heads] -> [(2*window-1)^2, heads]."""
    side = math.isqrt(len(table))
    return resize_grid(table.reshape(side, side, -1), (2 * window - 1,) * 2).reshape(-1, table.shape[-1])


class Resized(NamedTuple):
    """Weights that fit an encoder's size, and what was done for that, in words."""

    arrays: dict[str, np.ndarray]
    done: list[str]


def fit_to_size(arrays: dict[str, np.ndarray], model, image_size=None) -> Resized:
    """Resizes what of `arrays` has another image size than `model.encoder`; the rest stays as it is.

    Args:
        arrays: By our names, `encoder.` in front.
        model: Has an `encoder`.
        image_size: Pixels that the arrays were trained at, one number or (height, width); None: a square.

    Raises:
        UserError: The position codes are those of no such grid.
    """
    encoder, fitted, codes, tables = model.encoder, dict(arrays), "", []
    parameters = dict(model.parameters_and_names())
    spread = _spread_shared_table(fitted, parameters)
    known = tuple(s // encoder.patch_size for s in to_pair(image_size)) if image_size else None
    turned = known is not None and known != getattr(encoder, "grid", known)  # 2x3 and 3x2 have one shape
    code, own = arrays.get("encoder.pos_embed"), getattr(encoder, "pos_embed", None)
    if code is not None and own is not None and (turned or code.shape != own.shape):
        count = code.shape[1] - encoder.class_tokens
        before = known or (math.isqrt(count),) * 2
        if before[0] * before[1] != count:
            raise UserError(f"encoder.pos_embed holds {count} patches, which is no {before[0]}x{before[1]} grid")
        fitted["encoder.pos_embed"] = resize_position_code(code, before, encoder.grid)
        codes = f"position codes {before[0]}x{before[1]} -> {encoder.grid[0]}x{encoder.grid[1]}"
    for name, parameter in parameters.items():
        table = fitted.get(name) if name.endswith("relative.table") and parameter.ndim == 2 else None
        if table is not None and (turned or table.shape != parameter.shape):
            before = known or ((math.isqrt(len(table) - 3) + 1) // 2,) * 2
            fitted[name] = resize_offset_table(table, before, encoder.grid)
            tables.append(name)
        table = arrays.get(name) if name.endswith("relative_position_bias_table") else None
        if table is not None and table.shape != parameter.shape and table.shape[1] == parameter.shape[1]:
            fitted[name] = resize_bias_table(table, (math.isqrt(parameter.shape[0]) + 1) // 2)
            tables.append(name)
    done = [text for text in (spread, codes) if text]
    return Resized(fitted, done + ([f"{len(tables)} bias tables"] if tables else []))


def _spread_shared_table(arrays: dict[str, np.ndarray], parameters: dict) -> str:
    """Where pre-training shared one bias table and each block has its own now, all start with it; says so."""
    own = [n for n in parameters if n.startswith("encoder.blocks.") and n.endswith("relative.table")]
    if _SHARED_TABLE not in arrays or _SHARED_TABLE in parameters or not own:
        return ""
    table = arrays.pop(_SHARED_TABLE)
    arrays.update({name: table for name in own if name not in arrays})
    return f"the shared bias table, now one in each of {len(own)} blocks"
