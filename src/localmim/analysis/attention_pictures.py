"""Attention as pictures: what points of an image attend to, over the image.

Each panel has a colour scale of its own, from nothing to its largest weight. What a Swin's window does not reach keeps
its grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from localmim.analysis.attention import AttentionReader, Layer
from localmim.analysis.canvas import FAINT, INK, picture_path, save
from localmim.analysis.images import Picture, as_rgb, load_pictures, nearest, shown
from localmim.analysis.paper import BLOCK, GAP, LINE, MARGIN, Page
from localmim.device import set_device
from localmim.errors import UserError
from localmim.files import save_arrays
from localmim.training.restore import restore

HEAD = 132  # longer side of a head's panel, pixels; the mean over heads has twice that, and so have heads that are few
FEW, MOST_ABREAST = 4, 8  # heads
LEAST_WIDTH = 720  # of a page, for its text
BOX, LINE_WIDTH, RED = 9, 2, (255, 30, 30)  # the box around a query: its least side, pixels
SCALE = matplotlib.colormaps["viridis"]
COVER, DARK, PALE = 0.72, 0.6, 0.5  # how much a map hides its image, how dark that is there, and how pale elsewhere
STRIP = (12, 180)  # size of the colour scale


class Query(NamedTuple):
    """A point of an image as it is stored, pixels to the right and down from its upper left corner."""

    x: float
    y: float

    def patch(self, picture: Picture, grid: tuple[int, int]) -> int:
        """The patch that the point lies in, row-major."""
        (H, W), (h, w) = picture.pixels.shape[:2], grid
        return min(int(self.y / H * h), h - 1) * w + min(int(self.x / W * w), w - 1)


def middle(picture: Picture) -> Query:
    """Of an image."""
    H, W = picture.pixels.shape[:2]
    return Query(W / 2, H / 2)


def parse_query(text: str, picture: Picture) -> Query:
    """A point given as "X,Y".

    Raises:
        UserError: It is none, or it lies outside of the image.
    """
    try:
        x, y = (float(number) for number in text.split(","))
    except ValueError:
        raise UserError(f"--query is {text!r}, expected X,Y in pixels of the image") from None
    H, W = picture.pixels.shape[:2]
    if not (0 <= x < W and 0 <= y < H):
        raise UserError(f"--query {text} lies outside of {picture.name}: expected X below {W} and Y below {H}, from 0")
    return Query(x, y)


def choose_layers(text: str, names: Sequence[str]) -> list[int]:
    """Layers (from 0) named as "1,6,12" (from 1) or "all"; of none named the first, the middle and the last one.

    Raises:
        UserError: There is no such layer.
    """
    count = len(names)
    if text == "all":
        return list(range(count))
    if not text:
        return sorted({0, (count - 1) // 2, count - 1})
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = [0]
    if not all(1 <= number <= count for number in numbers):
        raise UserError(
            f"--layers is {text!r}, expected all or numbers from 1, {names[0]}, to {count}, {names[-1]}, with commas"
        )
    return sorted({number - 1 for number in numbers})


def draw_maps(reader: AttentionReader, picture: Picture, path: str | Path) -> str:
    """Writes what the middle of an image attends to in the first, the middle and the last layer as a PNG.

    Returns:
        What the picture shows, in words.

    Raises:
        UserError: The disk does not take it.
    """
    layers = reader(picture.inputs[None])
    chosen = [layers[k] for k in choose_layers("", reader.names)]
    save(page_of(picture, [middle(picture)], chosen).figure(), path)
    names = [layer.name for layer in chosen]
    return f"what the middle of the image attends to: {', then '.join(names)}; mean over heads, then each head"


def page_of(picture: Picture, queries: Sequence[Query], layers: Sequence[Layer]) -> Page:
    """Maps of one image: a block a query, in it a row a layer, in that the mean over heads, then each head.

    Args:
        picture: The image.
        queries: Points of it.
        layers: Attention on this image alone.
    """
    small, large = shown(picture.pixels, HEAD), shown(picture.pixels, 2 * HEAD + GAP)
    rows = MARGIN + large.shape[1] + 4 * GAP  # where they begin
    widest = max(_abreast(layer) * (_head(layer, small, large).shape[1] + GAP) for layer in layers)
    page = Page(max(rows + large.shape[1] + GAP + widest + MARGIN, LEAST_WIDTH))
    page.skip(MARGIN)
    for number, query in enumerate(queries):
        page.skip(BLOCK if number else 0)
        title = f"{picture.name}, query {query.x:g},{query.y:g}"
        page.write(title, MARGIN, page.width - 2 * MARGIN, INK, bold=True)
        page.skip(LINE + GAP)
        for k, layer in enumerate(layers):
            patch = query.patch(picture, layer.grid)
            heads = f"mean of {_heads(layer)} heads, then each" if _heads(layer) > 1 else "its only head"
            title = f"{layer.name}: {heads}"
            page.write(title, rows, page.width - rows - MARGIN, INK)
            page.skip(LINE)
            if k == 0:
                page.paste(boxed(large, layer.grid, patch), MARGIN)
            _row(page, layer, patch, small, large, rows)
    page.skip(GAP)
    scale = SCALE(np.linspace(0, 1, STRIP[1]))[None, :, :3].repeat(STRIP[0], axis=0)
    page.skip((LINE - STRIP[0]) // 2)
    page.paste(as_rgb(scale), MARGIN)
    page.skip((STRIP[0] - LINE) // 2)
    room = page.width - 2 * MARGIN - STRIP[1] - GAP
    for line in page.wrapped(_legend(layers), room):
        page.write(line, MARGIN + STRIP[1] + GAP, room, FAINT)
        page.skip(LINE)
    page.skip(MARGIN - GAP)
    return page


def _legend(layers: Sequence[Layer]) -> str:
    """What the panels show, in words."""
    said = "Of each panel: nothing to its largest weight. Red: the query."
    return said + (" Grey: outside of the query's window." if any(len(layer.windows) > 1 for layer in layers) else "")


def _heads(layer: Layer) -> int:
    return layer.windows[0].weights.shape[1]


def _abreast(layer: Layer) -> int:
    """Heads in a line."""
    heads = _heads(layer)
    return heads if heads <= FEW else min(-(-heads // 2), MOST_ABREAST)


def _head(layer: Layer, small: np.ndarray, large: np.ndarray) -> np.ndarray:
    """The image behind a head's map."""
    return large if _heads(layer) <= FEW else small


