"""The report of a run: its numbers are those of the files, and no damage to a file keeps its page from being made."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from run_folders import SESSION, recipe_of, record, write_run, write_snapshot

from localmim.analysis import album
from localmim.analysis.history import labels, read_run
from localmim.analysis.markup import Html, join, tag
from localmim.analysis.page import state
from localmim.analysis.report import POINTS, numbers_of, write_report
from localmim.errors import UserError


def _text(page: str) -> str:
    """What a reader sees, more or less: without tags, styles and figures."""
    return re.sub(r"<wbr>|(?s:<(style|svg).*?</\1>)|<[^>]+>", "", page)


def test_numbers_by_hand(tmp_path):
    """Three records of unequal length: each counts by its steps, the speed is a median, a count is the last one."""
    lines = [
        record(10, step_s=4.0, data_wait_s=1.0, images_per_s=16.0, loss=3.0, knn_top1=10.0),
        record(20, step_s=2.0, data_wait_s=0.2, images_per_s=32.0, loss="nan", skipped=2),
        record(40, step_s=1.0, data_wait_s=0.1, images_per_s=64.0, loss=1.5, skipped=3, bad_images=7, knn_top1=30.5),
    ]
    run = write_run(tmp_path / "run", lines, snapshots=(20, 40))
    page = write_report([run])
    assert page == run / "report.html"
    found = json.loads((run / "report.json").read_text())["runs"][0]
    assert (found["label"], found["task"], found["model"]) == ("run", "pretrain", "mae_vit_tiny_patch16_224")
    assert (found["steps"], found["planned_steps"]) == (40, 40)
    assert found["training_s"] == 10 * 4 + 10 * 2 + 20 * 1
    assert found["data_wait_share"] == pytest.approx((10 + 2 + 2) / 80)
    assert (found["images_per_s"], found["loss_first"], found["loss_last"]) == (32, 3, 1.5)
    assert (found["skipped"], found["unreadable_images"]) == (3, 7)
    assert found["measures"][0]["points"] == [[10, 10.0], [40, 30.5]]
    assert found["series"]["step"] == [10, 20, 40] and found["series"]["loss"] == [3, "nan", 1.5]
    np.testing.assert_allclose(found["series"]["data_wait_share"], [0.25, 0.1, 0.1])
    assert found["series"]["loss_names"] == ["block 1, 8 px cells", "block 3, 16 px cells"]
    np.testing.assert_allclose(found["layers"][1]["nmi"], [0.2, 0.2, 0.2])
    assert found["layers"][1]["distance_px"] == [9, 12, 22]
    assert set(found["chosen"]) == {"task", "epochs", "batch_size", "model.name", "model.image_size"}
    said = _text(page.read_text())
    for words in ("finished", "40 of 40", "3 → 1.5", "10.0 → 30.5", "17.5", "1 min 20 s", "fish/0001.jpg"):
        assert words in said


def test_long_curves_are_means_over_stretches(tmp_path):
    """A page of a long run must stay small, and what is drawn stay true: means, but the last of a count."""
    run = write_run(tmp_path / "run", [record(s, loss=float(s), skipped=s) for s in range(1, 2 * POINTS + 1)])
    series = numbers_of(read_run(run, "run"))["series"]
    assert series["step"] == series["skipped"] == list(range(2, 2 * POINTS + 1, 2))
    assert series["loss"] == [s - 0.5 for s in series["step"]]


def test_everything_named_by_a_user_is_escaped(tmp_path):
    """Names of runs, images and commands may hold <, & and quotes; none may become HTML."""
    wicked = "<script>alert('1 & \"2\"')"
    run = write_run(tmp_path / f"a{wicked}", [record(10)], recipe_of(init=wicked, output_dir=wicked))
    write_snapshot(run, 10, name=wicked)
    (run / "environment.json").write_text(json.dumps([SESSION | {"command": wicked, "processor": wicked}]))
    page = write_report([run]).read_text()
    assert "<script" not in page
    assert _text(page).count("&lt;script&gt;alert(&#x27;1 &amp; &quot;2&quot;&#x27;)") >= 7
    assert tag("p", "<", Html("<b>"), title='"', class_="x", id=None) == '<p title="&quot;" class="x">&lt;<b></p>'
    assert join("&", ["<", Html("<br>")]) == "&amp;&lt;<br>"


def test_damage_is_named_and_left_out(tmp_path):
    """A killed run leaves a torn line, a full disk torn pictures: the page says which, and shows the rest."""
    run = write_run(tmp_path / "run", [record(10), record(20)], snapshots=(10, 20, 30))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('[1]\n{"step": "9"}\n{"step": 1e999}\n{"step": 30, "lo')
    (run / "environment.json").write_text("{")
    (run / "eval_step_00000020.json").write_text("[]")
    (run / "config.yaml").write_text("- 1")
    (run / "report/step_00000010/reconstruction_0.png").write_bytes(b"")
    (run / "report/step_00000020/snapshot.json").write_text("")
    about = {"step": 30, "attention": [{"picture": "../../metrics.jsonl"}, 3], "numbers": {"layers": ["block 1"]}}
    (run / "report/step_00000030/snapshot.json").write_text(json.dumps(about))
    said = _text(write_report([run]).read_text())
    for words in (
        "metrics.jsonl: 4 of 6 lines are no record of a step and are left out",
        "config.yaml is no recipe",
        "environment.json is damaged",
        "eval_step_00000020.json is damaged",
        "step_00000010: reconstruction_0.png is missing or damaged",
        "step_00000020: snapshot.json is damaged",
        "step_00000030: a picture without a file name",
        "step_00000030: numbers of layers that do not fit together",
    ):
        assert words in said


def test_little_is_recorded(tmp_path):
    """A run of another version, or of one step that is not finite: what is missing is said, nothing fails."""
    run = write_run(tmp_path / "run", [{"step": 1, "loss": "inf", "loss_scales": ["nan"]}], {})
    said = _text(write_report([run]).read_text())
    assert "What could not be read" not in said and said.count("not recorded") >= 5
    found = json.loads((run / "report.json").read_text())["runs"][0]
    assert found["planned_steps"] is None and found["loss_last"] == "inf"


@pytest.mark.parametrize(
    ("recipe", "step", "words"),
    [
        ({"epochs": 4}, 20, "unfinished: 50 % of the steps"),
        ({"epochs": 4, "max_steps": 20}, 20, "finished"),
        ({"epochs": "many"}, 20, "20 steps"),
    ],
)
def test_whether_it_is_finished(tmp_path, recipe, step, words):
    """By the recipe's epochs and max_steps; where these are unknown nothing is claimed."""
    run = write_run(tmp_path / "run", [record(step)], recipe)
    assert _text(state(numbers_of(read_run(run, "run")))) == words


