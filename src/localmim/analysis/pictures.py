"""Pictures of a run: the loss curve, HOG as glyphs, and a sheet of images, masks, targets and reconstructions.

Drawn with matplotlib's Agg canvas on Figure objects of their own: no pyplot, no global state, no display.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from localmim.errors import UserError

DPI = 150
INK, FAINT = "#222222", "#8a8a8a"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f00", "#5e3c99")
GREY = 150  # of a hidden patch in the masked image
VISIBLE = 0.3  # what stays of a visible patch in a reconstruction, where nothing was supervised
VEIL_HOG, VEIL_PIXELS = 70.0, 255.0  # the grey level that it fades into
PANEL = 280  # shortest length of a panel's longer side, pixels
GLYPH = 8  # smallest side of a HOG cell, pixels


# --- loss curve -----------------------------------------------------------------------------------------------------


def loss_curve(metrics_jsonl_path: str, png_path: str, scale_names: Sequence[str] | None = None) -> Path:
    """Draws loss, loss a scale, and learning rate against the step.

    Args:
        metrics_jsonl_path: JSON lines; those with `step` and `loss` are drawn, and of them `loss_scales` (a list) and
            `lr` where present. Other lines are left out. Of two lines with one step the later counts.
        png_path: file to write; its folder is made.
        scale_names: legend of the entries of `loss_scales`; None: "scale 1", "scale 2", ...

    Returns:
        The path of the picture.

    Raises:
        UserError: the file is missing, has a line that is not JSON, or has no line with a loss.
    """
    records = _read_losses(Path(metrics_jsonl_path))
    steps = np.array(sorted(records))
    lines = [records[step] for step in steps]
    total = np.array([_number(line["loss"]) for line in lines])
    rates = np.array([_number(line.get("lr")) for line in lines])
    count = max(len(line.get("loss_scales") or []) for line in lines)
    scales = np.full((count, len(lines)), np.nan)  # [scales, steps]
    for i, line in enumerate(lines):
        for k, value in enumerate(line.get("loss_scales") or []):
            scales[k, i] = _number(value)
    if scale_names is None:
        scale_names = [f"scale {k + 1}" for k in range(count)]
    if len(scale_names) < count:
        raise UserError(f"{metrics_jsonl_path}: {count} losses a scale, but {len(scale_names)} names for them")

    figure = Figure(figsize=(11 if count else 6.5, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, 2 if count else 1, height_ratios=(3, 1))
    axes = figure.add_subplot(grid[0, 0])
    _curve(axes, steps, total, INK)
    cut = _zoom_on_late_part(axes, total[None])
    _style(axes, ("loss, sum over scales" if count else "loss") + cut)
    axes.tick_params(labelbottom=False)
    low = figure.add_subplot(grid[1, 0], sharex=axes)
    low.plot(steps, rates, color=INK, lw=1.4)
    low.set_ylim(bottom=0)
    low.yaxis.set_major_formatter("{x:.1e}")
    _style(low, "learning rate")
    low.set_xlabel("step", color=INK)
    if count:
        right = figure.add_subplot(grid[:, 1])
        for k in range(count):
            _curve(right, steps, scales[k], COLOURS[k % len(COLOURS)], scale_names[k])
        _style(right, "loss at each scale" + _zoom_on_late_part(right, scales))
        right.set_xlabel("step", color=INK)
        right.legend(frameon=False, fontsize=9, labelcolor=INK)
    return _save(figure, png_path)


def _zoom_on_late_part(axes, curves: np.ndarray) -> str:
    """Cuts off a steep start that would flatten all the rest; returns what to say of it in the title. [curves, n]"""
    late = curves[:, curves.shape[1] // 10 :]
    if not np.isfinite(late).any():
        return ""
    low, high = np.nanmin(late), np.nanmax(late)
    if high == low or np.nanmax(curves) < high + 2 * (high - low):
        return ""
    axes.set_ylim(low - 0.08 * (high - low), high + 0.25 * (high - low))
    return " (its start is above the picture)"


def _read_losses(path: Path) -> dict[int, dict]:
    """Records with a loss, by step."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), expected the metrics of a run") from None
    records = {}
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            raise UserError(f"{path}: line {number} is not JSON") from None
        if isinstance(line, dict) and "loss" in line and "step" in line:
            records[int(line["step"])] = line
    if not records:
        raise UserError(f"{path}: has no line with a step and a loss")
    return records