def _row(page: Page, layer: Layer, patch: int, small: np.ndarray, large: np.ndarray, left: int) -> None:
    """A layer's maps side by side; the page goes on below them."""
    maps = layer.map_of(0, patch)  # [nh, h, w]
    below = page.height + len(large) + GAP
    page.paste(over(large, maps.mean(axis=0), patch), left)
    left += large.shape[1] + 2 * GAP
    image, abreast = _head(layer, small, large), _abreast(layer)
    for first in range(0, len(maps) if len(maps) > 1 else 0, abreast):
        for k, values in enumerate(maps[first : first + abreast]):
            page.paste(over(image, values, patch), left + k * (image.shape[1] + GAP))
        page.skip(len(image) + GAP)
    page.skip(max(below - page.height, 0))


def over(image: np.ndarray, values: np.ndarray, patch: int) -> np.ndarray:
    """A map [h, w] over an image in grey, uint8 [H, W, 3], its query in a red box; NaN leaves the image as it is."""
    size, known = image.shape[:2], ~np.isnan(values)
    largest = max(np.nanmax(values), np.finfo(np.float32).tiny)
    colours = SCALE(np.nan_to_num(values) / largest)[..., :3] * 255  # [h, w, 3]
    grey = image.mean(axis=2, keepdims=True) * DARK
    covered = grey * (1 - COVER) + nearest(colours, size) * COVER
    there = nearest(known, size)[..., None]
    return boxed(np.where(there, covered, 255 - (255 - grey) * PALE).astype(np.uint8), values.shape, patch)


