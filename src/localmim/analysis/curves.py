"""Curves: loss, its parts and the learning rate of a run against steps; small ones of anything for a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from localmim.analysis.canvas import COLOURS, INK, save, style
from localmim.analysis.history import number
from localmim.errors import UserError

SMALL = (3.5, 2.4)  # inches: about as wide as a phone


def loss_curve(records: Sequence[dict], png_path: str | Path, scale_names: Sequence[str] = ()) -> Path:
    """Draws loss, loss a scale, and learning rate against the step.

    Args:
        records: Of a run, by step (history.read_run); those with a loss are drawn, and of them `loss_scales` (a list)
            and `lr` where present.
        png_path: File to write; its folder is made.
        scale_names: Legend of the entries of `loss_scales`; where they are fewer: "scale 1", "scale 2", ...

    Returns:
        The path of the picture.

    Raises:
        UserError: No record has a loss.
    """
    lines = [record for record in records if "loss" in record]
    if not lines:
        raise UserError("none of the run's records has a loss")
    steps = np.array([line["step"] for line in lines])
    total = np.array([_number(line["loss"]) for line in lines])
    rates = np.array([_number(line.get("lr")) for line in lines])
    parts = [line.get("loss_scales") for line in lines]
    parts = [part if isinstance(part, list) else [] for part in parts]
    count = max(map(len, parts))
    scales = np.full((count, len(lines)), np.nan)  # [scales, steps]
    for i, part in enumerate(parts):
        scales[: len(part), i] = [_number(value) for value in part]
    if len(scale_names) < count:
        scale_names = [f"scale {k + 1}" for k in range(count)]

    figure = Figure(figsize=(11 if count else 6.5, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, 2 if count else 1, height_ratios=(3, 1))
    axes = figure.add_subplot(grid[0, 0])
    _curve(axes, steps, total, INK)
    cut = _zoom_on_late_part(axes, total[None])
    style(axes, ("loss, sum over scales" if count else "loss") + cut)
    axes.tick_params(labelbottom=False)
    low = figure.add_subplot(grid[1, 0], sharex=axes)
    low.plot(steps, rates, color=INK, lw=1.4)
    low.set_ylim(bottom=0)
    low.yaxis.set_major_formatter("{x:.1e}")
    style(low, "learning rate")
    low.set_xlabel("step", color=INK)
    if count:
        right = figure.add_subplot(grid[:, 1])
        for k in range(count):
            _curve(right, steps, scales[k], COLOURS[k % len(COLOURS)], scale_names[k])
        style(right, "loss at each scale" + _zoom_on_late_part(right, scales))
        right.set_xlabel("step", color=INK)
        right.legend(frameon=False, fontsize=9, labelcolor=INK)
    return save(figure, png_path)


class Line(NamedTuple):
    """One curve of a figure; values that are not finite are gaps."""

    label: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]


def small_curves(
    lines: Sequence[Line], smooth: bool = True, from_zero: bool = False, marked: bool = False
) -> tuple[Figure, str]:
    """Curves against steps, in a figure that is legible on a phone: title and legend stand in the page around it.

    Args:
        lines: At least one, each with a finite value.
        smooth: Draw a smooth curve over the faint raw one.
        from_zero: Begin the axis at zero; otherwise a steep start is cut off.
        marked: Mark each point.

    Returns:
        The figure, and what to say of it.
    """
    figure = Figure(figsize=SMALL, layout="constrained", facecolor="none")
    axes = figure.add_subplot()
    note = ""
    for line in lines:
        x, y = np.array(line.x), np.array([_number(value) for value in line.y])
        if smooth:
            _curve(axes, x, y, line.colour)
        else:
            lone = marked or len(x) == 1
            axes.plot(x, y, color=line.colour, lw=1.8, marker="o" if lone else None, ms=3.5)
    if from_zero:
        _begin_at_zero(axes, lines)
    else:
        width = max(len(line.y) for line in lines)
        values = [[_number(v) for v in line.y] + [math.nan] * (width - len(line.y)) for line in lines]
        note = "The start is above the picture." if _zoom_on_late_part(axes, np.array(values)) else ""
    _small_style(axes, "step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)
    axes.yaxis.get_offset_text().set_size(9.5)
    return figure, note


def small_layers(lines: Sequence[Line], ticks: Sequence[str]) -> Figure:
    """Values of each layer, numbered from 1 in `x` and named by `ticks`, in a figure as `small_curves` makes."""
    figure = Figure(figsize=SMALL, layout="constrained", facecolor="none")
    axes = figure.add_subplot()
    for line in lines:
        axes.plot(line.x, [_number(value) for value in line.y], color=line.colour, lw=1.8, marker="o", ms=3.5)
    _begin_at_zero(axes, lines)
    _small_style(axes, "layer")
    every = math.ceil(len(ticks) / 12)
    axes.set_xticks(range(1, len(ticks) + 1, every), ticks[::every])
    return figure


def _begin_at_zero(axes, lines: Sequence[Line]) -> None:
    highest = max((y for line in lines for y in map(_number, line.y) if not math.isnan(y)), default=0)
    axes.set_ylim(0, 1.06 * highest or 1)


def _small_style(axes, below: str) -> None:
    style(axes, "")
    axes.tick_params(labelsize=9.5)
    axes.set_xlabel(below, color=INK, fontsize=9.5)
    axes.margins(x=0.03)


def _zoom_on_late_part(axes, curves: np.ndarray) -> str:
    """Cuts off steep starts that would flatten all the rest; returns what to say of it in the title. [curves, n]

    The start is the first tenth of each curve.
    """
    finite = [curve[np.isfinite(curve)] for curve in curves]
    late = np.concatenate([curve[len(curve) // 10 :] for curve in finite])
    if not len(late):
        return ""
    low, high = late.min(), late.max()
    if high == low or np.nanmax(curves) < high + 2 * (high - low):
        return ""
    axes.set_ylim(low - 0.08 * (high - low), high + 0.25 * (high - low))
    return " (its start is above the picture)"


def _number(value) -> float:
    """A recorded number; NaN, a gap in the curve, for all that is not finite."""
    found = number(value)
    return found if math.isfinite(found) else math.nan


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