def _number(value) -> float:
    """The value as float; NaN, a gap in the curve, for null and for the strings that stand for non-finite numbers."""
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else math.nan


def _curve(axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str | None = None) -> None:
    """A smooth line over the faint raw one; a lone point is marked."""
    axes.plot(steps, values, color=colour, lw=0.8, alpha=0.25)
    axes.plot(steps, _smooth(values), color=colour, lw=1.8, label=label, marker="o" if len(steps) == 1 else None)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a thirtieth of the curve, cut off at both ends and blind to NaN."""
    half = len(values) // 60
    if half == 0:
        return values
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    centre = np.arange(len(values))
    first, stop = np.maximum(centre - half, 0), np.minimum(centre + half + 1, len(values))
    number = count[stop] - count[first]
    return np.where(number > 0, (total[stop] - total[first]) / np.maximum(number, 1), np.nan)


def _style(axes, title: str) -> None:
    """Title on the left, light grid, no box."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8.5, color=FAINT)
    axes.margins(x=0.01)


# --- HOG ------------------------------------------------------------------------------------------------------------


def hog_glyphs(hog: np.ndarray, cell_px: int) -> np.ndarray:
    """A picture of HOG: in each cell one stroke a bin, along the edges that the bin counts, as bright as it is strong.

    A bin b of n holds the pixels whose phase atan2(horizontal, vertical gradient) lies in [b, b + 1) * pi / n, modulo
    pi. The gradient then points along (sin, cos) of the phase (x right, y down), and the edge along (cos, -sin).

    Args:
        hog: float [h, w, C, nbins], normalised a cell and channel; strength is the mean over C, clipped to [0, 1].
        cell_px: side of a cell in the picture, in pixels.

    Returns:
        uint8 [h * cell_px, w * cell_px, 3].
    """
    h, w, _, nbins = hog.shape
    strength = np.clip(np.nan_to_num(hog).mean(axis=2), 0.0, 1.0)  # [h, w, nbins]
    offset = np.arange(cell_px) - (cell_px - 1) / 2
    x, y = offset[None, :], offset[:, None]
    half_width, half_length = max(0.5, 0.06 * cell_px), 0.46 * cell_px
    picture = np.zeros((h, w, cell_px, cell_px))
    for b in range(nbins):
        phase = (b + 0.5) * np.pi / nbins
        dx, dy = np.cos(phase), -np.sin(phase)
        across = np.clip(half_width + 0.5 - np.abs(y * dx - x * dy), 0, 1)  # share of the pixel under the stroke
        along = np.clip(half_length + 0.5 - np.abs(x * dx + y * dy), 0, 1)
        picture = np.maximum(picture, strength[..., b, None, None] * (across * along))
    picture = picture.transpose(0, 2, 1, 3).reshape(h * cell_px, w * cell_px)
    return np.repeat(np.rint(255 * picture).astype(np.uint8)[..., None], 3, axis=2)


# --- reconstructions ------------------------------------------------------------------------------------------------


