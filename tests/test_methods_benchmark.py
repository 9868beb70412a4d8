"""benchmarks/methods.py: counts by formula, its table against registry and recipes, its sentences, a tiny run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor, ops

from localmim import cli
from localmim.config import load_config
from localmim.models.registry import list_models

ROOT = Path(__file__).parents[1]


@pytest.fixture
def methods(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import methods

    return methods


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compare

    return compare


def found(**steps: tuple[float, float]) -> dict[str, dict]:
    """Sides as if measured: name = (seconds a step, multiply-adds in G), batch 2."""
    return {
        name: {
            "times": [s],
            "step_s": s,
            "low_s": 0.9 * s,
            "high_s": 1.1 * s,
            "images_per_s": 2 / s,
            "compile_s": 20.0,
            "peak_rss_mb": 3000.0,
            "multiply_adds": g * 1e9,
        }
        for name, (s, g) in steps.items()
    }


def test_every_side_is_a_model(methods):
    """Each recipe of the table loads, names a registered model, and the eight neighbours of LocalMIM are all there."""
    models = {load_config(methods.arguments(side)).model.name for side in methods.SIDES.values()}
    assert models <= set(list_models(classifiers=False))
    families = {"localmim", "mae", "simmim", "greenmim", "maskfeat", "beit", "lomar", "convmae", "fastconvmae"}
    assert {name.partition("_")[0] for name in models} == families
    named = {name for pair in methods.PAIRS for name in (pair.first, pair.second)}
    assert named == set(methods.SIDES)  # each is compared with another


def test_counts_by_formula(methods):
    """LoMaR's products, added up on paper from its sizes; all of them are counted, and nothing else."""
    import multiply_adds

    config, model = methods.build(methods.arguments(methods.SIDES["lomar_vit"], tiny=True))
    counts = [multiply_adds.multiply_adds(model, methods.random_inputs(config, model, n)) for n in (1, 2)]
    D, N, V, hidden, pixels = 24, 50, 4, 39, 768
    block = N * D * 12 * D + 2 * N * N * D + N * N * D  # projections and MLP; scores and mixing; iRPE's scores
    each = V * (block + 49 * pixels * D + hidden * D * pixels)
    assert counts == [each, 2 * each]


def test_counted_operators(methods):
    """A convolution in groups and a product with a transposed left side count as many as their definitions say."""
    import mindspore as ms

    import multiply_adds

    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        with multiply_adds.counted() as counts:
            ops.Conv2D(6, 3, group=2)(Tensor(np.ones((2, 4, 5, 5), "f")), Tensor(np.ones((6, 2, 3, 3), "f")))
            ops.MatMul(transpose_a=True)(Tensor(np.ones((7, 3), "f")), Tensor(np.ones((7, 5), "f")))
        ops.MatMul()(Tensor(np.ones((3, 7), "f")), Tensor(np.ones((7, 5), "f")))
    finally:
        ms.set_context(mode=mode)
    assert counts == [2 * 6 * 9 * 2 * 9, 7 * 3 * 5]


def test_ratios(methods, compare):
    """Ratios are the first by the second, published ones come from hours, and hours to accuracy follow our steps."""
    rows = compare.ratios(methods.SIDES, methods.PAIRS, found(mae_vit=(3.0, 9.0), localmim_vit=(1.0, 6.0)))
    assert len(rows) == 1
    row = rows[0]
    assert (row["measured"], row["operations"]) == (3.0, 1.5)
    assert row["published"] == pytest.approx(1.1 / 0.7)
    assert row["to_accuracy_here"] == pytest.approx(3.0 * 3.1 / (1.1 / 0.7))


def test_sentences_follow_the_numbers(methods, compare):
    """A disagreement names the slower side's reason, and a published surplus its own; agreement is said as such."""

    def said(**steps):
        sides = found(**steps)
        return compare.sentences(methods.SIDES, compare.ratios(methods.SIDES, methods.PAIRS, sides), sides)

    slow = said(beit_vit=(4.0, 20.0), localmim_vit=(1.0, 10.0))
    line = next(x for x in slow if x.startswith("BEiT ViT-B against LocalMIM ViT-B: "))
    assert (
        "4.00 times as long, with 2.00 times" in line and "LocalMIM ViT-B makes 20.0 G" in line and "8192 ids" in line
    )
    assert "tokenizer" not in line  # published 3.43 is within 25 % of 4
    fast = said(beit_vit=(2.0, 20.0), localmim_vit=(1.0, 10.0))
    line = next(x for x in fast if x.startswith("BEiT ViT-B against LocalMIM ViT-B: "))
    assert "Published is 3.43 a step, measured here 2.00" in line and "hold the tokenizer" in line
    assert "times as long" not in line
    assert "27.4 to equal accuracy is 3.43 a step times 7.99, the epochs" in line
    other = said(beit_vit=(9.0, 90.0), localmim_vit=(1.0, 10.0))  # published less: the tokenizer cannot be why
    assert "tokenizer" not in " ".join(other) and "authors compute HOG once a scale" in " ".join(other)
    equal = said(lomar_vit=(2.0, 17.5), localmim_vit=(1.0, 8.75))
    assert equal[-1].endswith("agrees within 25 %: LoMaR ViT-B, 4 views against LocalMIM ViT-B.") and len(equal) == 1
    fewer = said(mae_vit=(1.0, 9.4), mae_vit_448=(5.0, 50.0))
    assert "Fewer multiply-adds than the authors' code: MAE ViT-B 9.40 G of 9.8." in fewer[0]
    assert fewer[1] == "More multiply-adds than the authors' code: MAE ViT-B, 448 px 50.0 G of 43.1."


