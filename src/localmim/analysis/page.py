"""The report as one HTML page that needs nothing else: no network, no script, no font.

Every section shows all runs at once, a run being a column, a colour or a strip of pictures; one run is a comparison of
one. What is written stands in the page, not in its figures, so it wraps on a phone and can be searched and read aloud.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources

import yaml

import localmim
from localmim.analysis.album import Album
from localmim.analysis.history import Drawing, Run, Snapshot
from localmim.analysis.markup import Html, Inner, tag
from localmim.analysis.panels import curve_panels, layer_panels
from localmim.analysis.pieces import (
    NOTHING,
    duration,
    figure,
    nothing,
    percent,
    run_colours,
    section,
    span,
    swatch,
    table,
    value,
    whole,
)

KEEPS = "A recipe with report_every keeps snapshots of the run."
HINT = "A tap or click on a picture shows it at its full size."
SYSTEM = (
    *("device", "devices", "precision", "localmim", "mindspore", "mindcv", "numpy", "python", "system", "processor"),
    *("cores", "memory_gb"),
)


def page(runs: Sequence[Run], numbers: Sequence[dict]) -> str:
    """The page.

    Args:
        runs: At least one.
        numbers: `report.numbers_of` each.
    """
    album = Album(runs)
    title = numbers[0]["label"] if len(runs) == 1 else f"{len(runs)} runs compared"
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} · localmim report"),
        tag("style", Html(resources.files("localmim.analysis").joinpath("page.css").read_text(encoding="utf-8"))),
    ]
    body = [
        tag("header", heading(title, runs, numbers)),
        tag(
            "main",
            section("Summary", summary(numbers)),
            section("Curves", curve_panels(numbers)),
            section("Reconstructions during training", reconstructions(runs, album)),
            section("Attention", attention(runs, numbers, album)),
            section("Evaluations", evaluations(numbers)),
            section("Recipe", recipe(runs, numbers)),
            section("Environment", environment(numbers)),
        ),
        tag("footer", tag("p", f"Written by localmim {localmim.__version__} from the files of the run.")),
    ]
    text = "<!DOCTYPE html>\n" + tag("html", tag("head", *head), "\n", tag("body", *body), lang="en") + "\n"
    return text.encode("utf-8", "replace").decode("utf-8")  # a file's name may hold what is no letter


# ---- Beginning


def heading(title: str, runs: Sequence[Run], numbers: Sequence[dict]) -> list[Html]:
    """Which runs these are, how far they are, and what could not be read."""
    pieces = [tag("h1", title)]
    for n, colour in zip(numbers, run_colours(len(runs))):
        name = [swatch(colour), tag("strong", n["label"]), " · "] if len(runs) > 1 else []
        what = " · ".join(str(x) for x in (n["task"], n["model"], devices(n)) if x) or NOTHING
        when = [" · ", span(n["first_record"], n["last_record"])]
        pieces.append(tag("p", name, what, " ", state(n), class_="run"))
        pieces.append(tag("p", tag("code", n["folder"]), when, class_="faint"))
    notes = [f"{run.label}: {note}" if len(runs) > 1 else note for run in runs for note in run.notes]
    if notes:
        items = tag("ul", [tag("li", note) for note in notes])
        pieces.append(tag("aside", tag("h2", "What could not be read"), items, class_="notes"))
    return pieces


def state(n: dict) -> Html:
    """Finished or not, as a badge."""
    steps, planned = n["steps"], n["planned_steps"]
    if planned is None:
        return tag("span", f"{steps:,} steps", class_="badge")
    if steps >= planned:
        return tag("span", "finished", class_="badge done")
    return tag("span", f"unfinished: {100 * steps / planned:.0f} % of the steps", class_="badge open")


def devices(n: dict) -> str:
    """What it ran on the last time."""
    session = n["sessions"][-1] if n["sessions"] else {}
    device, number = session.get("device"), session.get("devices")
    if not device:
        return ""
    return f"{number} x {device}" if isinstance(number, int) and number > 1 else str(device)


def summary(numbers: Sequence[dict]) -> Html:
    """The figures that one asks for first: cards for one run, a table for several."""
    measures = dict.fromkeys(measure["name"] for n in numbers for measure in n["measures"])
    rows: list[tuple[str, Callable[[dict], str]]] = [
        ("Steps", lambda n: f"{n['steps']:,} of {n['planned_steps']:,}" if n["planned_steps"] else f"{n['steps']:,}"),
        ("Loss, first → last", lambda n: f"{figure(n['loss_first'], 3)} → {figure(n['loss_last'], 3)}"),
        *[(f"{name}, %, first → last", lambda n, name=name: first_to_last(n, name)) for name in measures],
        ("Images a second (median)", lambda n: figure(n["images_per_s"], 3)),
        ("Waiting for images", lambda n: percent(n["data_wait_share"], 100)),
        ("Time in steps", lambda n: duration(n["training_s"])),
        ("Skipped steps", lambda n: whole(n["skipped"])),
        ("Unreadable images", lambda n: whole(n["unreadable_images"])),
        ("Restarts", lambda n: str(len(n["sessions"]) - 1) if n["sessions"] else NOTHING),
    ]
    if len(numbers) > 1:
        return table(
            ["", *[n["label"] for n in numbers]], [[name, *map(show, numbers)] for name, show in rows], "Summary"
        )
    cards = [tag("div", tag("dt", name), tag("dd", show(numbers[0]))) for name, show in rows]
    return tag("dl", cards, class_="cards")


def first_to_last(n: dict, name: str) -> str:
    """An accuracy of a run."""
    for measure in n["measures"]:
        if measure["name"] == name:
            first, last = (f"{measure[key]:.1f}" for key in ("first", "last"))
            return f"{first} → {last}" if len(measure["points"]) > 1 else last
    return NOTHING


# ---- Pictures


def reconstructions(runs: Sequence[Run], album: Album) -> list[Html]:
    """For each image a strip of pictures a run, from the first snapshot to the newest."""
    names = list(dict.fromkeys(d.name for row in album.shown for s in row for d in s.reconstructions))
    if not names:
        why = [run.snapshots[-1].without for run in runs if run.snapshots and run.snapshots[-1].without]
        return [nothing(f"None: {why[0]}." if why else f"None are recorded. {KEEPS}")]
    pieces = [tag("p", *([f"{album.said}. "] if album.said else []), "Swipe a strip sideways. ", HINT, class_="faint")]
    for name in names:
        strips = []
        for run, row in zip(runs, album.shown):
            found = [(s, d) for s in row for d in s.reconstructions if d.name == name]
            strips.append([strip(found, album, f"reconstructions of {name} by {run.label}")] if found else [])
        pieces.append(image_article(name, runs, strips))
    return pieces


def attention(runs: Sequence[Run], numbers: Sequence[dict], album: Album) -> list[Html]:
    """Numbers of each layer, then maps of the newest snapshot, with the older ones folded."""
    names = list(dict.fromkeys(d.name for row in album.shown for s in row for d in s.attention))
    pieces = [layer_panels(numbers)] if any(n["layers"] for n in numbers) else []
    pieces += [tag("p", HINT, class_="faint")] if names else []
    for name in names:
        columns = []
        for run, row in zip(runs, album.shown):
            found = [(s, d) for s in row for d in s.attention if d.name == name]
            if not found:
                columns.append([])
                continue
            column = [strip(found[-1:], album, f"attention on {name} by {run.label}")]
            if found[1:]:
                older = strip(found[:-1], album, f"earlier attention on {name} by {run.label}")
                column.append(tag("details", tag("summary", "Earlier snapshots"), older))
            columns.append(column)
        pieces.append(image_article(name, runs, columns))
    return pieces or [nothing(f"None is recorded. {KEEPS}")]


def image_article(name: str, runs: Sequence[Run], columns: Sequence[Inner]) -> Html:
    """What each run has of one image, side by side; runs that have nothing are left out."""
    heads = [tag("h4", swatch(c), run.label) if len(runs) > 1 else "" for run, c in zip(runs, run_colours(len(runs)))]
    inner = [tag("div", head, column) for head, column in zip(heads, columns) if column]
    return tag("article", tag("h3", name), tag("div", inner, class_="side"))


def strip(found: Sequence[tuple[Snapshot, Drawing]], album: Album, label: str) -> Html:
    """Pictures in a row that scrolls by itself."""
    pictures = []
    for snapshot, drawing in found:
        said = f"step {snapshot.step:,}" + (f": {drawing.caption}" if drawing.caption else "")
        size = {"width": drawing.width, "height": drawing.height}
        image = tag("img", src=album.address(drawing), alt=f"{label}, {said}", **size)
        pictures.append(
            tag("figure", image, tag("figcaption", said), tabindex="0", style=f"max-width: {drawing.width}px")
        )
    return tag("div", pictures, class_="strip" if found[1:] else "strip lone", role="region", aria_label=label)


# ---- Tables


def evaluations(numbers: Sequence[dict]) -> Html:
    """Results of eval.py in the runs' folders."""
    several = len(numbers) > 1
    rows = []
    for n in numbers:
        for result in n["evaluations"]:
            kind = "20-NN" if result.get("task") == "pretrain" else "classifier"
            kind += ", averaged weights" if result.get("average") else ""
            images = result.get("images", result.get("n_test", NOTHING))
            accuracy = [value(result.get(key, NOTHING)) for key in ("top1", "top5")]
            cells = [value(result.get("step", NOTHING)), kind, *accuracy, value(images), result["file"]]
            rows.append([n["label"], *cells] if several else cells)
    if not rows:
        return nothing("None is recorded. eval.py writes them to the run's folder.")
    header = [*(["run"] if several else []), "step", "what", "top-1, %", "top-5, %", "images", "file"]
    return table(header, rows, "Evaluations")


