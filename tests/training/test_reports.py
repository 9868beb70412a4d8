"""Reports of a run that goes on: they change nothing of it, are whole or not there, and nothing in them stops it."""

from __future__ import annotations

import json
import shutil
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import yaml

from localmim.analysis.history import drop_snapshots, snapshot_path
from localmim.analysis.snapshot import Snapshots
from localmim.config import load_config
from localmim.training.checkpoint import read_checkpoint
from localmim.training.loop import Run, introduction, train


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


def settings(recipe, output, *overrides):
    return load_config(["--config", str(recipe), "--output_dir", str(output), *overrides])


def run(recipe, output, *overrides):
    train(settings(recipe, output, *overrides))


@pytest.fixture(scope="module")
def kept(recipe):
    output = recipe.parent / "run"
    run(recipe, output)
    return Kept(recipe, output)


def records(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").open()]


def test_each_report_is_a_snapshot_and_a_figure_of_knn(kept):
    """Before the first step and after each epoch: pictures that exist, numbers of each block; k-NN in the records."""
    assert [r["step"] for r in records(kept.output) if "knn_top1" in r] == [2, 4]
    for step in (0, 2, 4):
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


def test_a_complete_run_gets_what_its_report_lacks(kept, tmp_path):
    """What a kill during the last report left out, the snapshot or the page, is made by the same command; no more."""
    output = tmp_path / "run"
    shutil.copytree(kept.output, output)
    page, snapshot = output / "report.html", snapshot_path(output, 4)
    shutil.rmtree(snapshot)
    run(kept.recipe, output)
    assert snapshot.is_dir() and page.stat().st_mtime >= snapshot.stat().st_mtime
    made = snapshot.stat().st_mtime_ns
    page.unlink()
    run(kept.recipe, output)
    assert page.exists() and snapshot.stat().st_mtime_ns == made
    stamp = page.stat().st_mtime_ns
    run(kept.recipe, output)
    assert page.stat().st_mtime_ns == stamp


def test_another_run_in_the_folder_has_its_own_pictures(kept, tmp_path):
    """Snapshots after the step that a run goes on from are those of another run, or are made again: they go."""
    for step in (0, 2, 4):
        shutil.copytree(snapshot_path(kept.output, step), snapshot_path(tmp_path, step))
    (tmp_path / "report" / ".step_00000004.77").mkdir()  # what a kill leaves
    drop_snapshots(tmp_path, 2)
    assert [path.name for path in sorted((tmp_path / "report").iterdir())] == ["step_00000000", "step_00000002"]


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


def test_a_knn_that_fails_is_told_and_the_run_goes_on(kept, tmp_path, capfd, monkeypatch):
    """So is k-NN: it is beside the run."""

    def fail(*given, **options):
        raise RuntimeError("no memory")

    monkeypatch.setattr("localmim.evaluation.neighbours.extract_features", fail)
    output = tmp_path / "run"
    run(kept.recipe, output, "--max_steps", "2")
    assert "no k-NN: no memory" in capfd.readouterr().err
    assert [r["step"] for r in records(output)] == [1, 2] and "knn_top1" not in records(output)[1]


def test_without_labels_there_is_no_knn(kept, tmp_path):
    """data.val_dir is where the pictures come from all the same, and the run says why there is no k-NN."""
    begun = Run(settings(kept.recipe, tmp_path / "run", "--data.dir", str(kept.recipe.parent / "train" / "a")))
    assert begun.task.labelled is None and len(begun.task.shown) == 4
    assert "no k-NN at the reports: " in "\n".join(introduction(begun))
