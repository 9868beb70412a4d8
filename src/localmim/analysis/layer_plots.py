"""Numbers of every layer as curves, models side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from localmim.analysis.canvas import COLOURS, FAINT, INK, save, style

STAGE = {  # how the name of a stage stands below the axis
    "xycoords": ("data", "axes fraction"),
    "xytext": (0, -18),
    "textcoords": "offset points",
    "ha": "center",
    "va": "top",
    "fontsize": 8.5,
    "color": FAINT,
}


def draw_numbers(runs: Sequence[Mapping], path: str | Path) -> Path:
    """Writes mutual information and mean distance against layers, models side by side, as a PNG.

    Means over heads are lines, heads are dots. Where all models have the same stages, these are told apart.

    Args:
        runs: Each has a `label` and what `information.layer_numbers` gives.

    Returns:
        The path of the picture.

    Raises:
        UserError: The disk does not take it.
    """
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    longest = max((run["layers"] for run in runs), key=len)
    alike = all(run["layers"] == longest[: len(run["layers"])] for run in runs)
    titles = {"nmi": "normalised mutual information of query and key", "distance_px": "mean attention distance, pixels"}
    for place, (key, title) in enumerate(titles.items()):
        axes = figure.add_subplot(1, 2, 1 + place)
        for run, colour in zip(runs, cycle(COLOURS)):
            for x, heads in enumerate(run[key], 1):
                axes.plot([x] * len(heads), heads, ".", color=colour, ms=5, alpha=0.3, mew=0)
            means = [np.mean(heads) for heads in run[key]]
            axes.plot(range(1, len(means) + 1), means, "o-", color=colour, lw=1.8, ms=4, label=run["label"])
        style(axes, title)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.03)
        _name_layers(axes, longest if alike else [f"layer {k + 1}" for k in range(len(longest))])
        if place == 0:
            axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return save(figure, path)


def _name_layers(axes: Axes, names: Sequence[str]) -> None:
    """Ticks for layers such as "block 3", or "stage 2, block 1": then stages are told apart."""
    every = math.ceil(len(names) / 24)
    places = range(1, len(names) + 1)
    axes.set_xticks(places[::every], [name.split()[-1] for name in names[::every]])
    axes.grid(visible=False, axis="x")
    stages = [name.split(", ")[0] for name in names] if "," in names[0] else []
    for stage in dict.fromkeys(stages):
        first = stages.index(stage) + 1
        axes.annotate(stage, ((first + first + stages.count(stage) - 1) / 2, 0), **STAGE)
        if first > 1:
            axes.axvline(first - 0.5, color=FAINT, lw=0.7, ls=":")
    axes.set_xlabel("block in its stage" if stages else names[0].split()[0], color=INK, labelpad=16 if stages else 4)