def recipe(runs: Sequence[Run], numbers: Sequence[dict]) -> list[Html]:
    """What was chosen, where runs differ, and all of it."""
    if not any(n["recipe"] for n in numbers):
        return [nothing("Not recorded.")]

    def cells(key: str) -> list[str]:
        return [value(n["recipe"][key]) if key in n["recipe"] else "–" for n in numbers]

    keys = list(dict.fromkeys(key for n in numbers for key in n["recipe"]))
    unlike = [key for key in keys if len(set(cells(key))) > 1]
    told = {key for n in numbers for key in n["chosen"]}
    differing = [key for key in unlike if key in told]  # a key that an older run lacks may be at its default here
    common = [key for key in keys if key in told and key not in unlike]
    title, pieces = "What differs from the defaults", []
    if len(runs) > 1:
        rows = [[key, *cells(key)] for key in differing]
        header = ["", *[n["label"] for n in numbers]]
        pieces = [tag("h3", "Where the runs differ"), table(header, rows, "Where the runs differ")] if rows else []
        title = "What they share beside the defaults"
    if common:
        pieces += [tag("h3", title), table(["key", "value"], [[key, cells(key)[0]] for key in common], title)]
    for run in runs:
        text = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)
        name = f"The whole recipe of {run.label}" if len(runs) > 1 else "The whole recipe"
        pieces.append(tag("details", tag("summary", name), tag("pre", tag("code", text))))
    return pieces


