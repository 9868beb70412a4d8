"""A page of panels and lines of text, pixel by pixel; text that has too little room is shortened in its middle."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from localmim.analysis.canvas import DPI

MARGIN, GAP, BLOCK = 24, 10, 30  # around the page; between panels; between images. Pixels, as all lengths here
LINE, POINTS = 26, 8.5  # height of a line of text; size of its letters


class Page:
    """A white page of a width, which grows downwards: panels pixel by pixel, and lines of text."""

    def __init__(self, width: int):
        self.width, self.height = width, 0
        self.panels: list[tuple[np.ndarray, int, int]] = []
        self.texts: list[tuple[str, float, float, dict]] = []
        self.renderer = FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()

    def skip(self, height: int) -> None:
        """Goes on so much further down."""
        self.height += height

    def paste(self, panel: np.ndarray, left: int) -> None:
        """A panel whose upper side is where the page ends now."""
        self.panels.append((panel, left, self.height))

    def write(self, text: str, left: int, room: int, colour: str, bold: bool = False, centred: bool = False) -> None:
        """A line of text where the page ends now, shortened in its middle until it has room."""
        text = " ".join(text.encode("utf-8", "replace").decode().split())  # a file's name may be any bytes
        text = self.shortened(text, room, bold)
        style = {"color": colour, "weight": "bold" if bold else "normal", "ha": "center" if centred else "left"}
        self.texts.append((text, left + room / 2 if centred else left, self.height + LINE / 2, style))

    def length(self, text: str, bold: bool = False) -> float:
        """Of a line of text."""
        font = FontProperties(size=POINTS, weight="bold" if bold else "normal")
        return self.renderer.get_text_width_height_descent(text, font, ismath=False)[0]

    def shortened(self, text: str, room: int, bold: bool = False) -> str:
        whole, keep = text, len(text)
        while keep > 1 and (length := self.length(text, bold)) > room:
            keep = min(keep - 1, math.ceil(keep * room / length))
            text = f"{whole[: (keep + 1) // 2]}…{whole[len(whole) - keep // 2 :]}"
        return text

    def wrapped(self, text: str, room: int) -> list[str]:
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and self.length(longer) > room:
                lines.append(word)
            else:
                lines[-1] = longer
        return lines

    def figure(self) -> Figure:
        page = np.full((self.height, self.width, 3), 255, np.uint8)
        for panel, left, top in self.panels:
            page[top : top + panel.shape[0], left : left + panel.shape[1]] = panel
        figure = Figure(figsize=(self.width / DPI, self.height / DPI), dpi=DPI)
        figure.figimage(page)
        for text, x, y, style in self.texts:
            x, y = x / self.width, 1 - y / self.height
            figure.text(x, y, text, va="center", fontsize=POINTS, parse_math=False, **style)
        return figure
