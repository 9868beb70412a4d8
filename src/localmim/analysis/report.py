"""The report of a run, or of several side by side: one HTML page and the same numbers as JSON, from the runs' files.

No model is built, so it takes seconds, also while the run goes on. This file finds the numbers; page.py shows them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import localmim
from localmim.analysis.history import PAGE, Run, Snapshot, number, read_runs
from localmim.analysis.page import page
from localmim.config import Config, ModelConfig
from localmim.errors import UserError
from localmim.files import replace_text
from localmim.training.same_recipe import flatten

POINTS = 400  # of a curve, at most
MEASURES = {  # percent
    "val_top1": "Validation top-1",
    "val_top1_average": "Validation top-1, averaged weights",
    "val_top5": "Validation top-5",
    "val_top5_average": "Validation top-5, averaged weights",
    "knn_top1": "k-NN top-1",
    "knn_top1_average": "k-NN top-1, averaged weights",
}


def write_report(runs: Sequence[str | Path], out: str | Path = "") -> Path:
    """Writes the page, and beside it the numbers under the same name with .json.

    Args:
        runs: Folders of runs; of several, all that can be compared is shown side by side.
        out: The page's file; empty: report.html in the run's folder, or comparison.html in that of the first.

    Returns:
        The page's path.

    Raises:
        UserError: A folder that is no run or has made no step, a run that is named twice, or a file that cannot be
            written. What is missing or damaged besides is named in the page.
    """
    found = read_runs(runs)
    path = page_path(found, out)
    numbers = [numbers_of(run) for run in found]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    content = {"localmim": localmim.__version__, "runs": plain(numbers)}
    replace_text(path.with_suffix(".json"), json.dumps(content, indent=1, allow_nan=False, default=str) + "\n")
    replace_text(path, page(found, numbers))
    return path


def page_path(runs: Sequence[Run], out: str | Path) -> Path:
    """Where the page goes. UserError where it cannot."""
    path = Path(out) if str(out) else runs[0].folder / (PAGE if len(runs) == 1 else "comparison.html")
    if path.suffix != ".html" or path.is_dir() or path.with_suffix(".json").is_dir():
        raise UserError(f"--out is {path}, expected a file that ends in .html, with room for one in .json beside it")
    return path


def numbers_of(run: Run) -> dict:
    """All that the page says of a run in figures. None: not recorded."""
    last = run.records[-1]
    steps = np.array([record["step"] for record in run.records])
    lengths = np.diff(steps, prepend=0)  # a record stands for the steps since the one before
    spent, waited = (np.array(run.values(key)) * lengths for key in ("step_s", "data_wait_s"))
    known = np.isfinite(spent) & np.isfinite(waited)
    losses = run.values("loss")
    planned = planned_steps(run.recipe, run.records)
    speeds = finite(run.values("images_per_s"))
    return {
        "label": run.label,
        "folder": str(run.folder),
        "task": run.recipe.get("task"),
        "model": section(run.recipe, "model").get("name"),
        "steps": int(steps[-1]),
        "planned_steps": planned,
        "epoch": recorded(last.get("epoch")),
        "first_record": recorded(run.records[0].get("time")),  # seconds since 1970
        "last_record": recorded(last.get("time")),
        "training_s": float(np.nansum(spent)) if np.isfinite(spent).any() else None,
        "data_wait_share": float(waited[known].sum() / spent[known].sum()) if spent[known].sum() > 0 else None,
        "images_per_s": float(np.median(speeds)) if len(speeds) else None,
        "loss_first": losses[0] if "loss" in run.records[0] else None,
        "loss_last": losses[-1] if "loss" in last else None,
        "measures": [measure for key in MEASURES if (measure := measured(run, key))],
        "skipped": recorded(last.get("skipped")),
        "unreadable_images": recorded(last.get("bad_images")),
        "series": series(run, steps, waited / np.where(spent > 0, spent, np.nan)),
        "layers": [layers(snapshot) for snapshot in run.snapshots if snapshot.numbers],
        "snapshots": [snapshot.step for snapshot in run.snapshots],
        "evaluations": run.evaluations,
        "sessions": run.sessions,
        "recipe": flatten(run.recipe),
        "chosen": chosen(run.recipe),
        "notes": run.notes,
    }


def planned_steps(recipe: dict, records: Sequence[dict]) -> int | None:
    """Where the recipe ends, by the steps an epoch has had; None where that is not recorded."""
    step, epoch = records[-1]["step"], number(records[-1].get("epoch"))
    epochs, limit = number(recipe.get("epochs")), number(recipe.get("max_steps"))
    if not (0 < epoch < math.inf and 0 < epochs < math.inf):
        return None
    total = round(step / epoch) * int(epochs)
    return int(limit) if limit < total else total or None


def measured(run: Run, key: str) -> dict | None:
    """An accuracy in the run's records: first, last, and all of it by step."""
    points = [[r["step"], number(r[key])] for r in run.records if math.isfinite(number(r.get(key)))]
    if not points:
        return None
    return {"key": key, "name": MEASURES[key], "first": points[0][1], "last": points[-1][1], "points": points}


