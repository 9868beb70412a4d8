"""From what benchmarks/methods.py measured to tables and to sentences that say where measured and published disagree.

Three ratios are laid side by side for each pair of methods: of the time of a step, of multiply-adds, of published GPU
hours an epoch (or a published speed of a step). A fourth, published, is of all hours until accuracy is equal: it is the
third times the epochs that are saved, and says nothing about a step. Every sentence is made from the numbers at hand;
a reason is named only for a disagreement in the direction that it explains.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from methods import Pair, Side

AGREE = 1.25  # ratios that lie closer than this factor agree
WHOLE = 1.02  # the same for counts of multiply-adds
EXACT = 1.001  # and for what is said to be the same number


def apart(a: float | None, b: float | None, factor: float = AGREE) -> bool:
    """Whether two numbers are both known and further apart than a factor."""
    return a is not None and b is not None and max(a, b) > factor * min(a, b)


def ratios(sides: dict[str, Side], pairs: Sequence[Pair], found: dict[str, dict]) -> list[dict]:
    """Of each pair whose sides were both run: the first by the second; None for what is not known.

    Keys: first, second; of a step: measured, operations, published, torch (the authors' code on a CPU), whole (their
    multiply-adds); of all hours: to_accuracy, published, and to_accuracy_here, the same with steps as measured here.
    """
    rows = []
    for pair in pairs:
        if pair.first not in found or pair.second not in found:
            continue
        a, b = sides[pair.first], sides[pair.second]
        published = pair.step or quotient(a.hours, b.hours)
        measured = quotient(found[pair.first].get("step_s"), found[pair.second].get("step_s"))
        rows.append(
            {
                "first": pair.first,
                "second": pair.second,
                "measured": measured,
                "operations": found[pair.first]["multiply_adds"] / found[pair.second]["multiply_adds"],
                "published": published,
                "to_accuracy": pair.to_accuracy,
                "to_accuracy_here": product(measured, quotient(pair.to_accuracy, published)),
                "torch": pair.torch,
                "whole": quotient(a.whole, b.whole),
            }
        )
    return rows


def quotient(a: float | None, b: float | None) -> float | None:
    """a / b, None where one is not known."""
    return None if a is None or b is None else a / b


def product(a: float | None, b: float | None) -> float | None:
    """a b, None where one is not known."""
    return None if a is None or b is None else a * b


def report(sides: dict[str, Side], pairs: Sequence[Pair], found: dict[str, dict]) -> str:
    """Markdown: what was measured, ratios beside published ones, what is published, and the sentences."""
    rows = ratios(sides, pairs, found)
    parts = [steps_table(sides, found)]
    if rows:
        parts += [ratios_table(sides, rows)]
    if published := published_table({name: sides[name] for name in found}):
        parts += [published]
    parts += ["\n".join(f"- {line}" for line in sentences(sides, rows, found))]
    return "\n\n".join(part for part in parts if part)


def steps_table(sides: dict[str, Side], found: dict[str, dict]) -> str:
    """A row a side."""
    heads = [
        "one step",
        "s (quartiles)",
        "images/s",
        "multiply-adds of a forward pass, G an image",
        "of the authors' code",
        "compile s",
        "peak MB",
    ]
    lines = []
    for name, row in found.items():
        peak = _number(row.get("peak_rss_mb"), ",.0f")
        if "peak_device_mb" in row:
            peak += f" + {row['peak_device_mb']:,.0f} on the device"
        lines.append(
            [
                sides[name].title,
                f"{row['step_s']:.2f} ({row['low_s']:.2f} to {row['high_s']:.2f})" if "step_s" in row else "-",
                _number(row.get("images_per_s"), ".2f"),
                _giga(row["multiply_adds"] / 1e9),
                _number(sides[name].whole, ".1f"),
                _number(row.get("compile_s"), ".0f"),
                peak,
            ]
        )
    return table(heads, lines)


def ratios_table(sides: dict[str, Side], rows: list[dict]) -> str:
    """A row a pair: the first's cost divided by the second's."""
    heads = [
        "cost of one against another",
        "step, measured",
        "multiply-adds, here",
        "of the authors' code",
        "authors' PyTorch, 1 CPU thread",
        "step, published",
        "hours to equal accuracy, published",
        "with steps as measured here",
    ]
    keys = ("measured", "operations", "whole", "torch", "published", "to_accuracy", "to_accuracy_here")
    lines = []
    for row in rows:
        digits = [".2f"] * 5 + [".1f"] * 2
        lines.append([_pair(sides, row), *(_number(row[key], spec) for key, spec in zip(keys, digits))])
    return table(heads, lines)


def published_table(sides: dict[str, Side]) -> str:
    """Published hours and accuracies of these sides; empty where none are."""
    lines = []
    for side in sides.values():
        for epochs, accuracy in side.results:
            hours = "-" if side.hours is None else f"{side.hours * epochs:,.0f}"
            lines.append([side.title, str(epochs), _number(side.hours, ".1f"), hours, f"{accuracy:.1f}"])
    heads = ["published", "epochs", "GPU hours an epoch", "GPU hours in all", "ImageNet top-1, %"]
    return table(heads, lines) if lines else ""


def sentences(sides: dict[str, Side], rows: list[dict], found: dict[str, dict]) -> list[str]:
    """Where the numbers disagree, and why, as far as a reason is known."""
    lines = [*count_sentences(sides, found)]
    agree = []
    for row in rows:
        said = []
        if apart(row["measured"], row["operations"]):
            said.append(_time_against_operations(sides, row, found))
        ours = "operations" if row["measured"] is None else "measured"
        if apart(row[ours], row["published"]):
            said.append(_against_published(sides, row, ours))
        known = [row[key] for key in ("measured", "operations", "published") if row[key] is not None]
        if not said and len(known) > 1:
            agree.append(_pair(sides, row))
        if row["to_accuracy"]:
            said.append(_to_accuracy(row))
        if said:
            lines.append(f"{_pair(sides, row)}: {' '.join(said)}")
    if agree:
        lines.append(f"What is known of the ratio of a step agrees within 25 %: {'; '.join(agree)}.")
    return lines


def count_sentences(sides: dict[str, Side], found: dict[str, dict]) -> list[str]:
    """Multiply-adds here against those of the authors' whole models."""
    fewer, more = [], []
    for name, row in found.items():
        whole, here = sides[name].whole, row["multiply_adds"] / 1e9
        if apart(whole, here, WHOLE):
            (fewer if here < whole else more).append(f"{sides[name].title} {_giga(here)} G of {whole:g}")
    lines = []
    if fewer:
        lines.append(
            f"Fewer multiply-adds than the authors' code: {', '.join(fewer)}. Here what no loss reads is not computed, "
            "and hidden tokens, which are alike in all images, enter a decoder once a batch."
        )
    if more:
        lines.append(f"More multiply-adds than the authors' code: {', '.join(more)}.")
    return lines