def test_several_runs(tmp_path):
    """Side by side: figures and differing keys are columns, what they share stands once, labels tell them apart."""
    first = write_run(tmp_path / "a" / "run", [record(10), record(40)], snapshots=(10, 40))
    older = recipe_of(seed=3)
    del older["report_every"]  # a key that this version did not have, at its default in the other run
    second = write_run(tmp_path / "b" / "run", [record(10)], older, snapshots=(10,))
    page = write_report([first, second])
    assert page == first / "comparison.html" and page.with_suffix(".json").exists()
    text = page.read_text()
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    rows = [[_text(cell) for cell in row] for row in rows]
    assert ["", "a/run", "b/run"] in rows and ["Steps", "40 of 40", "10 of 40"] in rows
    assert ["seed", "0", "3"] in rows and ["epochs", "4"] in rows
    assert not any(row[0] == "report_every" for row in rows)
    assert text.count("<img") == 6 and "step 40" in text


def test_labels_are_as_short_as_can_be(tmp_path):
    """Runs of one name are told apart by the folders above them."""
    paths = [tmp_path / name for name in ("x/one/run", "x/two/run", "y/two/run")]
    assert labels(paths[:1]) == ["run"]
    assert labels(paths[:2]) == ["one/run", "two/run"]
    assert labels(paths) == ["x/one/run", "x/two/run", "y/two/run"]


def test_many_snapshots_are_thinned(tmp_path, monkeypatch):
    """Newest and first stay, as many as the page can hold; the page says that there are more."""
    run = write_run(tmp_path / "run", [record(90)], snapshots=tuple(range(10, 100, 10)))
    text = write_report([run]).read_text()
    assert text.count("<img") == 16 and "8 of 9 snapshots are shown" in text
    monkeypatch.setattr(album, "MOST_BYTES", 50_000)
    shown = album.Album([read_run(run, "run")]).shown[0]
    assert 1 <= len(shown) < 8 and shown[-1].step == 90


@pytest.mark.parametrize("case", ["missing", "no run", "no step", "twice", "out", "disk"])
def test_one_line_errors(tmp_path, case):
    """A user's mistake is one line that names the folder or file."""
    run = write_run(tmp_path / "run", [record(10)])
    (tmp_path / "empty").mkdir()
    fresh = write_run(tmp_path / "fresh", [])
    runs, out, message = {
        "missing": ([], "", "no run is named"),
        "no run": ([run, tmp_path / "empty"], "", "empty is no run: it holds no metrics.jsonl"),
        "no step": ([fresh], "", "fresh/metrics.jsonl holds no step yet"),
        "twice": ([run, run / "."], "", "is named twice"),
        "out": ([run], tmp_path / "page.pdf", "page.pdf, expected a file that ends in .html"),
        "disk": ([run], run / "metrics.jsonl" / "page.html", "cannot write .*page.html"),
    }[case]
    with pytest.raises(UserError, match=message) as caught:
        write_report(runs, out)
    assert "\n" not in str(caught.value)
