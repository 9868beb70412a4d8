"""Where a step's time goes: `python benchmarks/step_profile.py --config FILE [--batch-size N] [--key value]`

Runs the recipe's training step under MindSpore's profiler and prints Markdown: milliseconds of each layer type, and the
matrix products that take longest with the operations a second that they reach. A kernel's type is that of the lines of
Python it comes from (benchmarks/kernels.py). Its time is the median over the steps. Kernels that run side by side count
both, so that their sum may exceed the time in which any runs; the rest of the step, as timed without the profiler, goes
by between kernels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import kernels
from kernels import KINDS, Kernel

os.environ.setdefault("GLOG_v", "3")

WARM = 3
TELLS = {
    "matmul": "products of activations and weights, and their gradients",
    "attention": "scores, softmax, mixing, heads split",
    "norm": "LayerNorm",
    "activation": "GELU",
    "gather": "rows picked by index (heads joined, patches, windows), and the gradients",
    "bias": "biases, and their gradients",
    "target": "HOG or pixels",
    "loss": "errors and their means",
    "optimizer": "AdamW, weight decay",
    "checks": "whether all gradients are finite",
    "rest": "residuals, slices, joins, other copies, sums of gradients",
}


class Event(NamedTuple):
    """A kernel's run: begin and length in seconds."""

    begin: float
    seconds: float


def parse_events(text: str) -> dict[str, list[Event]]:
    """The profiler's times, a line a kernel: "name;device;begin,length,thread begin,length,thread …", in ns and ms."""
    found = {}
    for line in text.splitlines():
        name, _, times = line.split(";", 2)
        events = [time.split(",") for time in times.split() if "," in time]
        found[name] = sorted(Event(int(begin) / 1e9, float(length) / 1e3) for begin, length, *_ in events)
    return found


def busy(events: Sequence[Event]) -> float:
    """Seconds in which anything runs."""
    end, total = 0.0, 0.0
    for begin, seconds in sorted(events):
        total += max(0.0, begin + seconds - max(begin, end))
        end = max(end, begin + seconds)
    return total


class Profile(NamedTuple):
    """A step in numbers, all medians over steps.

    Attributes:
        step_s: Without the profiler.
        busy_s: While any kernel runs.
        kernel_s: Of each kernel.
    """

    step_s: float
    busy_s: float
    kernel_s: dict[str, float]


def profile(step_s: float, events: Mapping[str, Sequence[Event]]) -> Profile:
    """Sorts the events of a few steps into steps: each kernel runs once in each.

    Raises:
        RuntimeError: Kernels ran unequally often.
    """
    steps = {len(runs) for runs in events.values()}
    if len(steps) != 1:
        raise RuntimeError(f"the profiler saw kernels run {sorted(steps)} times, expected the same for all")
    busy_s = statistics.median(busy([runs[i] for runs in events.values()]) for i in range(steps.pop()))
    kernel_s = {name: statistics.median(event.seconds for event in runs) for name, runs in events.items()}
    return Profile(step_s, busy_s, kernel_s)


def by_kind(profile: Profile, graph: Sequence[Kernel]) -> str:
    """The table by layer type."""
    kind, seconds, count = kernels.kinds(graph), Counter(), Counter()
    for name, s in profile.kernel_s.items():
        seconds[kind[name]] += s
        count[kind[name]] += 1
    total = sum(seconds.values())
    lines = ["| Layer type | ms | % of kernels | kernels | what |", "| --- | --- | --- | --- | --- |"]
    for name in sorted(KINDS, key=lambda k: -seconds[k]):
        if count[name]:
            share = f"{seconds[name] / total:.1%}"[:-1]
            lines.append(f"| {name} | {seconds[name] * 1e3:.1f} | {share} | {count[name]} | {TELLS[name]} |")
    lines.append(f"| all kernels | {total * 1e3:.1f} | 100 | {sum(count.values())} | |")
    rows = {
        "any kernel runs": profile.busy_s,
        "none runs": profile.step_s - profile.busy_s,
        "the step": profile.step_s,
    }
    return "\n".join(lines + [f"| {name} | {s * 1e3:.1f} | | | |" for name, s in rows.items()])


def place(kernel: Kernel) -> str:
    """The function a product is for: the innermost that is not of the layer that multiplies."""
    names = [source.partition(":")[2] for source in kernel.sources]
    names = [name for name in names if not name.startswith(("Linear.", "Project."))]
    return "gradient of " * kernel.gradient + (names[-1] if names else "")


def top_products(profile: Profile, graph: Sequence[Kernel], most: int) -> str:
    """The table of matrix products that take longest."""
    runs = defaultdict(list)
    for kernel in graph:
        if kernel.is_product and kernel.name in profile.kernel_s:
            runs[kernel.op, kernel.form].append((profile.kernel_s[kernel.name], kernel))
    longest = sorted(runs.items(), key=lambda item: -sum(s for s, _ in item[1]))[:most]
    lines = ["| ms | times | product | GFLOP/s | of |", "| --- | --- | --- | --- | --- |"]
    for (_, form), found in longest:
        s, kernel = sum(s for s, _ in found), found[0][1]
        rate = sum(k.operations for _, k in found) / s / 1e9
        lines.append(f"| {s * 1e3:.1f} | {len(found)} | {form} | {rate:.0f} | {place(kernel)} |")
    return "\n".join(lines)


def measure(argv: list[str], batch_size: int, steps: int, device: str, folder: str) -> tuple[Profile, list[Kernel]]:
    """Compiles, times and profiles the recipe's step; `folder` is for MindSpore's files."""
    os.environ.update(kernels.WRITES_GRAPHS, MS_DEV_SAVE_GRAPHS_PATH=f"{folder}/graphs")
    import mindspore as ms
    from mindspore.profiler import ProfilerActivity, ProfilerLevel, tensorboard_trace_handler

    from step_time import make_step, ours

    step = make_step(ours, argv, batch_size, device)
    times = []
    for _ in range(1 + WARM + steps):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    profiler = ms.profiler.profile(
        activities=[ProfilerActivity.CPU],
        experimental_config=ms.profiler._ExperimentalConfig(profiler_level=ProfilerLevel.Level1),
        on_trace_ready=tensorboard_trace_handler(f"{folder}/profile", analyse_flag=False),
    )
    profiler.start()
    for _ in range(steps):
        step()
    profiler.stop()
    (file,) = Path(folder).glob("profile/*/FRAMEWORK/cpu_op_execute_timestamp_*.txt")
    return profile(statistics.median(times[1 + WARM :]), parse_events(file.read_text())), kernels.read(
        f"{folder}/graphs"
    )


def main(argv: list[str]) -> None:
    """Profiles and prints."""
    from localmim.config import load_config

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--products", type=int, default=12, help="how many matrix products to list")
    parser.add_argument("--device-target", default="CPU")
    arguments, rest = parser.parse_known_args(argv)
    argv = ["--config", arguments.config, *rest]
    load_config(argv)
    with tempfile.TemporaryDirectory() as folder:
        found, graph = measure(argv, arguments.batch_size, arguments.steps, arguments.device_target, folder)
    print(by_kind(found, graph), top_products(found, graph, arguments.products), sep="\n\n")


if __name__ == "__main__":
    from localmim import cli

    sys.exit(cli.run(main))
