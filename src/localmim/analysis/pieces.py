"""The small pieces that the report page is built of, and values as text."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from localmim.analysis.canvas import COLOURS
from localmim.analysis.history import date
from localmim.analysis.markup import Html, Inner, join, tag

NOTHING = "not recorded"


def section(title: str, *inner: Inner) -> Html:
    """A part of the page."""
    return tag("section", tag("h2", title), *inner)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> Html:
    """A table that scrolls by itself where it is wider than the page; the first column names the rows."""
    top = tag("tr", [tag("th", breakable(name), scope="col") for name in header])
    lines = [
        tag("tr", tag("th", breakable(first), scope="row"), [tag("td", breakable(cell)) for cell in rest])
        for first, *rest in rows
    ]
    inner = tag("table", tag("thead", top), tag("tbody", lines))
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=label)


def breakable(text: str) -> Html:
    """Text that may go on in a new line after the dots, slashes and underscores of a name."""
    first, *rest = re.split(r"(?<=[._/])(?=[^\W\d])", text)
    return join(first, [[tag("wbr"), part] for part in rest])


def swatch(colour: str) -> Html:
    """A stroke in a curve's colour."""
    return tag("span", class_="swatch", style=f"border-color:{colour}")


def nothing(sentence: str) -> Html:
    """In the place of what a run does not have."""
    return tag("p", sentence, class_="faint")


def run_colours(number: int) -> list[str]:
    """A colour a run; they come again after the last."""
    return [COLOURS[k % len(COLOURS)] for k in range(number)]


def value(entry) -> str:
    """A value of the recipe, or of any JSON, in one line."""
    if isinstance(entry, bool) or entry is None:
        return {True: "true", False: "false", None: "null"}[entry]
    if isinstance(entry, float):
        return f"{entry:g}"
    if isinstance(entry, (list, tuple)):
        return "[" + ", ".join(map(value, entry)) + "]"
    return str(entry) if entry != "" else "(empty)"


def figure(number: float | None, digits: int = 4) -> str:
    """A number in so many digits, or with all those before the point."""
    if number is None:
        return NOTHING
    return f"{number:,.0f}" if 10**digits <= abs(number) < math.inf else f"{number:.{digits}g}"


def whole(number: float | None) -> str:
    """A count."""
    return NOTHING if number is None else f"{number:,}"


def percent(number, factor: float = 1) -> str:
    """A number of percent, or a share with the factor 100."""
    return f"{factor * number:.1f}\u00a0%" if isinstance(number, (int, float)) else NOTHING


def duration(seconds: float | None) -> str:
    """Hours and minutes, minutes and seconds, or seconds."""
    if seconds is None:
        return NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def span(first: float | None, last: float | None) -> str:
    """From one time to another, both in seconds since 1970."""
    day, end = ("" if seconds is None else date(seconds) for seconds in (first, last))
    if not day or not end:
        return NOTHING
    return f"{day} to {end.removeprefix(day[:10]).strip()} UTC"
