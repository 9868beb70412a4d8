"""How a step's time and memory grow with batch, image size and depth, beside the law that each should follow.

    python benchmarks/growth.py [--config FILE] [--only batch|size|depth] [--save FILE] [--out FILE] [--key value]

Each point is a process of its own, which compiles the recipe's step and makes a few: the median step, and the peak
memory of the process, compiling and MindSpore itself with it. Laws are affine, a + b x: a is what each step has to do
however small it is, the update of all weights and the start of some thousand kernels; x is the batch, the depth, and
for the image size the operations, or bytes, of the matrix products that the compiled graph counts
(benchmarks/floor.py). A law is fitted to the smaller points; a larger one that lies more than 25 % above it ends the
command with 1.

Prints Markdown, and with `--out` draws time and memory on logarithmic axes. `--save` keeps points in a JSON file as
they are measured; those in it are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import floor
import kernels
from step_time import Side, ours, serve

RECIPE = "config/pretrain/localmim_vit_small_hog.yaml"
MARGIN = 1.25
WARM = 2


class Axis(NamedTuple):
    """What grows.

    Attributes:
        name: In words.
        values: From small to large.
        arguments: A value -> (recipe overrides, batch).
        laws: For time and memory: the key of a point that x is, and what that is in words.
    """

    name: str
    values: tuple[int, ...]
    arguments: Callable[[int], tuple[list[str], int]]
    laws: dict[str, tuple[str, str]]


def _by(key: str, words: str) -> dict[str, tuple[str, str]]:
    return {"step_s": (key, words), "peak_rss_mb": (key, words)}


AXES = {
    "batch": Axis("batch, 224 px", (1, 2, 4, 8, 16, 32), lambda n: ([], n), _by("value", "a + b x batch")),
    "size": Axis(
        "image side in pixels, batch 4",
        (128, 160, 224, 320, 448),
        lambda n: (["--model.image_size", str(n)], 4),
        {"step_s": ("gflop", "a + b x operations"), "peak_rss_mb": ("gbyte", "a + b x bytes")},
    ),
    "depth": Axis(
        "blocks, batch 4, 224 px",
        (7, 9, 12, 16, 20, 24),
        lambda n: (["--model.depth", str(n)], 4),
        _by("value", "a + b x blocks"),
    ),
}
MEASURES = {"step_s": "s a step", "peak_rss_mb": "peak MB"}


class Law(NamedTuple):
    """y = a + b x."""

    a: float
    b: float

    def __call__(self, x: float) -> float:
        return self.a + self.b * x


def fit(xs: Sequence[float], ys: Sequence[float]) -> Law:
    """The affine law with a >= 0 and b >= 0 whose relative errors have the least squares; y > 0.

    Raises:
        ValueError: Fewer than two points.
    """
    if len(xs) < 2:
        raise ValueError(f"{len(xs)} point, expected at least 2 to fit a line")

    # In u = 1/y and v = x/y: minimise the sum of (a u + b v - 1)^2.
    u, v = [1 / y for y in ys], [x / y for x, y in zip(xs, ys)]
    uu, uv, vv = (sum(p * q for p, q in zip(*pair)) for pair in ((u, u), (u, v), (v, v)))
    only_a, only_b = Law(sum(u) / uu, 0.0), Law(0.0, sum(v) / vv)
    determinant = uu * vv - uv * uv
    if determinant <= 1e-12 * uu * vv:  # all x alike
        return only_a
    law = Law((sum(u) * vv - sum(v) * uv) / determinant, (sum(v) * uu - sum(u) * uv) / determinant)
    if law.a < 0:
        return only_b
    return only_a if law.b < 0 else law


def smaller(count: int) -> int:
    """How many of the points a law is fitted to: half of them, and one more of an odd number."""
    return (count + 1) // 2


def laws(axis: Axis, points: Sequence[dict]) -> dict[str, Law]:
    """The law of each measure, from the smaller points."""
    few = points[: smaller(len(points))]
    return {m: fit([p[axis.laws[m][0]] for p in few], [p[m] for p in few]) for m in MEASURES}


def too_fast(axis: Axis, points: Sequence[dict]) -> list[str]:
    """The larger points that lie too far above their law, in words."""
    found, fitted = [], laws(axis, points)
    for point in points[smaller(len(points)) :]:
        for m, law in fitted.items():
            ratio = point[m] / law(point[axis.laws[m][0]])
            if ratio > MARGIN:
                found.append(f"{axis.name}: {point['value']} takes {ratio:.2f} times the {MEASURES[m]} of its law")
    return found


def measure(config: str, rest: Sequence[str], axis: Axis, value: int, steps: int) -> dict:
    """One point, in a process of its own."""
    more, batch_size = axis.arguments(value)
    with tempfile.TemporaryDirectory() as graphs:
        side = Side(serve, ours, ["--config", config, *rest, *more], batch_size, "CPU", graphs)
        work = floor.work(kernels.read(graphs))
    for i in range(WARM + steps):
        side.turn(keep=i >= WARM)
    summary = side.summary(batch_size)
    side.process.join()
    return {
        "value": value,
        "step_s": summary["step_s"],
        "peak_rss_mb": summary["peak_rss_mb"],
        "compile_s": summary["compile_s"],
        "gflop": round(work.operations / 1e9, 2),
        "gbyte": round(work.pass_bytes / 1e9, 4),
    }


def table(axis: Axis, points: Sequence[dict]) -> str:
    """The points of an axis as Markdown; what each measure is by its law follows it, 1.00 where it is as expected."""
    fitted = laws(axis, points)
    lines = [
        f"| {axis.name} | s a step | by its law | peak MB | by its law | compile s | GFLOP | GB of products |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for i, p in enumerate(points):
        by = {m: f"{p[m] / law(p[axis.laws[m][0]]):.2f}" for m, law in fitted.items()}
        mark = "" if i >= smaller(len(points)) else " (fitted)"
        lines.append(
            f"| {p['value']}{mark} | {p['step_s']:.3f} | {by['step_s']} | {p['peak_rss_mb']} | {by['peak_rss_mb']} "
            f"| {p['compile_s']:.0f} | {p['gflop']:.1f} | {p['gbyte']:.2f} |"
        )
    return "\n".join(lines)


def draw(found: dict[str, list[dict]], path: Path) -> None:
    """Time above, memory below, an axis a column; full dots are what the laws are fitted to."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

    from localmim.analysis.canvas import COLOURS, DPI, FAINT, style
    from localmim.files import replaced

    figure = Figure(figsize=(3.1 * len(found), 5.2), layout="constrained")
    panels = figure.subplots(2, len(found), squeeze=False)
    for column, (name, points) in enumerate(found.items()):
        axis, fitted = AXES[name], laws(AXES[name], points)
        values = [p["value"] for p in points]
        few = smaller(len(points))
        for row, (m, words) in enumerate(MEASURES.items()):
            axes, colour = panels[row, column], COLOURS[row]
            style(axes, f"{words}" if column == 0 else "")
            axes.set_xscale("log")
            axes.set_yscale("log")
            law = [fitted[m](p[axis.laws[m][0]]) for p in points]
            axes.plot(values, law, color=FAINT, lw=1.2, zorder=1, label=axis.laws[m][1])
            axes.plot(values[:few], [p[m] for p in points[:few]], "o", color=colour, ms=5.5)
            axes.plot(values[few:], [p[m] for p in points[few:]], "o", color=colour, ms=5.5, mfc="white", mew=1.4)
            axes.margins(x=0.06, y=0.08)
            axes.xaxis.set(major_locator=FixedLocator(values), minor_locator=NullLocator())
            axes.xaxis.set_major_formatter(ScalarFormatter())
            low, high = axes.get_ylim()
            ticks = [n * 10.0**k for k in range(-3, 7) for n in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7)]
            axes.yaxis.set(major_locator=FixedLocator([tick for tick in ticks if low <= tick <= high]))
            axes.yaxis.set(minor_locator=NullLocator(), minor_formatter=NullFormatter())
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.legend(frameon=False, fontsize=8, loc="upper left")
        panels[1, column].set_xlabel(axis.name, fontsize=9)
    with replaced(path) as aside:
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_figure(aside, dpi=DPI, format=path.suffix[1:], facecolor="white")


