"""Reconstructions as a picture: a block an image, with a row of panels for each scale, all at the image's own aspect.

What is visible in an image is drawn from its own pixels, what is hidden from the model's, which are stretched with the
image.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
from matplotlib.colors import hsv_to_rgb

from localmim.analysis.canvas import FAINT, INK, save
from localmim.analysis.glyphs import hog_glyphs
from localmim.analysis.images import as_rgb, nearest, shown
from localmim.analysis.paper import BLOCK, GAP, LINE, MARGIN, Page

Kind = Literal["hog", "pixels", "codebook"]

PANEL = 264  # longer side of a panel, pixels, as all lengths here
SLOT = 120  # least width of a column, for its title
HIDDEN, PAPER, DARK = 150, 232, 22  # grey levels: of a hidden patch; where nothing is predicted; behind HOG
DIM, PALE = 0.45, 0.75  # how much of an image goes behind HOG; outside the windows that a model looks at


class Scale(NamedTuple):
    """Target and prediction of an image at one scale.

    Attributes:
        name: In words, as "block 2, 4 px cells".
        kind: What is predicted.
        target: HOG: histograms [hs, ws, C, nbins]. Pixels: the image at the model's size, [h, w, C] in [0, 1].
            Codebook: ids [hs, ws]. All are float32.
        prediction: The same of the prediction; NaN in cells of which nothing is hidden. A cell that is hidden in part
            is predicted as a whole. Predicted HOG may be below 0, pixels outside [0, 1].
        normalised: Cells of pixels are predicted without their mean and deviation, and have those of the image here.
    """

    name: str
    kind: Kind
    target: np.ndarray
    prediction: np.ndarray
    normalised: bool = False


class Reconstruction(NamedTuple):
    """What a model makes of an image under one mask.

    Attributes:
        name: Of the image.
        pixels: As it is stored, uint8 [H, W, C], or float32 in [0, 1].
        mask: float32 [h, w] on the encoder's grid: 1 hidden, 0 visible, NaN outside the windows that are looked at.
        scales: From the lowest tap to the highest, the same for all images of a model.
    """

    name: str
    pixels: np.ndarray
    mask: np.ndarray
    scales: list[Scale]


def draw(reconstructions: Sequence[Reconstruction], path: str | Path) -> Path:
    """Writes reconstructions of one model as one PNG; up to about 8 images are looked at with ease.

    With one scale there is a row an image: the image, what is visible of it, target, prediction, and both together.
    With several there is such a row a scale, and the image and what is visible of it stand one above the other.

    Returns:
        The path of the picture.

    Raises:
        UserError: The disk does not take it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a letter that no font here has is drawn as a box
        return save(_sheet(reconstructions).figure(), path)