def test_scaling_verdicts(compare, methods):
    """Each statement holds for costs made to fit it, and is denied for costs that do not."""
    lomar = {
        "lomar_vit_2_views": (1.0, 8.0),
        "lomar_vit": (2.0, 16.0),
        "lomar_vit_8_views": (4.0, 32.0),
        "lomar_vit_384_4_views": (2.1, 16.0),
        "lomar_vit_448_4_views": (2.2, 16.0),
        "lomar_vit_384": (3.0, 24.0),
        "lomar_vit_448": (4.5, 36.0),
    }
    good = compare.scaling(
        methods.SCALING, found(**lomar, mae_vit=(1.0, 9.0), mae_vit_384=(4.0, 30.0), mae_vit_448=(8.0, 43.0))
    )
    assert "DOES NOT HOLD" not in good and good.count("holds") == 5
    assert "at most 10% apart; quartiles of one side are up to 20% apart" in good and "the power 1.50" in good
    lomar.update(lomar_vit_8_views=(5.0, 40.0), lomar_vit_448_4_views=(2.2, 17.0))
    bad = compare.scaling(
        methods.SCALING, found(**lomar, mae_vit=(3.0, 18.0), mae_vit_384=(4.0, 20.0), mae_vit_448=(8.0, 36.0))
    )
    assert bad.count("DOES NOT HOLD") == 5 and "holds" not in bad


def test_run(methods, tmp_path, capfd):
    """One tiny side in a process of its own: what is printed is what is saved, and the record has every figure."""
    out = tmp_path / "sides.json"
    argv = ["--tiny", "--only", "simmim_vit", "--batch-size", "2", "--steps", "2", "--rounds", "1", "--out", str(out)]
    assert cli.run(methods.main, argv) == 0
    printed = capfd.readouterr().out
    assert out.with_suffix(".md").read_text() == printed
    assert "| SimMIM ViT-B | " in printed and "Tiny models" in printed
    row = json.loads(out.read_text())["sides"]["simmim_vit"]
    assert len(row["times"]) == 2 and row["low_s"] <= row["step_s"] <= row["high_s"]
    assert row["images_per_s"] == pytest.approx(2 / row["step_s"])
    assert row["compile_s"] > row["step_s"] and row["peak_rss_mb"] > 100 and row["multiply_adds"] > 1e6


def test_reference_takes_out_the_machine(methods):
    """A machine that becomes three times slower half-way changes no ratio, and the reference's quartiles show it."""

    class Side:
        def __init__(self, name, seconds):
            self.name, self.seconds, self.asked = name, seconds, 0

        def ask(self, word):
            if word == "memory":
                return {"peak_rss_mb": 1.0}
            self.asked += 1
            return self.seconds * (3.0 if self.asked > methods.WARM_UP + 2 else 1.0)

    found = {name: {"times": [], "relative": [], "compile_s": [9.0]} for name in ("mae", "lomar")}
    methods.take_turns(Side("mae", 2.0), Side("lomar", 5.0), 5, found)
    assert found["lomar"]["times"] == [5.0, 5.0, 15.0, 15.0, 15.0]
    for row in found.values():
        methods.summarise(row, found["mae"]["times"], 4)
    mae, lomar = found["mae"], found["lomar"]
    assert (mae["low_s"], mae["step_s"], mae["high_s"]) == (2.0, 6.0, 6.0)
    assert lomar["low_s"] == lomar["step_s"] == lomar["high_s"] == pytest.approx(15.0)
    assert lomar["images_per_s"] == pytest.approx(4 / 15) and lomar["compile_s"] == 9.0


def test_a_process_that_ends(methods, capfd):
    """As when memory runs out: the run ends with 1, and one line says which side it was."""
    process = methods.Process("mae_vit", [], 2, "CPU")
    process.process.kill()
    assert cli.run(lambda _: process.ask("compile"), []) == 1
    assert capfd.readouterr().err.startswith("stopped: the process of mae_vit ended with code -9: ")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--only", "mea_vit"], "--only mea_vit: no such side, expected some of localmim_vit, "),
        (["--steps", "x"], "argument --steps: 'x', expected a whole number of at least 0"),
        (["--rounds", "0"], "argument --rounds: '0', expected a whole number of at least 1"),
        (["--out", "sides.md"], "--out sides.md: expected a .json file in a folder that exists"),
        (["--out", "nowhere/sides.json"], "--out nowhere/sides.json: expected a .json file in a folder that exists"),
    ],
)
def test_refusals(methods, capfd, argv, line):
    """One line that names the option, and exit code 2."""
    assert cli.run(methods.main, argv) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"error: {line}") and err.count("\n") == 1
