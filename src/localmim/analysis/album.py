"""The pictures of a report page: which snapshots it shows, and each picture as an address that holds the picture."""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from localmim.analysis.history import Drawing, Run, Snapshot
from localmim.data.sources import spread

MOST_SNAPSHOTS = 8  # of one run; of several as many together, but four of each where MOST_BYTES allow it
MOST_BYTES = 7_500_000  # of all pictures as they stand in the page
QUALITY = 80  # WebP: a fifth of the PNG's size, with letters and thin strokes still sharp


class Album:
    """The snapshots that the page shows of each run.

    Attributes:
        shown: A list of snapshots a run, oldest first: the newest, and evenly spread ones before it.
        said: What is left out, for the reader; empty: nothing.
    """

    def __init__(self, runs: Sequence[Run]):
        self.addresses: dict[Path, str] = {}
        for most in range(max(MOST_SNAPSHOTS // len(runs), 4), 0, -1):
            self.shown = [chosen(run.snapshots, most) for run in runs]
            self._encode([drawing.path for row in self.shown for snapshot in row for drawing in snapshot.drawings])
            if sum(map(len, self.addresses.values())) <= MOST_BYTES:
                break
        kept, there = sum(map(len, self.shown)), sum(len(run.snapshots) for run in runs)
        self.said = "" if kept == there else f"{kept} of {there} snapshots are shown"

    def address(self, drawing: Drawing) -> str:
        """The picture as a data: URI."""
        return self.addresses[drawing.path]

    def _encode(self, paths: Sequence[Path]) -> None:
        """All that is asked for, and nothing else, is in `addresses`."""
        missing = [path for path in paths if path not in self.addresses]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            found = dict(zip(missing, pool.map(encoded, missing)))
        self.addresses = {path: found.get(path) or self.addresses[path] for path in paths}


def chosen(snapshots: Sequence[Snapshot], most: int) -> list[Snapshot]:
    """At most so many, evenly spread, the last among them."""
    return [snapshots[i] for i in spread(len(snapshots), most)] if most > 1 else list(snapshots[-1:])


def encoded(path: Path) -> str:
    """A picture file as a WebP data: URI; as it is when it cannot be decoded."""
    content, kind = path.read_bytes(), "png"
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    if pixels is not None:
        content, kind = cv2.imencode(".webp", pixels, [cv2.IMWRITE_WEBP_QUALITY, QUALITY])[1].tobytes(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