def _sheet(reconstructions: Sequence[Reconstruction]) -> Page:
    several = len(reconstructions[0].scales) > 1
    blocks = [_panels(found) for found in reconstructions]
    titles = [title for title in blocks[0][0] if not (several and title == "masked")]
    slot = max(SLOT, *(rows[0]["input"].shape[1] for rows in blocks))
    lefts = [MARGIN + column * (slot + GAP) for column in range(len(titles))]
    page = Page(lefts[-1] + slot + MARGIN)
    room = page.width - 2 * MARGIN

    def header():
        for left, title in zip(lefts, titles):
            page.write(title, left, slot, FAINT, centred=True)
        page.skip(LINE)

    page.skip(MARGIN)
    if not several:
        header()
    for number, (found, rows) in enumerate(zip(reconstructions, blocks)):
        page.skip(BLOCK if number else 0)
        page.write(found.name, MARGIN, room, INK, bold=several)
        page.skip(LINE)
        if several:
            header()
        for k, (scale, panels) in enumerate(zip(found.scales, rows)):
            if several:
                page.write(scale.name, lefts[1], page.width - MARGIN - lefts[1], INK)
                if k == 1:
                    page.write("masked", lefts[0], slot, FAINT, centred=True)
                page.skip(LINE)
            for left, title in zip(lefts, titles):
                if several and title == "input":  # in its column stands what is masked, and then nothing
                    title = ("input", "masked", "")[min(k, 2)]
                if title:
                    page.paste(panels[title], left + (slot - panels[title].shape[1]) // 2)
            page.skip(len(panels["input"]) + GAP)
    page.skip(GAP)
    for line in page.wrapped(_legend(reconstructions[0]), room):
        page.write(line, MARGIN, room, FAINT)
        page.skip(LINE)
    page.skip(MARGIN - GAP)
    return page


def _legend(found: Reconstruction) -> str:
    """What the panels show, in words."""
    scale = found.scales[0]
    said = [f"{scale.name[:1].upper()}{scale.name[1:]}."] if len(found.scales) == 1 else []
    if scale.kind == "hog":
        said.append("Strokes lie along the edges that HOG counts, the brighter the more it does.")
        said.append("An even star: no direction more than another.")
    if scale.kind == "codebook":
        said.append("Each entry of the codebook has a colour.")
    said.append("Prediction: hidden cells alone, since no loss reads the others.")
    if scale.normalised:
        said.append("Each has the mean and the deviation of its pixels in the image, which are not predicted.")
    said.append("Pasted: the image where it is visible, the prediction where it is hidden.")
    if np.isnan(found.mask).any():
        said.append("Pale: outside the windows that the model looks at.")
    return " ".join(said)


def _panels(found: Reconstruction) -> list[dict[str, np.ndarray]]:
    """The panels of each scale by their titles, in order, uint8 [H, W, 3] at the image's aspect."""
    image = shown(found.pixels, PANEL)
    mask = nearest(found.mask, image.shape[:2])[..., None]  # [H, W, 1]
    pale = (image + (255 - image.astype(np.float32)) * PALE).astype(np.uint8)
    seen, hidden = np.where(np.isnan(mask), pale, image), mask > 0
    grey = as_rgb(image.mean(axis=2, keepdims=True) * DIM / 255)
    rows = []
    for scale in found.scales:
        panels = {"input": image, "masked": np.where(hidden, np.uint8(HIDDEN), seen)}
        if scale.kind != "pixels":
            panels["target"], _ = _picture(scale.kind, scale.target, grey)
        drawn, known = _picture(scale.kind, scale.prediction, np.full_like(image, DARK))
        panels["prediction"] = np.where(known, drawn, np.uint8(PAPER))
        panels["pasted"] = np.where(hidden, drawn, seen)
        rows.append(panels)
    return rows


def _picture(kind: Kind, values: np.ndarray, behind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of a scale in the size of `behind`, over it if they are HOG: uint8 [H, W, 3], and bool [H, W, 1] where
    there are any."""
    size = behind.shape[:2]
    known = ~np.isnan(values.reshape(*values.shape[:2], -1)[..., 0])
    there = nearest(known, size)[..., None]
    if kind == "pixels":
        return _stretched(as_rgb(np.nan_to_num(values)), known, size), there
    if kind == "codebook":
        return nearest(palette(np.nan_to_num(values)), size), there
    strokes = hog_glyphs(values, size)[..., None]
    return np.rint(behind + strokes * (255.0 - behind)).astype(np.uint8), there


def palette(ids: np.ndarray) -> np.ndarray:
    """Ids of a codebook as colours, the same for the same id: [h, w] -> uint8 [h, w, 3]."""
    ids = ids.astype(np.int64)
    hue, saturation, value = ids * 0.618034 % 1, 0.45 + ids // 4 % 3 * 0.2, 0.55 + ids % 4 * 0.14
    return np.rint(255 * hsv_to_rgb(np.stack([hue, saturation, value], axis=-1))).astype(np.uint8)


def _stretched(pixels: np.ndarray, known: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image uint8 [h, w, 3] in another size; what is not known [h, w] is 0 in it, and colours nothing."""
    shrunk = size[0] * size[1] < known.size
    options = {"dsize": size[::-1], "interpolation": cv2.INTER_AREA if shrunk else cv2.INTER_LINEAR}
    weight = cv2.resize(known.astype(np.float32), **options)[..., None]
    sums = cv2.resize(pixels.astype(np.float32), **options)
    return np.rint(sums / np.maximum(weight, 1e-6)).clip(0, 255).astype(np.uint8)
