"""What a run's folder tells of the run, without its model: read forgivingly, and what could not be read is named.

A run may be on its way, may have been killed in the middle of a line, or come from a version that kept less. Only a
folder that has no step at all is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import yaml

from localmim.errors import UserError
from localmim.training.environment import ENVIRONMENT
from localmim.training.runlog import METRICS

REPORT, SNAPSHOT = "report", "snapshot.json"  # RUN/report/step_00000200/snapshot.json
PAGE = "report.html"
PNG_BEGIN, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def snapshot_path(run: Path, step: int) -> Path:
    """Where the snapshot of a run after a step is."""
    return run / REPORT / f"step_{step:08d}"


def drop_snapshots(run: Path, after: int) -> None:
    """Removes those after a step: a run that goes on from there makes them anew, and another one has its own.

    What a kill has left half made goes as well.
    """
    last = snapshot_path(run, after).name
    late = [path for path in (run / REPORT).glob("step_*") if path.name > last]
    for path in [*late, *(run / REPORT).glob(".step_*")]:
        shutil.rmtree(path, ignore_errors=True)


class Drawing(NamedTuple):
    """A picture out of a snapshot; `name` is the image that it shows."""

    name: str
    path: Path
    caption: str
    width: int  # pixels
    height: int


class LayerNumbers(NamedTuple):
    """Numbers of each layer's attention, a list of heads a layer."""

    layers: list[str]
    nmi: list[list[float]]
    distance_px: list[list[float]]


@dataclass
class Snapshot:
    """What was kept of a run after one of its steps."""

    step: int
    reconstructions: list[Drawing] = field(default_factory=list)
    attention: list[Drawing] = field(default_factory=list)
    numbers: LayerNumbers | None = None
    loss_names: list[str] = field(default_factory=list)
    without: str = ""  # why there are no reconstructions

    @property
    def drawings(self) -> list[Drawing]:
        return self.reconstructions + self.attention


@dataclass
class Run:
    """A run as its folder shows it. What is not recorded is empty.

    Attributes:
        folder: As the user named it.
        label: Short name; no two runs of a report have the same.
        recipe: The resolved recipe.
        records: Lines of metrics.jsonl by step, at least one.
        sessions: environment.json: one for each time that the run was started.
        snapshots: By step.
        evaluations: eval_*.json by step, each with its "file".
        notes: What is damaged, one line each.
    """

    folder: Path
    label: str
    recipe: dict
    records: list[dict]
    sessions: list[dict]
    snapshots: list[Snapshot]
    evaluations: list[dict]
    notes: list[str]

    def values(self, key: str) -> list[float]:
        """One number a record; NaN where it has none."""
        return [number(record.get(key)) for record in self.records]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Several runs, told apart by their labels.

    Raises:
        UserError: No run, one named twice, a folder that is none, or one that has not made a step.
    """
    if not folders:
        raise UserError("no run is named: expected at least one run's folder")
    places = [Path(folder).expanduser().resolve() for folder in folders]
    for folder, place in zip(folders, places):
        if places.count(place) > 1:
            raise UserError(f"{folder} is named twice: expected different runs")
    return [read_run(folder, label) for folder, label in zip(folders, labels(places))]


def labels(places: Sequence[Path]) -> list[str]:
    """The last part of each path, and as many before it as make all of them differ."""
    for count in range(1, max(len(place.parts) for place in places)):
        names = ["/".join(place.parts[-count:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def read_run(folder: str | Path, label: str) -> Run:
    """One run.

    Raises:
        UserError: The folder is no run, or it has not made a step.
    """
    folder = Path(folder).expanduser()
    notes: list[str] = []
    records = _read_records(folder, notes)
    recipe = _read_recipe(folder / "config.yaml", notes)
    sessions = _read_json(folder / ENVIRONMENT, list, notes) or []
    paths = sorted((folder / REPORT).glob(f"step_*/{SNAPSHOT}"))
    snapshots = [snapshot for path in paths if (snapshot := _read_snapshot(path, notes))]
    evaluations = []
    for path in sorted(folder.glob("eval_*.json")):
        if result := _read_json(path, dict, notes):
            evaluations.append({**result, "file": path.name})
    evaluations.sort(key=lambda result: (number(result.get("step")), result["file"]))
    return Run(
        folder, label, recipe, records, [session for session in sessions if isinstance(session, dict)],
        sorted(snapshots, key=lambda snapshot: snapshot.step), evaluations, notes,
    )  # fmt: skip


def number(value) -> float:
    """A recorded number, also one that stands as "nan" or "inf"; NaN for anything else."""
    if isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def date(seconds: float) -> str:
    """Seconds since 1970 as date and time of day, UTC; empty when they are none."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return ""


