"""Reports of a run that goes on: they change nothing of it, are whole or not there, and nothing in them stops it."""

from __future__ import annotations

import json
import shutil
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import yaml

from localmim.analysis.snapshot import Snapshots, snapshot_path
from localmim.config import load_config
from localmim.errors import UserError
from localmim.training.checkpoint import read_checkpoint
from localmim.training.loop import train


class Kept(NamedTuple):
    """A run with a report after each epoch."""

    recipe: str
    output: str


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Two classes of images, two epochs of two steps."""
    folder = tmp_path_factory.mktemp("reports")
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for label in "ab":
            (folder / part / label).mkdir(parents=True)
            for i in range(count // 2 + 1):
                picture = rng.integers(0, 255, (24, 40, 3), np.uint8)
                cv2.imwrite(str(folder / part / label / f"{i}.png"), picture)
    values = {
        "epochs": 2,
        "batch_size": 5,
        "log_every": 1,
        "device": "CPU",
        "report_every": 1,
        "model": {"name": "mae_vit_tiny_patch16_224", "image_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2},
        "data": {"dir": str(folder / "train"), "val_dir": str(folder / "val"), "workers": 1},
        "optimizer": {"blr": 0.1, "warmup_epochs": 0},
    }
    values["model"] |= {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(recipe, output, *overrides):
    train(load_config(["--config", str(recipe), "--output_dir", str(output), *overrides]))


@pytest.fixture(scope="module")
def kept(recipe):
    output = recipe.parent / "run"
    run(recipe, output)
    return Kept(recipe, output)


def records(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").open()]


def test_each_report_is_a_snapshot_and_a_figure_of_knn(kept):
    """After each epoch: pictures that exist, numbers of each block, and k-NN in the record of that step."""
    steps = [r["step"] for r in records(kept.output) if "knn_top1" in r]
    assert steps == [2, 4]
    for step in steps:
        folder = snapshot_path(kept.output, step)
        about = json.loads((folder / "snapshot.json").read_text())
        assert about["step"] == step and len(about["loss_names"]) == 1
        pictures = [entry["picture"] for key in ("reconstructions", "attention") for entry in about[key]]
        assert len(pictures) == 6 and {p.name for p in folder.iterdir()} == {*pictures, "snapshot.json"}
        assert all(cv2.imread(str(folder / name)).std() > 1 for name in pictures)
        assert np.shape(about["numbers"]["nmi"]) == (2, 2) and about["numbers"]["images"] == 4
    page = (kept.output / "report.html").read_text()
    assert page.count("data:image/") >= 6 and "mae_vit_tiny" in page
    (session,) = json.loads((kept.output / "environment.json").read_text())
    assert session["step"] == 0 and session["device"] == "CPU" and session["mindspore"]


def test_a_report_changes_nothing_of_the_run(kept):
    """Weights bit for bit, and losses, are those of a run without reports."""
    output = kept.recipe.parent / "without"
    run(kept.recipe, output, "--report-every", "null")
    assert [r["loss"] for r in records(output)] == [r["loss"] for r in records(kept.output)]
    with_reports, without = (read_checkpoint(path).weights() for path in (kept.output, output))
    assert with_reports.keys() == without.keys()
    assert all(np.array_equal(with_reports[n], without[n]) for n in without)
    assert not (output / "report.html").exists() and not (output / "report").exists()


def test_a_complete_run_gets_the_report_that_it_lacks(kept, tmp_path, capsys):
    """What a kill during the last report left out is made by the same command; one that is there stays."""
    output = tmp_path / "run"
    shutil.copytree(kept.output, output)
    shutil.rmtree(snapshot_path(output, 4))
    (output / "report.html").unlink()
    run(kept.recipe, output)
    assert (output / "report.html").exists() and snapshot_path(output, 4).is_dir()
    stamp = (output / "report.html").stat().st_mtime_ns
    run(kept.recipe, output)
    assert (output / "report.html").stat().st_mtime_ns == stamp


def test_a_report_that_fails_is_told_and_the_run_goes_on(kept, tmp_path, capfd, monkeypatch):
    """A full disk or an operator without memory costs the report, not the run; nothing half written stays."""

    def fail(self, folder):
        (folder / "half.png").write_bytes(b"")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Snapshots, "contents", fail)
    output = tmp_path / "run"
    run(kept.recipe, output)
    assert read_checkpoint(output).step == 4
    assert "step 2: no report, cannot write" in capfd.readouterr().err
    assert list((output / "report").iterdir()) == []


def test_knn_needs_labels(kept, tmp_path):
    """data.val_dir asks for k-NN: images without classes are refused before the run begins."""
    with pytest.raises(UserError, match=r"data\.val_dir, for k-NN at each report: .*expected class folders"):
        run(kept.recipe, tmp_path / "run", "--data.dir", str(kept.recipe.parent / "train" / "a"))
    assert not (tmp_path / "run").exists()
