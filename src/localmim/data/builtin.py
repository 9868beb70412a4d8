"""The built-in demo images: ten kinds of textured things on cluttered backgrounds, drawn by OpenCV.

A kind is told by its outline and by the structure of its surface (bricks, scales, honeycomb, veins ...). Everything
else is drawn at random and independently of the kind: colours, place, size, turn, light, the texture's period and line
width, blur, noise, an occluder, and a background that carries pieces of the *other* kinds' textures. So raw pixels say
little, and local structure says much.

An image is a pure function of (seed, split, kind, index, size): the same versions of NumPy and OpenCV on the same kind
of processor write the same bytes, in any order and however often the writing was begun again.

    python -m localmim.data.builtin --root outputs/demo/images
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from jsonargparse import ArgumentParser
from tqdm import tqdm

from localmim import cli
from localmim.errors import UserError

MARKER = "builtin.json"  # lies in a finished folder and holds the parameters it was drawn with
ADVICE = "give another folder, or remove this one first"
VERSION = 1  # of the drawing; a change of any pixel raises it
JPEG_QUALITY = 90
SUPERSAMPLE = 2  # drawn at twice the size, then averaged
SUBPIXEL = 4  # fractional bits of the coordinates given to OpenCV

# How hard the set is.
EXTENT = (0.45, 0.8)  # longer side of the thing, share of the image's
TURN = 0.6  # largest turn to either side, radians
LITTER = (3, 8)  # plain shapes in the background, fewest and most
DISTRACTORS = (0, 2)  # textured shapes in the background
ALL_OVER = 0.35  # share of the images whose whole background has a faint texture
OCCLUDED = 0.35  # share of the images in which a shape lies over the thing's rim


# --- textures -------------------------------------------------------------------------------------------------------
# texture(u, v, period, line, soft) -> [H, W] float32 in [0, 1], 1 on the figure and 0 on the ground. `u` runs right,
# `v` down, `period` and `soft` (the width of an edge, about one pixel) are lengths in the unit of u and v; `line` in
# (0, 1) is the share of a period that the figure takes.


def _inside(distance: np.ndarray, soft: float) -> np.ndarray:
    """Turns a signed distance (positive inside) into coverage in [0, 1], with an edge `soft` wide."""
    return np.clip(distance / soft + 0.5, 0.0, 1.0)


def _wave(x: np.ndarray) -> np.ndarray:
    """Triangle wave of period 1: distance to the nearest integer, in [0, 0.5]."""
    return np.abs(x - np.rint(x))


def _bars(x: np.ndarray, period: float, line: float, soft: float) -> np.ndarray:
    """Bars of width `line * period` centred on the multiples of `period`."""
    return _inside(line * period / 2 - period * _wave(x / period), soft)


def stripes(u, v, period, line, soft):
    return _bars(u, period, line, soft)


def rings(u, v, period, line, soft):
    return _bars(np.hypot(u, v), period, line, soft)


def spokes(u, v, period, line, soft):
    count = max(6.0, np.rint(4.0 / period))
    radius = np.maximum(np.hypot(u, v), 1e-3)
    turn = np.arctan2(v, u) * (count / (2 * np.pi))
    return _inside((line / 2 - _wave(turn)) * radius * (2 * np.pi / count), soft)


def checks(u, v, period, line, soft):
    across = _inside(period * (0.25 - _wave(u / period)), soft)
    down = _inside(period * (0.25 - _wave(v / period)), soft)
    return across + down - 2 * across * down


def spots(u, v, period, line, soft):
    row = np.rint(v / (0.866 * period))
    x = u / period + 0.5 * (row % 2)
    distance = np.hypot((x - np.rint(x)) * period, v - row * 0.866 * period)
    return _inside((0.18 + 0.3 * line) * period - distance, soft)


def bricks(u, v, period, line, soft):
    height = 0.5 * period
    row = np.floor(v / height)
    joint = _bars(u + 0.5 * period * (row % 2), period, 0.5 * line * 0.5, soft)
    bed = _bars(v, height, 0.5 * line, soft)
    return np.maximum(joint, bed)


def scales(u, v, period, line, soft):
    step = 0.5 * period
    row = np.floor(v / step)
    rim = np.zeros_like(u)
    covered = np.zeros(u.shape, bool)
    for back in (0, 1):  # the row above lies over the row below: each pixel shows the first disc that holds it
        r = row - back
        x = u / period + 0.5 * (r % 2)
        depth = 0.56 * period - np.hypot((x - np.rint(x)) * period, v - r * step)
        shown = (depth > 0) & ~covered
        rim = np.where(shown, _inside(0.3 * line * period - depth, soft), rim)
        covered |= shown
    return np.where(covered, rim, 1.0)


def veins(u, v, period, line, soft):
    side = _bars(v + 0.8 * np.abs(u), period, 0.6 * line, soft)
    rib = _inside(0.18 * line * period + 0.02 - np.abs(u), soft)
    return np.maximum(side, rib)


def zigzags(u, v, period, line, soft):
    return _bars(v + 0.9 * period * _wave(u / (1.1 * period)), 0.8 * period, line, soft)


def honeycomb(u, v, period, line, soft):
    wall = np.full(u.shape, -np.inf, np.float32)
    for shift in (0.0, 0.5):  # the centres of a hexagonal lattice are two interleaved rectangular ones
        x = u / period - shift
        y = v / (1.7320508 * period) - shift
        x = np.abs(x - np.rint(x)) * period
        y = np.abs(y - np.rint(y)) * (1.7320508 * period)
        wall = np.maximum(wall, period / 2 - np.maximum(x, 0.5 * x + 0.8660254 * y))  # distance to the cell's border
    return _inside(0.18 * line * period + 0.01 - wall, soft)


TEXTURES: tuple[Callable, ...] = (
    stripes,
    rings,
    spokes,
    checks,
    spots,
    bricks,
    scales,
    veins,
    zigzags,
    honeycomb,
)


# --- colours and outlines -------------------------------------------------------------------------------------------


def _colour(rng: np.random.Generator, low: float = 0.05, high: float = 0.95) -> np.ndarray:
    """A random RGB colour in [0, 1] whose brightness is uniform in [low, high]."""
    hue = rng.random(3)
    grey = rng.uniform(low, high)
    mixed = grey + rng.uniform(0.1, 0.9) * (hue - hue.mean())
    return np.clip(mixed, 0.0, 1.0).astype(np.float32)


def _colour_pair(rng: np.random.Generator, contrast: float) -> tuple[np.ndarray, np.ndarray]:
    """Two random colours whose brightness differs by at least `contrast`, either of them the brighter one."""
    dark = rng.uniform(0.05, 0.95 - contrast)
    bright = rng.uniform(dark + contrast, 0.95)
    pair = [_colour(rng, dark, dark), _colour(rng, bright, bright)]
    return tuple(pair[::-1] if rng.random() < 0.5 else pair)


def _ellipse(x: float, y: float, rx: float, ry: float, start: float = 0.0, stop: float = 2.0) -> np.ndarray:
    """Points [48, 2] on an ellipse, from angle `start` to `stop` in units of pi."""
    angle = np.linspace(start, stop, 48) * np.pi
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def _box(x: float, y: float, half_width: float, half_height: float) -> np.ndarray:
    """The corners [4, 2] of a rectangle around (x, y)."""
    return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [half_width, half_height] + [x, y]


def _blob(rng: np.random.Generator, x: float, y: float, radius: float) -> np.ndarray:
    """Points of a random polygon, star, ellipse or wavy blob around (x, y)."""
    kind = rng.integers(4)
    if kind == 0:
        corners = int(rng.integers(3, 7))
        angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
        reach = radius * rng.uniform(0.7, 1.0, corners)
    elif kind == 1:
        corners = 2 * int(rng.integers(4, 8))
        angle = np.arange(corners) * (2 * np.pi / corners) + rng.uniform(0, 6)
        reach = radius * np.where(np.arange(corners) % 2, rng.uniform(0.4, 0.8), 1.0)
    else:
        angle = np.linspace(0, 2 * np.pi, 40)
        lobes, depth = (2, rng.uniform(0, 0.4)) if kind == 2 else (int(rng.integers(3, 6)), rng.uniform(0.05, 0.25))
        reach = radius * (1 - depth * (0.5 + 0.5 * np.cos(lobes * angle + rng.uniform(0, 6))))
    return np.stack([x + reach * np.cos(angle), y + reach * np.sin(angle)], axis=1)


class Canvas:
    """A square picture being painted, with a movable frame in which the things are drawn.

    Args:
        side: width and height in pixels.
        rng: the image's own random stream.
    """

    def __init__(self, side: int, rng: np.random.Generator):
        self.side = side
        self.rng = rng
        self.pixels = np.zeros((side, side, 3), np.float32)  # [H, W, RGB] in [0, 1]
        self.light = None  # [H, W] factor on what is painted; None: 1
        self.place(side / 2, side / 2, side / 2, 0.0)

    def place(self, x: float, y: float, unit: float, turn: float, mirror: bool = False, squeeze: float = 1.0) -> None:
        """Puts the frame's origin at pixel (x, y), its unit at `unit` pixels, turned by `turn` radians."""
        cos, sin = np.cos(turn), np.sin(turn)
        flip = np.diag([-squeeze if mirror else squeeze, 1.0 / squeeze])
        self.matrix = unit * np.array([[cos, -sin], [sin, cos]]) @ flip
        self.origin = np.array([x, y])
        self.unit = unit

    def to_pixels(self, points: np.ndarray) -> np.ndarray:
        """Points [n, 2] of the frame as OpenCV's fixed-point pixel coordinates, int32 [n, 2]."""
        points = np.asarray(points, np.float64) @ self.matrix.T + self.origin
        return np.rint(points * (1 << SUBPIXEL)).astype(np.int32)

    def grid(self, rows: slice, cols: slice) -> tuple[np.ndarray, np.ndarray]:
        """Frame coordinates u, v of the pixels in a window, float32 [H, W] each."""
        inverse = np.linalg.inv(self.matrix).astype(np.float32)
        x = np.arange(cols.start, cols.stop, dtype=np.float32)[None, :] - np.float32(self.origin[0])
        y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - np.float32(self.origin[1])
        return inverse[0, 0] * x + inverse[0, 1] * y, inverse[1, 0] * x + inverse[1, 1] * y

    def fill(self, points: np.ndarray, ground: np.ndarray, figure=None, texture=None, alpha: float = 1.0) -> None:
        """Fills a polygon of the frame with colour `ground`, and `figure` where texture(u, v) -> [H, W] is 1."""
        fixed = self.to_pixels(points)
        scale = 1 << SUBPIXEL
        left, top = np.clip(fixed.min(0) // scale - 1, 0, self.side)
        right, bottom = np.clip(fixed.max(0) // scale + 3, 0, self.side)
        if left >= right or top >= bottom:
            return
        rows, cols = slice(int(top), int(bottom)), slice(int(left), int(right))
        mask = np.zeros((rows.stop - rows.start, cols.stop - cols.start), np.uint8)
        cv2.fillPoly(mask, [fixed - np.array([left, top], np.int32) * scale], 255, cv2.LINE_AA, SUBPIXEL)
        cover = mask[..., None].astype(np.float32) * np.float32(alpha / 255.0)
        paint = ground
        if texture is not None:
            paint = ground + texture(*self.grid(rows, cols))[..., None] * (figure - ground)
        if self.light is not None:
            paint = paint * self.light[rows, cols, None]
        window = self.pixels[rows, cols]
        window += cover * (paint - window)

    def stroke(self, points: np.ndarray, colour: np.ndarray, width: float, closed: bool = False) -> None:
        """Draws a line `width` frame units wide (at least one pixel) along points of the frame."""
        thickness = max(1, round(width * self.unit))
        ink = [float(c) for c in colour]
        cv2.polylines(self.pixels, [self.to_pixels(points)], closed, ink, thickness, cv2.LINE_AA, SUBPIXEL)


# --- the ten kinds --------------------------------------------------------------------------------------------------
# Each draws its thing inside [-1, 1] x [-1, 1] of the canvas's frame (y down) with the brush that it is handed.


class Brush:
    """The random looks of one thing: two surface colours, an accent, an outline, a texture period and line share."""

    def __init__(self, canvas: Canvas):
        rng = canvas.rng
        self.canvas, self.rng = canvas, rng
        self.ground, self.figure = _colour_pair(rng, 0.3)
        self.accent, self.dark = _colour(rng), _colour(rng, 0.02, 0.3)
        self.period = max(rng.uniform(0.26, 0.42), 4.5 * SUPERSAMPLE / canvas.unit)
        self.line = rng.uniform(0.35, 0.65)
        self.shift = rng.uniform(-0.5, 0.5, 2) * self.period
        self.outline = rng.uniform(0.03, 0.07) if rng.random() < 0.7 else 0.0
        self.lean = rng.uniform(0.85, 1.15)  # proportion of the parts

    def textured(self, points, texture: Callable, warp: Callable | None = None, shifted: bool = True) -> None:
        """Fills with a texture; `warp` bends (u, v) first, and `shifted` moves the texture by a random part."""

        def paint(u, v):
            if warp is not None:
                u, v = warp(u, v)
            if shifted:
                u, v = u + np.float32(self.shift[0]), v + np.float32(self.shift[1])
            return texture(u, v, self.period, self.line, 1.4 / self.canvas.unit)

        self.canvas.fill(points, self.ground, self.figure, paint)
        self.edge(points)

    def plain(self, points, colour) -> None:
        """Fills with one colour."""
        self.canvas.fill(points, colour)
        self.edge(points)

    def edge(self, points) -> None:
        """The outline, if this brush has one."""
        if self.outline:
            self.canvas.stroke(points, self.dark, self.outline, closed=True)


def ball(brush: Brush) -> None:
    def bulge(u, v):
        depth = np.sqrt(np.clip(1 - (u * u + v * v) / 0.92, 0.01, None))
        return np.arctan2(u, depth), np.arctan2(v, depth)

    brush.period *= 1.6
    brush.textured(_ellipse(0, 0, 0.95, 0.95), checks, bulge)
    shine = brush.rng.uniform(-0.4, 0.4)
    brush.canvas.fill(_ellipse(shine, -0.45, 0.18, 0.1), np.ones(3, np.float32), alpha=0.6)


def fish(brush: Brush) -> None:
    body = 0.5 * brush.lean
    brush.plain(np.array([[0.45, 0.0], [1.0, -0.5], [0.85, 0.0], [1.0, 0.5]]), brush.accent)
    brush.plain(np.array([[-0.3, -0.7 * body], [0.1, -body - 0.32], [0.42, -0.5 * body]]), brush.accent)
    brush.plain(np.array([[-0.05, 0.7 * body], [0.2, body + 0.25], [0.38, 0.5 * body]]), brush.accent)
    t = np.linspace(0, np.pi, 24)
    x = -0.98 + 0.8 * (1 - np.cos(t))
    y = body * np.sin(t) ** 0.8
    outline = np.concatenate([np.stack([x, y], 1), np.stack([x, -y], 1)[::-1]])
    brush.textured(outline, stripes, lambda u, v: (u + 0.25 * v * v, v))
    brush.canvas.fill(_ellipse(-0.62, -0.14, 0.13, 0.13), np.ones(3, np.float32))
    brush.canvas.fill(_ellipse(-0.64, -0.14, 0.07, 0.07), brush.dark)
    brush.canvas.stroke(_ellipse(-0.5, 0.0, 0.16, 0.75 * body, -0.4, 0.4), brush.dark, 0.04)


def gear(brush: Brush) -> None:
    teeth = int(brush.rng.integers(8, 13))
    angle = (np.arange(teeth)[:, None] + np.array([-0.29, -0.2, 0.2, 0.29])) * (2 * np.pi / teeth)
    reach = np.array([0.76, 0.98, 0.98, 0.76])
    points = np.stack([reach * np.cos(angle), reach * np.sin(angle)], axis=-1).reshape(-1, 2)
    brush.plain(points, brush.ground)
    brush.textured(_ellipse(0, 0, 0.62, 0.62), spokes, shifted=False)
    brush.plain(_ellipse(0, 0, 0.2, 0.2), brush.accent)
    brush.canvas.fill(_ellipse(0, 0, 0.1, 0.1), brush.dark)


def hive(brush: Brush) -> None:
    y = np.linspace(0.9, -0.95, 26)
    x = 0.82 * brush.lean**0.5 * np.clip(1 - np.abs((y - 0.5) / 1.47) ** 2.4, 0, 1) ** 0.6
    brush.plain(_box(0, 0.92, 0.95, 0.07), brush.accent)
    brush.textured(np.concatenate([np.stack([x, y], 1), np.stack([-x, y], 1)[::-1]]), honeycomb)
    brush.plain(_ellipse(0, 0.88, 0.22, 0.38, 1.0, 2.0), brush.dark)


def house(brush: Brush) -> None:
    top = 0.02 * brush.lean
    stack = brush.rng.choice([-0.45, 0.45])
    brush.textured(_box(stack, -0.48, 0.12, 0.47), bricks)
    brush.textured(_box(0, top + 0.48, 0.78, 0.49), bricks)
    brush.plain(np.array([[-0.98, top], [-0.2, -0.9], [0.2, -0.9], [0.98, top]]), brush.accent)
    door = brush.rng.choice([-0.36, 0.36])
    brush.plain(_box(door, 0.68, 0.18, 0.29), brush.dark)
    brush.plain(_box(-door, 0.42, 0.19, 0.19), _colour(brush.rng, 0.6, 0.95))
    brush.canvas.stroke(_box(-door, 0.42, 0.19, 0.0), brush.dark, 0.04)
    brush.canvas.stroke(_box(-door, 0.42, 0.0, 0.19), brush.dark, 0.04)


def ladybird(brush: Brush) -> None:
    canvas = brush.canvas
    for side in (-1, 1):
        for y, spread in ((-0.3, -0.16), (0.12, 0.0), (0.5, 0.18)):
            legs = np.array([[0.5, y], [0.82, y + 0.5 * spread], [0.96, y + 1.6 * spread]]) * [side, 1]
            canvas.stroke(legs, brush.dark, 0.07)
        canvas.stroke(np.array([[0.12, -0.75], [0.24, -0.9], [0.4, -0.98]]) * [side, 1], brush.dark, 0.05)
    brush.plain(_ellipse(0, -0.58, 0.38, 0.28), brush.dark)
    brush.period *= 1.25
    brush.textured(_ellipse(0, 0.15, 0.72, 0.78 * brush.lean**0.5), spots, lambda u, v: (np.abs(u), v))
    canvas.stroke(np.array([[0.0, -0.62], [0.0, 0.9]]), brush.dark, 0.05)


def leaf(brush: Brush) -> None:
    t = np.linspace(0, 1, 30)
    half = 0.6 * brush.lean * np.sin(np.pi * t**0.8) ** 0.9
    jag = 1 + 0.1 * (np.arange(30) % 2)
    y = 0.62 - 1.58 * t
    edge = np.stack([half * jag, y], 1)
    brush.canvas.stroke(np.array([[0.0, 0.6], [0.04, 0.8], [0.14, 0.98]]), brush.figure, 0.09)
    brush.textured(np.concatenate([edge, (edge * [-1, 1])[::-1]]), veins, shifted=False)


def mug(brush: Brush) -> None:
    centre, half, top = -0.2, 0.68 * brush.lean**0.5, -0.75
    handle = _ellipse(0.42, 0.08, 0.46, 0.44, -0.5, 0.5)
    brush.canvas.stroke(handle, brush.dark, 0.3)
    brush.canvas.stroke(handle, brush.accent, 0.21)
    foot = _ellipse(centre, 0.78, 0.92 * half, 0.16, 0.0, 1.0)
    brush.textured(np.concatenate([foot, _ellipse(centre, top, half, 0.18, 1.0, 2.0)]), zigzags)
    brush.plain(_ellipse(centre, top, half, 0.2), brush.dark)
    brush.canvas.fill(_ellipse(centre, top + 0.05, 0.85 * half, 0.13), brush.accent)


def snake(brush: Brush) -> None:
    t = np.linspace(0, 1, 90)  # coiled: from the neck, outside, to the tail in the middle
    angle = 2 * np.pi * 1.6 * t - 0.5 * np.pi
    radius = 0.78 - 0.6 * t
    spine = np.stack([radius * np.cos(angle), radius * np.sin(angle) * brush.lean**0.5], 1)
    spine = np.concatenate([[[-0.45, -0.82]], spine])
    along = np.gradient(spine, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], 1) / np.linalg.norm(along, axis=1, keepdims=True)
    width = 0.18 * np.clip(3 * np.linspace(1, 0, len(spine)), 0.1, 1.0)[:, None]
    brush.period *= 0.85
    brush.textured(np.concatenate([spine + width * normal, (spine - width * normal)[::-1]]), scales)
    brush.canvas.stroke(np.array([[-0.7, -0.8], [-0.98, -0.72]]), brush.accent, 0.06)
    brush.plain(_ellipse(-0.56, -0.8, 0.3, 0.2), brush.figure)
    for side in (-1, 1):
        brush.canvas.fill(_ellipse(-0.62, -0.8 + 0.09 * side, 0.06, 0.06), brush.ground)


def target(brush: Brush) -> None:
    for foot in (-0.6, 0.6):
        brush.canvas.stroke(np.array([[0.4 * foot, 0.2], [foot, 0.98]]), brush.accent, 0.12)
    brush.textured(_ellipse(0, -0.12, 0.84, 0.84), rings, lambda u, v: (u, v + np.float32(0.12)), shifted=False)


CLASSES: dict[str, Callable[[Brush], None]] = {
    kind.__name__: kind for kind in (ball, fish, gear, hive, house, ladybird, leaf, mug, snake, target)
}
SPLITS = ("train", "val")


# --- one image ------------------------------------------------------------------------------------------------------


def _background(canvas: Canvas) -> None:
    """A colour gradient, soft clouds, perhaps a faint all-over texture, and a litter of shapes."""
    rng, side = canvas.rng, canvas.side
    first, second = _colour(rng), _colour(rng)
    turn = rng.uniform(0, 2 * np.pi)
    axis = (np.arange(side, dtype=np.float32) / side) - 0.5
    ramp = np.clip(0.5 + np.cos(turn) * axis[None, :] + np.sin(turn) * axis[:, None], 0, 1)[..., None]
    canvas.pixels[:] = first + ramp * (second - first)
    cells = int(rng.integers(3, 12))
    clouds = rng.normal(0, rng.uniform(0.02, 0.1), (cells, cells, 1)) + rng.normal(0, 0.03, (cells, cells, 3))
    canvas.pixels += cv2.resize(clouds.astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    if rng.random() < ALL_OVER:
        _texture_patch(canvas, _box(0, 0, 12, 12), side / 2, side / 2, contrast=0.1, alpha=rng.uniform(0.15, 0.45))
    for _ in range(int(rng.integers(*LITTER, endpoint=True))):
        canvas.place(*rng.uniform(0, side, 2), side * rng.uniform(0.05, 0.22), rng.uniform(0, 2 * np.pi))
        if rng.random() < 0.35:
            canvas.stroke(rng.uniform(-2, 2, (int(rng.integers(2, 5)), 2)), _colour(rng), rng.uniform(0.05, 0.4))
        else:
            canvas.fill(_blob(rng, 0, 0, 1.0), _colour(rng), alpha=rng.uniform(0.4, 1.0))
    for _ in range(int(rng.integers(*DISTRACTORS, endpoint=True))):
        _texture_patch(canvas, _blob(rng, 0, 0, rng.uniform(1.0, 1.6)), *rng.uniform(0, side, 2), contrast=0.25)


def _texture_patch(canvas: Canvas, points, x: float, y: float, contrast: float, alpha: float = 1.0) -> None:
    """A shape that carries the texture of any kind, so that a texture alone somewhere in the image proves nothing."""
    rng = canvas.rng
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    unit = canvas.side * rng.uniform(0.09, 0.15)
    canvas.place(x, y, unit, rng.uniform(0, 2 * np.pi))
    ground, figure = _colour_pair(rng, contrast)
    period = rng.uniform(0.5, 0.9)
    line, shift = rng.uniform(0.35, 0.65), rng.uniform(-1, 1, 2).astype(np.float32)
    canvas.fill(
        points, ground, figure, lambda u, v: texture(u + shift[0], v + shift[1], period, line, 1.4 / unit), alpha
    )


def _lighting(rng: np.random.Generator, side: int, x: float, y: float, unit: float) -> np.ndarray:
    """Light on the thing, [H, W]: from one side, and falling off towards its rim."""
    turn, slope, round_ = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.35), rng.uniform(0, 0.3)
    u = ((np.arange(side, dtype=np.float32) - x) / unit)[None, :]
    v = ((np.arange(side, dtype=np.float32) - y) / unit)[:, None]
    return np.clip(1 + slope * (np.cos(turn) * u + np.sin(turn) * v) - round_ * (u * u + v * v), 0.25, 1.5)


def draw_image(kind: str, index: int, *, split: str = "train", seed: int = 0, size: int = 96) -> np.ndarray:
    """Draws one image.

    Args:
        kind: a name from CLASSES.
        index: number of the image within its split and kind.
        split: "train" or "val".
        seed: of the whole set.
        size: width and height in pixels.

    Returns:
        uint8 [size, size, 3], RGB: a pure function of the arguments.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), list(CLASSES).index(kind), index])
    side = size * SUPERSAMPLE
    canvas = Canvas(side, rng)
    _background(canvas)

    unit = side * rng.uniform(*EXTENT) / 2
    x, y = (side / 2 + rng.uniform(-1, 1, 2) * (side / 2 - 0.85 * unit)).tolist()
    turn, mirror, squeeze = rng.uniform(-TURN, TURN), rng.random() < 0.5, rng.uniform(0.9, 1.1)
    canvas.light = _lighting(rng, side, x, y, unit)
    canvas.place(x, y, unit, turn, mirror, squeeze)
    CLASSES[kind](Brush(canvas))

    canvas.light = None
    if rng.random() < OCCLUDED:  # something lies over the rim of the thing
        angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.7, 1.1)
        canvas.fill(_blob(rng, reach * np.cos(angle), reach * np.sin(angle), rng.uniform(0.25, 0.5)), _colour(rng))

    image = cv2.resize(canvas.pixels, (size, size), interpolation=cv2.INTER_AREA)
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.8))
    image = rng.uniform(0.75, 1.15) * (image - 0.5) + 0.5 + rng.uniform(-0.1, 0.1)
    image += rng.uniform(0, 0.025) * rng.standard_normal(image.shape, np.float32)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


# --- the set --------------------------------------------------------------------------------------------------------


def write_builtin_images(
    root: str,
    *,
    size: int = 96,
    train_per_class: int = 400,
    val_per_class: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Writes the set once, as JPEG files root/train/<kind>/NNNN.jpg and root/val/<kind>/NNNN.jpg.

    The set is written to a hidden folder next to `root`, which gets its name when it is complete. A later call with the
    same parameters finds it and writes nothing. A folder that holds anything else is left as it is.

    Args:
        root: folder to write, a path of any type; absent, empty, or a finished set with the same parameters.
        size: width and height of the images in pixels, at least 32.
        train_per_class: images of each of the ten kinds in train.
        val_per_class: images of each kind in val.
        seed: of the whole set; another seed gives entirely other images.
        progress: show a bar on stderr.

    Returns:
        The folder.

    Raises:
        UserError: a parameter is out of range, or the folder holds something else or a damaged set.
    """
    root = Path(root).resolve()
    counts = dict(zip(SPLITS, (train_per_class, val_per_class)))
    for name, value, least in (
        ("size", size, 32),
        ("train_per_class", train_per_class, 1),
        ("val_per_class", val_per_class, 0),
        ("seed", seed, 0),
    ):
        if value < least:
            raise UserError(f"{name}: {value} is too small, expected at least {least}")
    wanted = {"version": VERSION, "size": size, **{f"{s}_per_class": n for s, n in counts.items()}, "seed": seed}
    if _finished(root, wanted, counts):
        return root

    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{root.name}.partial-", dir=root.parent))
    except OSError as error:
        raise UserError(f"{root}: cannot be written ({error.strerror}), expected a place for a new folder") from None
    try:
        jobs = [(split, kind, i) for split in SPLITS for kind in CLASSES for i in range(counts[split])]
        for split, kind, index in tqdm(jobs, "drawing images", unit="img", disable=not progress, mininterval=0.5):
            image = draw_image(kind, index, split=split, seed=seed, size=size)
            path = aside / split / kind / f"{index:04d}.jpg"
            if index == 0:
                path.parent.mkdir(parents=True)
            ok, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
            if not ok:
                raise RuntimeError(f"OpenCV could not encode {path}")
            path.write_bytes(data.tobytes())
        (aside / MARKER).write_text(json.dumps(wanted, indent=2) + "\n")
        aside.chmod(0o755)
        try:
            aside.rename(root)  # replaces an empty folder, and fails on one that holds anything
        except OSError as error:
            if not _finished(root, wanted, counts):  # another process may have written the same set meanwhile
                raise UserError(f"{root}: cannot become the finished set ({error.strerror}); {ADVICE}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # what is left of a failed or interrupted writing
    return root


def _finished(root: Path, wanted: dict, counts: dict[str, int]) -> bool:
    """True if `root` is the wanted set, False if it is absent or empty; UserError for anything else."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise UserError(f"{root}: is a file, expected a folder to write the built-in images to")
    if not any(root.iterdir()):
        return False
    try:
        found = dict(json.loads((root / MARKER).read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{root}: holds files that are not the built-in images; {ADVICE}") from None
    differ = [f"{key} {found.get(key)} (wanted {value})" for key, value in wanted.items() if found.get(key) != value]
    if differ:
        raise UserError(f"{root}: holds built-in images drawn with {', '.join(differ)}; {ADVICE}")
    for split, count in counts.items():
        for kind in CLASSES:
            have = sum(1 for i in range(count) if (root / split / kind / f"{i:04d}.jpg").is_file())
            if have != count:
                raise UserError(f"{root / split / kind}: {have} of {count} built-in images are left; {ADVICE}")
    return True


def main(argv: list[str]) -> None:
    """Command line."""
    parser = ArgumentParser(
        prog="python -m localmim.data.builtin", description="Draws the demo's images.", exit_on_error=False
    )
    parser.add_argument("--root", metavar="DIR", type=str, required=True, help="folder to write, with train/ and val/")
    parser.add_argument("--size", metavar="PX", type=int, default=96, help="side of an image")
    parser.add_argument(
        "--train-per-class", metavar="N", type=int, default=400, help="images of each of the ten classes"
    )
    parser.add_argument("--val-per-class", metavar="N", type=int, default=100, help="images of each class under val/")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="another one draws other images")
    arguments = cli.parse(parser, argv).as_dict()
    print(f"built-in images: {write_builtin_images(arguments.pop('root'), **arguments)}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