def environment(numbers: Sequence[dict]) -> list[Html]:
    """What each run was computed with the last time, and all its starts."""
    newest = [n["sessions"][-1] if n["sessions"] else {} for n in numbers]
    if not any(newest):
        return [nothing("Not recorded.")]
    keys = [key for key in SYSTEM if any(key in session for session in newest)]
    rows = [[key.replace("_gb", ", GB"), *[value(session.get(key, NOTHING)) for session in newest]] for key in keys]
    header = [n["label"] for n in numbers] if len(numbers) > 1 else ["at the newest start"]
    pieces = [table(["", *header], rows, "Environment")]
    for n in numbers:
        if n["sessions"]:
            pieces.append(tag("h3", f"Starts of {n['label']}" if len(numbers) > 1 else "Starts"))
            pieces.append(tag("ol", list(map(start, [{}, *n["sessions"]], n["sessions"])), class_="starts"))
    return pieces


def start(before: dict, session: dict) -> Html:
    """When a run was started, from which step, how, and what had changed since the time before."""
    when = f"{value(session.get('time', NOTHING))}, after step\u00a0{value(session.get('step', NOTHING))}"
    changed = [
        f"{key} {value(session.get(key, NOTHING))}"
        for key in SYSTEM
        if key in before and session.get(key) != before[key]
    ]
    now = f", now with {', '.join(changed)}" if changed else ""
    return tag("li", when, now, tag("br"), tag("code", value(session.get("command", NOTHING))))
