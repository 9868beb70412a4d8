"""benchmarks/scaling.py: its arithmetic by hand, its counts against the real arrays, its refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from localmim import cli
from localmim.config import Config, load_config
from localmim.convert.load import weights_of
from localmim.training.build import build_model
from localmim.training.layout import Layout
from localmim.training.optimizer import AdamW

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "config/demo/localmim_vit.yaml")
VIT = str(ROOT / "config/pretrain/localmim_vit_base_hog.yaml")
FINETUNE = str(ROOT / "config/finetune/vit_base_1600ep.yaml")


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling

    return scaling


def test_by_hand(scaling):
    """Round numbers, each worked out on paper: 100 MB of gradients, 4 devices on 2 nodes, 40 images/s."""
    config = dataclasses.replace(Config(), epochs=90)
    config.checkpoint.every_steps = 450
    model = scaling.Model(trained=25_000_000, stored=30_000_000, image_values=1000)
    given = scaling.Measured(10.0, 7.0, 100.0, 50.0, network_gbit=1.2, save_mb_per_s=32.0)
    found = scaling.needs(config, model, Layout(4, 8, 1, 32), 2, 32 * 40 + 31, given)
    assert found == scaling.Needs(
        layout=Layout(4, 8, 1, 32),
        nodes=2,
        images_per_s=40.0,
        steps_per_s=1.25,
        cores=3,
        disk_mb_per_s=2.0,
        packed_mb_per_s=1.0,
        to_device_mb_per_s=0.04,
        ring_mb=150.0,  # 100 MB in quarters: 3 quarters as sums, 3 as results
        ring_mb_per_s=187.5,
        network_gbit=1.5,
        reduce_s=1.0,  # 1.2 Gbit on 1.2 Gb/s
        batch_limit=10,
        checkpoint_mb=320.0,  # 30 M weights, two moments of 25 M
        save_s=10.0,
        hours=(3600 * 1.0 + 8 * 10) / 3600,  # the network takes longer than the 0.8 s of computing
        hours_network_apart=(3600 * 1.8 + 8 * 10) / 3600,
    )


def test_accumulation_divides_the_network(scaling):
    """Gradients are reduced once an optimizer step; nothing crosses the network of one node."""
    model, given = scaling.Model(1_000_000, 1_000_000, 1000), scaling.Measured(100.0)

    def at(accumulate: int, nodes: int):
        return scaling.needs(Config(), model, Layout(4, 8, accumulate, 32 * accumulate), nodes, 10_000, given)

    assert at(1, 2).network_gbit == pytest.approx(4 * at(4, 2).network_gbit)
    assert at(1, 2).ring_mb == at(4, 2).ring_mb == at(1, 1).ring_mb
    assert (at(1, 1).network_gbit, at(1, 1).reduce_s, at(1, 1).batch_limit) == (0, 0, 0)


def test_counts_are_those_of_the_arrays(scaling, capfd):
    """A checkpoint's size is that of the weights and moments that a run would store."""
    argv = ["--config", DEMO, "--images-per-s", "50", "--devices", "2", "--nodes", "1"]
    assert cli.run(scaling.main, [*argv, "--json"]) == 0
    one, two = map(json.loads, capfd.readouterr().out.splitlines())
    model = build_model(load_config(["--config", DEMO]))
    trained = {n: p for n, p in model.parameters_and_names() if p.requires_grad}
    arrays = [*weights_of(model).values(), *AdamW(trained).state().values()]
    assert one["checkpoint_mb"] == two["checkpoint_mb"] == pytest.approx(sum(a.nbytes for a in arrays) / 1e6)
    assert two["ring_mb"] == pytest.approx(sum(p.size for p in trained.values()) * 4 / 1e6)  # two devices: 2 x 1/2
    assert (one["ring_mb"], one["layout"]["world"], two["layout"]["world"]) == (0, 1, 2)


def test_table(scaling, capfd):
    """The table has the columns asked for, and every row as many cells."""
    argv = ["--config", DEMO, "--images-per-s", "50", "--devices", "2", "--nodes", "3", "--effective-batch", "12"]
    assert cli.run(scaling.main, argv) == 0
    lines = capfd.readouterr().out.split("\n\n")[1].splitlines()
    assert lines[0] == "|  | 1 device, 1 node | 2 devices, 1 node | 6 devices, 3 nodes |"
    assert {line.count("|") for line in lines} == {5}
    assert "| devices x `batch_size` x `accumulate` | 1 x 12 x 1 = 12 | 2 x 6 x 1 = 12 | 6 x 2 x 1 = 12 |" in lines


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--config", DEMO], "--images-per-s is not given, and no speed is published for this "),
        (
            ["--config", VIT, "--model.image_size", "448"],
            "--images-per-s is not given, and no speed is published for this ",
        ),
        (["--config", DEMO, "--images-per-s", "x"], "argument --images-per-s: 'x', expected a number above 0"),
        (["--config", DEMO, "--nodes", "0"], "argument --nodes: '0', expected a whole number of at least 1"),
        (["--config", DEMO, "--effective-batch", "32"], "a step has 32 images, too few for 64 devices: "),
        (["--config", DEMO, "--images", "3"], "--images is 3, expected at least the "),
        (["--config", DEMO, "--epoch", "3"], "unknown key '--epoch': did you mean 'epochs'?"),
        (["--config", FINETUNE], f"{FINETUNE} is of task finetune, expected a recipe of task pretrain"),
    ],
)
def test_refusals(scaling, capfd, argv, line):
    """One line that names the option, and exit code 2."""
    assert cli.run(scaling.main, argv) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"error: {line}") and err.count("\n") == 1