def _to_accuracy(row: dict) -> str:
    """What the published ratio of all hours is made of."""
    if row["published"] is None:
        return f"The published {row['to_accuracy']:g} is of all hours; what part of it is a step's is not published."
    return (
        f"The published {row['to_accuracy']:g} to equal accuracy is {row['published']:.2f} a step times "
        f"{row['to_accuracy'] / row['published']:.2f}, the epochs."
    )


def _time_against_operations(sides: dict[str, Side], row: dict, found: dict[str, dict]) -> str:
    """Which side gets fewer multiply-adds a second through, and what else it does."""
    rate = {k: found[row[k]]["multiply_adds"] * found[row[k]]["images_per_s"] / 1e9 for k in ("first", "second")}
    slow, fast = sorted(rate, key=rate.get)
    other = sides[row[slow]].beyond
    why = f", which also spends time on {other}" if other else "; no reason is known"
    return (
        f"A step takes {row['measured']:.2f} times as long, with {row['operations']:.2f} times the multiply-adds: in a "
        f"second of a step {sides[row[fast]].title} makes {_giga(rate[fast])} G of its forward pass's, "
        f"{sides[row[slow]].title} {_giga(rate[slow])} G{why}."
    )


def _against_published(sides: dict[str, Side], row: dict, ours: str) -> str:
    """Published ratio against ours."""
    a, b = sides[row["first"]], sides[row["second"]]
    what = "measured here" if ours == "measured" else "by multiply-adds here"
    high = row["published"] > row[ours]
    reasons = [
        f"{side.title}: {reason}"
        for side, reason in ((a, a.over if high else a.under), (b, b.under if high else b.over))
        if reason
    ]
    why = "; ".join(reasons) if reasons else "No reason is known but that the authors' own programs ran, on GPUs"
    return f"Published is {row['published']:.2f} a step, {what} {row[ours]:.2f}. {why}."


def scaling(sides: dict[str, Side], found: dict[str, dict]) -> str:
    """Markdown: how LoMaR's and MAE's cost grow with views and image size, and whether that is as it should be."""
    lines = []
    for name, row in found.items():
        lines.append(
            [
                sides[name].title,
                _giga(row["multiply_adds"] / 1e9),
                f"{row['step_s']:.2f} ({row['low_s']:.2f} to {row['high_s']:.2f})" if "step_s" in row else "-",
            ]
        )
    parts = [table(["one step", "multiply-adds of a forward pass, G an image", "s (quartiles)"], lines)]
    checks = [check(found) for check in (views_check, pixels_check, mae_check, crossing_check)]
    parts.append("\n".join(f"- {line}" for line in checks if line))
    return "\n\n".join(part for part in parts if part)