def _read_records(folder: Path, notes: list[str]) -> list[dict]:
    try:
        lines = (folder / METRICS).read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is no run: it holds no {METRICS}") from None
    except OSError as error:
        raise UserError(f"{folder / METRICS} cannot be read: {error.strerror}") from error
    records, strange = {}, 0
    for line in lines:
        try:
            record = json.loads(line)
            step = record["step"]
            if type(step) is not int or not 0 < step < 2**53:
                raise ValueError
            records[step] = record
        except (ValueError, KeyError, TypeError, RecursionError):
            strange += bool(line.strip())
    if strange:
        notes.append(f"{METRICS}: {strange} of {len(lines)} lines are no record of a step and are left out")
    if not records:
        raise UserError(f"{folder / METRICS} holds no step yet: expected a run that has made one")
    return [records[step] for step in sorted(records)]


def _read_recipe(path: Path, notes: list[str]) -> dict:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        recipe = None
    if not isinstance(recipe, dict):
        notes.append(f"{path.name} is no recipe and is left out")
        return {}
    return recipe


def _read_json(path: Path, kind: type, notes: list[str]):
    """The value of a file, which must be of a kind; None when there is no such file, or with a note."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        value = None
    if isinstance(value, kind):
        return value
    notes.append(f"{path.name} is damaged and is left out")
    return None


def _read_snapshot(path: Path, notes: list[str]) -> Snapshot | None:
    own: list[str] = []  # notes of this snapshot, to be told with its folder's name
    values = _read_json(path, dict, own)
    snapshot = None
    if values is not None:
        step = number(values.get("step", path.parent.name.removeprefix("step_")))
        if math.isfinite(step):
            snapshot = Snapshot(int(step))
            snapshot.reconstructions = _drawings(path.parent, values.get("reconstructions"), own)
            snapshot.attention = _drawings(path.parent, values.get("attention"), own)
            snapshot.numbers = _layer_numbers(values.get("numbers"), own)
            names = values.get("loss_names")
            snapshot.loss_names = [str(name) for name in names] if isinstance(names, list) else []
            snapshot.without = str(values.get("no_reconstructions") or "")
        else:
            own.append(f"{path.name} names no step and is left out")
    notes += [f"{path.parent.name}: {note}" for note in own]
    return snapshot


def _drawings(folder: Path, entries, notes: list[str]) -> list[Drawing]:
    """The pictures that are there, whole."""
    drawings = []
    for entry in entries if isinstance(entries, list) else []:
        name = entry.get("picture") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            notes.append("a picture without a file name is left out")
            continue
        size = _png_size(folder / name)
        if size is None:
            notes.append(f"{name} is missing or damaged and is left out")
            continue
        drawings.append(Drawing(str(entry.get("name", name)), folder / name, str(entry.get("caption") or ""), *size))
    return drawings


def _png_size(path: Path) -> tuple[int, int] | None:
    """Width and height of a PNG file; None when it is none or its end is missing."""
    try:
        with open(path, "rb") as file:  # its two ends: a long run has many
            head = file.read(24)
            file.seek(max(file.seek(0, os.SEEK_END) - 16, 0))
            tail = file.read()
    except OSError:
        return None
    if not head.startswith(PNG_BEGIN) or PNG_END not in tail:
        return None
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def _layer_numbers(values, notes: list[str]) -> LayerNumbers | None:
    if not values:
        return None
    try:
        layers = [str(layer) for layer in values["layers"]]
        nmi, distance = ([[number(x) for x in heads] for heads in values[key]] for key in ("nmi", "distance_px"))
        if layers and len(layers) == len(nmi) == len(distance) and all(nmi) and all(distance):
            return LayerNumbers(layers, nmi, distance)
    except (KeyError, TypeError):
        pass
    notes.append("numbers of layers that do not fit together are left out")
    return None


def layer_number(name: str) -> str:
    """A layer's place for an axis: "block 3" is 3, "stage 2, block 1" is 2.1."""
    return ".".join(re.findall(r"\d+", name)) or name