def series(run: Run, steps: np.ndarray, wait_share: np.ndarray) -> dict:
    """Curves of at most POINTS points, each a mean over a stretch of records, at the step where it ends."""
    groups = np.array_split(np.arange(len(steps)), min(len(steps), POINTS))
    names = next((snapshot.loss_names for snapshot in reversed(run.snapshots) if snapshot.loss_names), [])
    skipped = run.values("skipped")
    rows = [record.get("loss_scales") for record in run.records]
    rows = [row if isinstance(row, list) else [] for row in rows]
    count = max(map(len, rows))
    parts = [[number(row[k]) if k < len(row) else math.nan for row in rows] for k in range(count)]

    def mean_of(values: Sequence[float]) -> list[float]:
        return [mean(values, group) for group in groups]

    return {
        "step": [int(steps[group[-1]]) for group in groups],
        **{key: mean_of(run.values(key)) for key in ("loss", "lr", "images_per_s", "grad_norm", "loss_scale")},
        "data_wait_share": mean_of(wait_share),
        "skipped": [skipped[group[-1]] for group in groups],  # a count: the last of each stretch
        "loss_parts": [mean_of(part) for part in parts],
        "loss_names": names if len(names) == count else [f"scale {k + 1}" for k in range(count)],
    }


def mean(values: Sequence[float], group: np.ndarray) -> float:
    """Of the finite ones of a group; NaN when there is none."""
    found = finite([values[i] for i in group])
    return float(np.mean(found)) if len(found) else math.nan


def layers(snapshot: Snapshot) -> dict:
    """Means over heads, a layer each."""
    nmi, distance = ([mean(heads, np.arange(len(heads))) for heads in rows] for rows in snapshot.numbers[1:])
    return {"step": snapshot.step, "layers": snapshot.numbers.layers, "nmi": nmi, "distance_px": distance}


def chosen(recipe: dict) -> dict:
    """Task, model, and every key whose value is not the default of this task and method, dotted."""
    name, task = section(recipe, "model").get("name"), recipe.get("task")
    if not isinstance(name, str) or not isinstance(task, str):
        return flatten(recipe)
    default = flatten(Config(task=task, model=ModelConfig(name=name)).as_dict())
    always = ("task", "model.name")
    return {k: v for k, v in flatten(recipe).items() if k in always or k not in default or v != default[k]}


def section(recipe: dict, key: str) -> dict:
    """A mapping of the recipe; empty when it is none."""
    return recipe[key] if isinstance(recipe.get(key), dict) else {}


def finite(values: Sequence[float]) -> np.ndarray:
    """Without what is infinite or NaN."""
    values = np.asarray(values, float)
    return values[np.isfinite(values)]


def recorded(value) -> float | int | None:
    """A finite number, or None."""
    found = number(value)
    if not math.isfinite(found):
        return None
    return int(found) if found == int(found) else found


def plain(value):
    """As JSON has it; what is not finite is a string, as in metrics.jsonl."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