def main(argv: list[str]) -> None:
    """Measures, prints, draws; RunError where something grows faster than its law."""
    from localmim.config import load_config
    from localmim.errors import RunError, UserError
    from localmim.files import replace_text

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=RECIPE)
    parser.add_argument("--only", choices=AXES, help="one axis; without it all")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--out", type=Path)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.out and arguments.out.suffix not in (".png", ".webp"):
        raise UserError(f"--out is {arguments.out}, expected a file that ends in .png or .webp")
    load_config(["--config", arguments.config, *rest])
    saved = {"config": arguments.config, "overrides": rest, "points": {}}
    if arguments.save and arguments.save.exists():
        known = json.loads(arguments.save.read_text("utf-8"))
        if any(known.get(key) != saved[key] for key in ("config", "overrides")):
            raise UserError(f"--save {arguments.save} holds points of {known.get('config')} {known.get('overrides')}")
        saved = known
    found = {}
    for name in [arguments.only] if arguments.only else AXES:
        points = saved["points"].setdefault(name, {})
        for value in AXES[name].values:
            if str(value) not in points:
                points[str(value)] = measure(arguments.config, rest, AXES[name], value, arguments.steps)
                if arguments.save:
                    replace_text(arguments.save, json.dumps(saved, indent=1) + "\n")
        found[name] = [points[str(value)] for value in AXES[name].values]
    print("\n\n".join(table(AXES[name], points) for name, points in found.items()))
    if arguments.out:
        draw(found, arguments.out)
    faster = [line for name, points in found.items() for line in too_fast(AXES[name], points)]
    if faster:
        raise RunError(f"grows faster than its law: {'; '.join(faster)}")


if __name__ == "__main__":
    from localmim import cli

    os.environ.setdefault("GLOG_v", "3")
    sys.exit(cli.run(main))
