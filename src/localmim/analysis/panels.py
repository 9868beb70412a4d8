"""The figures of the report page: whatever was recorded against steps, and the numbers of each layer.

A figure holds nothing but curves and axes. Its title, notes and legend, with the last values, are text of the page.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence

from matplotlib.figure import Figure

from localmim.analysis.canvas import COLOURS, svg
from localmim.analysis.curves import Line, small_curves, small_layers
from localmim.analysis.history import layer_number
from localmim.analysis.markup import Html, tag
from localmim.analysis.pieces import figure, nothing, run_colours, swatch

EARLY = ("#b3cde3", "#6497b1")  # of the layers at a run's first snapshot, and at that in the middle


def curve_panels(numbers: Sequence[dict]) -> Html:
    """Loss, accuracy, speed and what else changes with the steps; `numbers` as for the page."""
    several = len(numbers) > 1
    panels = []

    def lines(key: str, factor: float = 1) -> list[Line]:
        """A curve a run."""
        return [
            Line(n["label"], colour, n["series"]["step"], [factor * y for y in n["series"][key]])
            for n, colour in zip(numbers, run_colours(len(numbers)))
        ]

    def add(title: str, curves: Sequence[Line], legend: bool = several, **options) -> None:
        curves = [line for line in curves if any(map(math.isfinite, line.y))]
        if curves:
            drawing, note = small_curves(curves, **options)
            panels.append(panel(title, drawing, note, curves if legend else []))

    kinds = [(n["task"], n["recipe"].get("target.kind") if n["task"] == "pretrain" else "") for n in numbers]
    for kind in dict.fromkeys(kinds):  # losses of two kinds cannot be compared
        title = "Loss" if len(set(kinds)) == 1 else " ".join(filter(None, ["Loss,", *map(str, kind)]))
        add(title, [line for line, own in zip(lines("loss"), kinds) if own == kind])
    for n in numbers:
        steps, parts, names = (n["series"][key] for key in ("step", "loss_parts", "loss_names"))
        curves = [Line(name, COLOURS[k % len(COLOURS)], steps, y) for k, (name, y) in enumerate(zip(names, parts))]
        add("Loss at each scale" + (f", {n['label']}" if several else ""), curves, legend=True)
    for name in dict.fromkeys(measure["name"] for n in numbers for measure in n["measures"]):
        curves = [
            Line(n["label"], colour, *zip(*measure["points"]))
            for n, colour in zip(numbers, run_colours(len(numbers)))
            for measure in n["measures"]
            if measure["name"] == name
        ]
        add(f"{name}, %", curves, smooth=False, marked=True, from_zero=True)
    add("Images a second", lines("images_per_s"), from_zero=True)
    add("Time spent waiting for images, %", lines("data_wait_share", 100), from_zero=True)
    add("Learning rate", lines("lr"), smooth=False, from_zero=True)
    add("Gradient norm", lines("grad_norm"))
    add("Loss scale", lines("loss_scale"), smooth=False, from_zero=True)
    if any(n["skipped"] for n in numbers):
        add("Skipped steps so far", lines("skipped"), smooth=False, from_zero=True)
    return tag("div", panels, class_="panels") if panels else nothing("None is recorded.")


def layer_panels(numbers: Sequence[dict]) -> Html | str:
    """Normalised mutual information and mean attention distance: one run over time, or the newest of several."""
    if len(numbers) == 1:
        found = numbers[0]["layers"]
        places = sorted({0, (len(found) - 1) // 2, len(found) - 1}) if found else []
        colours = [*EARLY, COLOURS[0]][3 - len(places) :]
        rows = [(f"step {found[i]['step']:,}", colour, found[i]) for i, colour in zip(places, colours)]
    else:
        colours = run_colours(len(numbers))
        rows = [(n["label"], colour, n["layers"][-1]) for n, colour in zip(numbers, colours) if n["layers"]]
    if not rows:
        return ""
    longest = max((row["layers"] for _, _, row in rows), key=len)
    alike = all(row["layers"] == longest[: len(row["layers"])] for _, _, row in rows)
    ticks = [layer_number(name) if alike else str(k + 1) for k, name in enumerate(longest)]
    panels = []
    for key, title, note in (
        ("nmi", "Mutual information of query and key", "Normalised: 0 when all queries attend alike, 1 at most."),
        ("distance_px", "Mean attention distance, pixels", "From a query patch to what it attends to."),
    ):
        lines = [Line(label, colour, range(1, len(row[key]) + 1), row[key]) for label, colour, row in rows]
        panels.append(panel(title, small_layers(lines, ticks), f"{note} The last layer's value:", lines))
    return tag("div", panels, class_="panels")


def panel(title: str, drawing: Figure, note: str, legend: Sequence[Line]) -> Html:
    """A figure with its title, a note, and what each colour means with its last value."""
    own = f"f{zlib.crc32(title.encode('utf-8', 'replace')):x}-"  # no two figures of a page have an id in common
    picture = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}", svg(drawing))
    opening = tag("svg", role="img", aria_label=title).removesuffix("></svg>")
    pieces = [tag("h3", title), Html(picture.replace("<svg", opening, 1))]
    if note:
        pieces.append(tag("p", note, class_="faint"))
    if legend:
        last = [next((y for y in reversed(line.y) if math.isfinite(y)), math.nan) for line in legend]
        items = [tag("li", swatch(line.colour), f"{line.label}: {figure(y, 3)}") for line, y in zip(legend, last)]
        pieces.append(tag("ul", items, class_="legend"))
    return tag("figure", *pieces, class_="panel")