def _values(found: dict[str, dict], key: str, *names: str) -> list[float] | None:
    """A number of some sides; None where one has none."""
    values = [found.get(name, {}).get(key) for name in names]
    return None if None in values else values


def _verdict(holds: bool) -> str:
    return "holds" if holds else "DOES NOT HOLD"


def views_check(found: dict[str, dict]) -> str:
    """LoMaR's cost is linear in the number of views."""
    names = ("lomar_vit_2_views", "lomar_vit", "lomar_vit_8_views")
    counts = _values(found, "multiply_adds", *names)
    if counts is None:
        return ""
    each = [count / views for count, views in zip(counts, (2, 4, 8))]
    line = (
        f"LoMaR's multiply-adds are proportional to its views: {_verdict(not apart(min(each), max(each), EXACT))}, "
        f"{', '.join(f'{x / 1e9:.3f}' for x in each)} G a view at 2, 4, 8 views."
    )
    if times := _values(found, "step_s", *names):
        slopes = (times[1] - times[0]) / 2, (times[2] - times[1]) / 4
        line += (
            f" A step takes {', '.join(f'{t:.2f}' for t in times)} s; a view more costs {slopes[0]:.3f} s from 2 to 4, "
            f"{slopes[1]:.3f} s from 4 to 8."
        )
    return line


def pixels_check(found: dict[str, dict]) -> str:
    """LoMaR's cost does not depend on the image's size."""
    names = ("lomar_vit", "lomar_vit_384_4_views", "lomar_vit_448_4_views")
    counts = _values(found, "multiply_adds", *names)
    if counts is None:
        return ""
    line = (
        f"LoMaR's multiply-adds at 4 views are the same at 224, 384 and 448 px: "
        f"{_verdict(not apart(min(counts), max(counts), EXACT))}, {', '.join(f'{x / 1e9:.3f}' for x in counts)} G."
    )
    if times := _values(found, "step_s", *names):
        noise = max((found[n]["high_s"] - found[n]["low_s"]) / found[n]["step_s"] for n in names)
        line += (
            f" A step takes {', '.join(f'{t:.2f}' for t in times)} s, at most {max(times) / min(times) - 1:.0%} apart; "
            f"quartiles of one side are up to {noise:.0%} apart."
        )
    return line


def mae_check(found: dict[str, dict]) -> str:
    """MAE's cost grows faster than the number of pixels."""
    names = ("mae_vit", "mae_vit_384", "mae_vit_448")
    counts = _values(found, "multiply_adds", *names)
    if counts is None:
        return ""
    pixels = (448 / 224) ** 2
    line = (
        f"MAE's multiply-adds grow faster than the pixels: {_verdict(counts[2] / counts[0] > pixels)}, "
        f"{counts[2] / counts[0]:.2f} times from 224 to 448 px with {pixels:g} times the pixels, the power "
        f"{_power(counts[0], counts[2], pixels):.2f}."
    )
    if times := _values(found, "step_s", *names):
        power = _power(times[0], times[2], pixels)
        line += f" A step takes {times[2] / times[0]:.2f} times as long, the power {power:.2f}."
    return line


def _power(small: float, large: float, growth: float) -> float:
    return math.log(large / small) / math.log(growth)


def crossing_check(found: dict[str, dict]) -> str:
    """Between 224 and 384 px LoMaR with its published views becomes cheaper than MAE."""
    words = []
    for key, what in (("multiply_adds", "multiply-adds"), ("step_s", "time")):
        small, middle, large = (_values(found, key, "mae_vit" + s, "lomar_vit" + s) for s in ("", "_384", "_448"))
        if None in (small, middle, large):
            continue
        by = [mae / lomar for mae, lomar in (small, middle, large)]
        holds = _verdict(by[0] < 1 < by[1])
        words.append(f"{what} {holds}, MAE by LoMaR {', '.join(f'{x:.2f}' for x in by)} at 224, 384, 448 px")
    return f"MAE is cheaper than LoMaR at 224 px and dearer at 384: {'; '.join(words)}." if words else ""


def table(heads: list[str], lines: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *lines])


def _pair(sides: dict[str, Side], row: dict) -> str:
    return f"{sides[row['first']].title} against {sides[row['second']].title}"


def _giga(value: float) -> str:
    """Three digits."""
    return f"{value:.{max(2 - math.floor(math.log10(value)), 0)}f}"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
