"""How pictures are drawn: matplotlib's Figure objects by themselves, no pyplot, no global state, no display."""

from __future__ import annotations

import io
import os
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from localmim.errors import UserError
from localmim.files import replaced

DPI = 150
INK, FAINT = "#222222", "#8a8a8a"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f00", "#5e3c99")


def picture_path(out: str, of: str, name: str) -> Path:
    """Where a picture goes: `out`, or `name` in the folder `of`, or in that of the file `of`.

    Raises:
        UserError: `out` is no .png file.
    """
    path = Path(out) if out else (Path(of) if Path(of).is_dir() else Path(of).parent) / name
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"--out is {path}, expected a file that ends in .png")
    return path


def style(axes: Axes, title: str) -> None:
    """Title on the left, light grid, no box."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8.5, color=FAINT)
    axes.margins(x=0.01)


def save(figure: Figure, path: str | os.PathLike) -> Path:
    """Writes the figure as PNG, whole or not at all, makes its folder, and returns its path.

    Raises:
        UserError: The disk does not take it.
    """
    path = Path(path)
    with replaced(path) as aside:
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_figure(aside, dpi=DPI, format="png", facecolor="white")
    return path


def svg(figure: Figure) -> str:
    """The figure as an <svg> element to stand in a page; its letters are drawn, so they need no font."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "localmim"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
