"""Pillow's antialiased bicubic, to the bit for 8 bit images and in less than half of the time.

Pillow makes each pixel of a new row a sum of pixels of the old one, in whole numbers of 2^-22, rounds it to 8 bits, and
then does the same with columns. Here both are sums of whole lines, which a processor takes many numbers at a time of:
OpenCV turns the image before each of them, and Numba compiles the sums (once, the result is kept on disk). Python's
other threads run meanwhile.

Rows come first, as Pillow had it in the authors' time and MindData has it; today's begins with the side that shrinks
more. In between 8 bit images are lines, uint8 [H, C, W]: a row of each channel, then the next row of each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import cv2
import numba
import numpy as np

BITS = 22  # of a weight, behind the point


def compiled(function: Callable) -> Callable:
    """Compiled when it is first called; read from disk the next time where there is a folder to write to."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # there is none: neither beside this file nor in the user's cache
        return numba.njit(nogil=True)(function)


@compiled
def _sums(lines, first, weights, mirrored, out):
    """out[c, i] = rounded sum over k of weights[i, k] x lines[(first[i] + k) x C + c], from the last one if mirrored.

    lines uint8 [n x C, m]; first int64 [N]; weights int32 [N, any number]; out uint8 [C, N, m].
    """
    channels, count, width = out.shape
    last, step = lines.shape[0] - channels, channels
    if mirrored:
        step = -channels
    sums = np.empty(width, np.int32)
    for i in range(count):
        for c in range(channels):
            line = first[i] * step + c
            if mirrored:
                line += last
            sums[:] = 1 << (BITS - 1)
            k = 0
            while k + 4 <= weights.shape[1]:  # four at a time: the sums go to memory and back less often
                p, q, r, s = weights[i, k], weights[i, k + 1], weights[i, k + 2], weights[i, k + 3]
                a, b, d, e = lines[line], lines[line + step], lines[line + 2 * step], lines[line + 3 * step]
                for x in range(width):
                    sums[x] += p * np.int32(a[x]) + q * np.int32(b[x]) + r * np.int32(d[x]) + s * np.int32(e[x])
                line, k = line + 4 * step, k + 4
            while k < weights.shape[1]:
                p, a = weights[i, k], lines[line]
                for x in range(width):
                    sums[x] += p * np.int32(a[x])
                line, k = line + step, k + 1
            row = out[c, i]
            for x in range(width):
                row[x] = min(max(sums[x] >> BITS, 0), 255)


@compiled
def normalise(lines, shift, scale, out):
    """Writes (lines - shift) x scale of each channel to out: uint8 [H, C, W] to float32 [C, H, W]; both float32 [C]."""
    channels, height, width = out.shape
    for y in range(height):
        for c in range(channels):
            minus, times, source, row = shift[c], scale[c], lines[y, c], out[c, y]
            for x in range(width):
                row[x] = (np.float32(source[x]) - minus) * times


def resized_lines(image: np.ndarray, size: tuple[int, int], mirrored: bool = False) -> np.ndarray:
    """Resizes (H, W, C), 8 bit, a part of a larger image or a whole one; `mirrored` as if it had been before.

    Returns:
        uint8 [size[0], C, size[1]].
    """
    H, W, C = image.shape
    turned = cv2.transpose(image.reshape(H, W * C))  # W x C, H
    rows = np.empty((C, size[1], H), np.uint8)
    _sums(turned, *_weights(W, size[1]), mirrored, rows)
    turned = cv2.transpose(rows.reshape(C * size[1], H))  # H, C x w
    lines = np.empty((1, size[0], C * size[1]), np.uint8)
    _sums(turned, *_weights(H, size[0]), False, lines)
    return lines.reshape(size[0], C, size[1])


def to_lines(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) to [H, C, W]."""
    return np.stack(cv2.split(image), axis=1)


def to_image(lines: np.ndarray) -> np.ndarray:
    """uint8 [H, C, W] to (H, W, C)."""
    return cv2.merge(tuple(lines.transpose(1, 0, 2))).reshape(lines.shape[0], lines.shape[2], -1)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, C) -> (*size, C), 8 bit as Pillow's to the bit, or float."""
    if image.dtype == np.uint8:
        return to_image(resized_lines(image, size))
    H, W, _ = image.shape
    rows = np.tensordot(_matrix(H, size[0]), image, 1)  # [h, W, C]
    return np.tensordot(_matrix(W, size[1]), rows, (1, 1)).transpose(1, 0, 2)  # [w, h, C] -> [h, w, C]


def _windows(before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    """The first of `before` pixels that each of `after` is made of, int64 [after], and weights from it on, float64.

    Weights are [after, as many as the widest window needs]; they are 0 behind a window, and none is behind the row. The
    kernel is Keys' with a = -0.5, as wide as a new pixel where the image shrinks.
    """
    step = before / after
    wide = max(step, 1.0)
    centre = (np.arange(after) + 0.5) * step
    first = np.maximum((centre - 2 * wide + 0.5).astype(np.int64), 0)
    counts = np.minimum((centre + 2 * wide + 0.5).astype(np.int64), before) - first
    k = np.arange(counts.max())
    x = np.abs((k + first[:, None] - centre[:, None] + 0.5) * (1 / wide))
    inner, outer = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, inner, np.where(x < 2, outer, 0))
    weights[k >= counts[:, None]] = 0
    weights *= 1 / np.cumsum(weights, axis=1)[:, -1:]
    for i in np.flatnonzero(first + len(k) > before):
        beyond = first[i] + len(k) - before
        first[i], weights[i] = first[i] - beyond, np.roll(weights[i], beyond)
    return first, weights


@lru_cache(maxsize=1024)
def _weights(before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    """`_windows` in whole numbers of 2^-BITS, int32."""
    first, weights = _windows(before, after)
    return first, np.trunc(weights * (1 << BITS) + np.copysign(0.5, weights)).astype(np.int32)


@lru_cache(maxsize=256)
def _matrix(before: int, after: int) -> np.ndarray:
    """`_windows` as a matrix, float32 [after, before]."""
    first, weights = _windows(before, after)
    matrix = np.zeros((after, before), np.float32)
    np.put_along_axis(matrix, first[:, None] + np.arange(weights.shape[1]), weights.astype(np.float32), axis=1)
    return matrix
