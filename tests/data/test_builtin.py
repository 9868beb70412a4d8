"""The built-in images: pure in their parameters, written once, and told apart by structure and not by pixels."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from localmim import cli
from localmim.data import builtin
from localmim.data.builtin import CLASSES, draw_image, main, write_builtin_images
from localmim.errors import UserError
from localmim.evaluation.knn import weighted_knn

SMALL = {"size": 32, "train_per_class": 2, "val_per_class": 1, "progress": False}


def _files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_image_depends_on_its_arguments_only():
    """Each image has its own random stream, so the order of drawing must not matter and every argument must."""
    first = draw_image("fish", 3, seed=1, size=48)
    assert first.shape == (48, 48, 3) and first.dtype == np.uint8
    draw_image("gear", 0)
    np.testing.assert_array_equal(first, draw_image("fish", 3, seed=1, size=48))
    for other in (
        draw_image("fish", 4, seed=1, size=48),
        draw_image("fish", 3, seed=2, size=48),
        draw_image("fish", 3, seed=1, size=48, split="val"),
    ):
        assert np.abs(first.astype(int) - other).mean() > 5


@pytest.mark.parametrize("kind", CLASSES)
def test_every_kind_draws_at_any_size(kind):
    """Twenty draws a kind, with contrast in each: a part that falls off the canvas must not raise."""
    for index in range(20):
        assert draw_image(kind, index, size=40).std() > 4


@pytest.mark.parametrize("texture", builtin.TEXTURES, ids=lambda f: f.__name__)
def test_textures_mix_figure_and_ground(texture):
    """A texture is a coverage in [0, 1] with a fair share of both; otherwise the thing would be plain."""
    v, u = np.mgrid[-1:1:200j, -1:1:200j].astype(np.float32)
    cover = texture(u, v, 0.3, 0.5, 0.02)
    assert cover.shape == u.shape and cover.min() >= 0 and cover.max() <= 1
    assert 0.1 < cover.mean() < 0.9 and cover.std() > 0.25


def test_set_is_written_once_and_the_same_again(tmp_path):
    """Same parameters: same bytes in another folder, and no write at all in the same one."""
    first = write_builtin_images(tmp_path / "a", **SMALL)
    second = write_builtin_images(tmp_path / "deep" / "b", **SMALL)
    files = _files(first)
    assert files == _files(second)
    assert len([name for name in files if name.endswith(".jpg")]) == 10 * 3
    assert {p.name for p in (first / "train").iterdir()} == set(CLASSES)
    stamps = {p: p.stat().st_mtime_ns for p in first.rglob("*")}
    write_builtin_images(first, **SMALL)
    assert stamps == {p: p.stat().st_mtime_ns for p in first.rglob("*")}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "deep"]  # nothing left aside


def test_files_are_the_drawn_images(tmp_path):
    """The JPEG under a name is that image in RGB order (a swap of channels would show here)."""
    root = write_builtin_images(tmp_path / "set", **{**SMALL, "size": 64})
    stored = cv2.imread(str(root / "train" / "ball" / "0001.jpg"))[..., ::-1].astype(int)
    drawn = draw_image("ball", 1, size=64).astype(int)
    assert np.abs(stored.mean((0, 1)) - drawn.mean((0, 1))).max() < 1.5
    assert np.abs(stored - drawn).mean() < 8


def test_other_content_is_refused_and_kept(tmp_path):
    """Nothing that lies in the folder is ever removed or overwritten."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="not the built-in images"):
        write_builtin_images(mine, **SMALL)
    assert _files(mine) == {"photo.jpg": b"x"}

    root = write_builtin_images(tmp_path / "set", **SMALL)
    before = _files(root)
    with pytest.raises(UserError, match=r"seed 0 \(wanted 7\)"):
        write_builtin_images(root, **SMALL, seed=7)
    assert _files(root) == before
    (root / "val" / "leaf" / "0000.jpg").unlink()
    with pytest.raises(UserError, match="leaf: 0 of 1"):
        write_builtin_images(root, **SMALL)


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    """The folder appears complete or not at all, and the next call writes it."""
    empty = tmp_path / "set"
    empty.mkdir()

    def stop(kind, index, **_):
        if kind == "leaf":
            raise KeyboardInterrupt
        return np.zeros((32, 32, 3), np.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(builtin, "draw_image", stop)
        with pytest.raises(KeyboardInterrupt):
            write_builtin_images(empty, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["set"] and not any(empty.iterdir())
    write_builtin_images(empty, **SMALL)
    assert json.loads((empty / builtin.MARKER).read_text())["size"] == 32


def test_command_line(tmp_path, capsys):
    """Exit code 0 with the folder named, and 2 with one line for a wrong value."""
    root = str(tmp_path / "set")
    small = ["--size", "32", "--train-per-class", "1", "--val-per-class", "0"]
    assert cli.run(main, ["--root", root, *small]) == 0
    assert root in capsys.readouterr().out
    assert cli.run(main, ["--root", root, *small, "--seed", "-1"]) == 2
    assert capsys.readouterr().err == "error: seed: -1 is too small, expected at least 0\n"


def test_structure_tells_the_kinds_apart_and_pixels_do_not():
    """What the set is for: k-NN stays near chance (10 %) on pixels and gets far on orientations of edges."""
    names = list(CLASSES)

    def features(split, count):
        images = [draw_image(kind, i, split=split) for kind in names for i in range(count)]
        pixels, edges = [], []
        for image in images:
            grey = cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA).mean(-1).astype(np.float32)
            small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).ravel()
            pixels.append((small - small.mean()) / (small.std() + 1))
            dx, dy = cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)
            bins = np.floor(np.arctan2(dx, dy) / np.pi * 9).astype(int) % 9
            hog = np.hypot(dx, dy)[..., None] * np.eye(9, dtype=np.float32)[bins]
            hog = hog.reshape(8, 8, 8, 8, 9).mean((1, 3))  # [h, w, bins]
            edges.append((hog / (np.linalg.norm(hog, axis=-1, keepdims=True) + 5)).ravel())
        return np.array(pixels), np.array(edges), np.repeat(np.arange(len(names)), count)

    train, test = features("train", 60), features("val", 20)
    centre = train[1].mean(0)
    on_pixels = weighted_knn(train[0], train[2], test[0], test[2])["top1"]
    on_edges = weighted_knn(train[1] - centre, train[2], test[1] - centre, test[2])["top1"]
    assert on_pixels < 25
    assert on_edges > 40