def boxed(image: np.ndarray, grid: tuple[int, int], patch: int) -> np.ndarray:
    """The image with a red box around a patch, which is large enough to be seen."""
    outer, inner = [], []
    for place, cells, pixels in zip(divmod(patch, grid[1]), grid, image.shape):
        centre, half = (place + 0.5) * pixels / cells, max(pixels / cells, BOX) / 2
        first, end = max(round(centre - half), 0), min(round(centre + half), pixels)
        outer.append(slice(first, end))
        inner.append(slice(first + LINE_WIDTH, end - LINE_WIDTH))
    drawn = image.copy()
    drawn[tuple(outer)] = RED
    drawn[tuple(inner)] = image[tuple(inner)]
    return drawn


def attention(
    ckpt: str, image: str, query: Sequence[str], layers: str = "", out: str = "", device: str = "auto"
) -> Path:
    """What points of an image attend to: a picture, its numbers beside it as .npz, and each layer's mean distance.

    The .npz holds `layers` (the names of those drawn), `queries` [Q, 2] (X, Y), for layer k of those drawn, from 1,
    `patches_k` [Q], row-major, and `map_k` float32 [Q, nh, h, w], which sum to 1 and are NaN outside of the patch's
    window, and of all layers `all_layers` and `distance_px` [layers, heads], the mean distance of attention on this
    image in pixels of the model's input, NaN where a layer has fewer heads.

    Args:
        ckpt: A run's folder, one of its checkpoints, or a weights file; of any task.
        image: An image file.
        query: Points "X,Y" in pixels of the image as it is stored, from its upper left corner.
        layers: "1,6,12", numbered from 1 over all blocks that have attention, or "all"; empty: the first, the middle
            and the last one that was trained.
        out: PNG file; empty: attention.png in the folder of `ckpt`.
        device: auto, CPU, GPU or Ascend.

    Returns:
        The path of the picture.

    Raises:
        UserError: A point lies outside, a layer does not exist, a file cannot be read, or the disk does not take one.
    """
    path = picture_path(out, ckpt, "attention.png")
    if not query:
        raise UserError("no point is named: expected --query X,Y in pixels of the image")
    if Path(image).is_dir():
        raise UserError(f"{image} is a folder, expected an image file")
    set_device(device)
    config, model, _ = restore(ckpt)
    picture = load_pictures([image], model.encoder, config.data, 1)[0]
    queries = [parse_query(text, picture) for text in query]
    reader = AttentionReader(model.encoder, 1)
    chosen = choose_layers(layers, reader.names)
    found = reader(picture.inputs[None])
    save(page_of(picture, queries, [found[k] for k in chosen]).figure(), path)
    distances = np.full((len(found), max(_heads(layer) for layer in found)), np.nan)
    for k, layer in enumerate(found):
        distances[k, : _heads(layer)] = layer.mean_distance()[0]
        print(f"{layer.name}: mean distance {np.nanmean(distances[k]):.1f} px")
    arrays = {"layers": np.array([found[k].name for k in chosen]), "queries": np.array(queries)}
    for number, layer in enumerate((found[k] for k in chosen), 1):
        patches = [query.patch(picture, layer.grid) for query in queries]
        arrays[f"patches_{number}"] = np.array(patches)
        arrays[f"map_{number}"] = np.stack([layer.map_of(0, patch) for patch in patches])
    arrays |= {"all_layers": np.array(reader.names), "distance_px": distances}
    numbers = path.with_suffix(".npz")
    save_arrays(numbers, arrays)
    print(f"attention on {picture.name}: {path}, numbers: {numbers}")
    return path