def reconstruction_sheet(
    images: np.ndarray,
    masks: np.ndarray,
    targets: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    scale_names: Sequence[str],
    path: str,
) -> Path:
    """Draws one row an image: image, masked image, and for each scale the target and its reconstruction.

    A reconstruction shows the prediction in hidden cells and, faded, the target in visible ones, which no loss reads.
    A coarse cell that is hidden in part shows the prediction, clearer the more of it is hidden: its weight in the loss.

    Args:
        images: uint8 [N, H, W, 3].
        masks: [N, h, w], 1 = hidden.
        targets: a scale each, either HOG, float [N, hk, wk, C, nbins], or pixels, uint8 [N, Hk, Wk, 3]. The rows and
            columns are multiples of the mask's, or (HOG only) divide them.
        predictions: shaped as the targets; NaN where nothing was predicted; negative HOG is drawn as 0.
        scale_names: a column title a scale, such as "4 px cells".
        path: PNG file to write; its folder is made.

    Returns:
        The path of the picture.

    Raises:
        ValueError: the shapes do not fit.
    """
    images, masks = np.asarray(images), np.asarray(masks, np.float32)
    if not len(targets) == len(predictions) == len(scale_names):
        raise ValueError(f"{len(targets)} targets, {len(predictions)} predictions, {len(scale_names)} scale names")
    shares = []  # hidden share of each cell at each scale, [N, hk, wk]
    for name, target, prediction in zip(scale_names, targets, predictions):
        if target.shape != prediction.shape or target.ndim not in (4, 5) or len(target) != len(images):
            raise ValueError(f"{name}: target {target.shape} and prediction {prediction.shape} of {len(images)} images")
        shares.append(_mask_at(masks, target.shape[1:3]))

    rows, columns = len(images), 2 + 2 * len(targets)
    H, W = images.shape[1:3]
    least = max([PANEL, *(GLYPH * max(target.shape[1:3]) for target in targets if target.ndim == 5)])
    zoom = math.ceil(least / max(H, W))  # whole pixels of the picture for a pixel of the image: nothing is blurred
    height, width, side = zoom * H, zoom * W, zoom * max(H, W)  # of a panel, pixels, as all lengths below
    gap, wide_gap, head, foot = (round(share * side) for share in (0.03, 0.09, 0.25, 0.16))
    lefts = [gap + column * (width + gap) + (column // 2) * (wide_gap - gap) for column in range(columns)]
    tops = [head + row * (height + gap) for row in range(rows)]
    full_width, full_height = lefts[-1] + width + gap, tops[-1] + height + foot
    figure = Figure(figsize=(full_width / DPI, full_height / DPI), dpi=DPI)

    def write(x, y, text, size, **style):
        points = size * 0.06 * side * 72 / DPI
        figure.text(x / full_width, 1 - y / full_height, text, fontsize=points, color=INK, va="center", **style)

    def show(row, column, picture):
        bottom = full_height - tops[row] - height
        box = (lefts[column] / full_width, bottom / full_height, width / full_width, height / full_height)
        axes = figure.add_axes(box)
        axes.imshow(picture, interpolation="nearest", aspect="auto")
        axes.set_axis_off()

    for column, title in enumerate(["image", "masked", *(["target", "reconstruction"] * len(targets))]):
        write(lefts[column] + width / 2, 0.8 * head, title, 1.0, ha="center")
    for k, name in enumerate(scale_names):
        write(lefts[2 + 2 * k] + width + gap / 2, 0.36 * head, name, 1.2, ha="center", weight="bold")
    note = "reconstruction: prediction in hidden patches; visible patches (faded) repeat the target, no loss reads them"
    write(lefts[0], full_height - 0.5 * foot, note, 0.9)
    hidden = _mask_at(masks, (H, W))[..., None] > 0
    for row in range(rows):
        show(row, 0, images[row])
        show(row, 1, np.where(hidden[row], np.uint8(GREY), images[row]))
        for k, (target, prediction, share) in enumerate(zip(targets, predictions, shares)):
            truth, result = _pair(target[row], prediction[row], share[row], side)
            show(row, 2 + 2 * k, truth)
            show(row, 3 + 2 * k, result)
    return _save(figure, path)


def _pair(target: np.ndarray, prediction: np.ndarray, share: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of one target and its reconstruction, uint8 RGB; `share` [hk, wk] is how much of each cell is hidden."""
    clear = (VISIBLE + (1 - VISIBLE) * share)[..., None]  # [hk, wk, 1]
    hidden = share[..., None] > 0
    if target.ndim == 3:  # pixels [Hk, Wk, 3]
        merged, veil = np.where(hidden, prediction, target), VEIL_PIXELS
    else:  # HOG [hk, wk, C, nbins]
        cell_px = side // max(target.shape[:2])
        merged, veil = hog_glyphs(np.where(hidden[..., None], prediction, target), cell_px), VEIL_HOG
        target = hog_glyphs(target, cell_px)
        clear = np.repeat(np.repeat(clear, cell_px, 0), cell_px, 1)
    return target, np.rint(veil + clear * (merged - veil)).astype(np.uint8)


def _mask_at(masks: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Hidden share of each cell of another grid: [N, h, w] -> [N, *grid], by repetition or by mean."""
    for axis, size in zip((1, 2), grid):
        have = masks.shape[axis]
        if size % have == 0:
            masks = np.repeat(masks, size // have, axis)
        elif have % size == 0:
            shape = (*masks.shape[:axis], size, have // size, *masks.shape[axis + 1 :])
            masks = masks.reshape(shape).mean(axis + 1)
        else:
            raise ValueError(f"a mask of {have} patches does not fit a grid of {size} cells")
    return masks


def _save(figure: Figure, path: str | os.PathLike) -> Path:
    """Writes the figure as PNG and returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_figure(path, dpi=DPI, format="png", facecolor="white")
    return path
