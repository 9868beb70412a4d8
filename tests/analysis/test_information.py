"""Normalised mutual information on attention made by hand, and the command that compares models by it."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from tiny_run import write_tiny

from localmim.analysis.attention import Layer, Window
from localmim.analysis.information import layer_information, layer_numbers, nmi, normalised_mutual_information
from localmim.errors import UserError


def test_by_hand():
    """Uniform 0, one-to-one 1, all to one patch 0, pairs among themselves a half; a random case in plain loops."""
    even, pairs = np.full((4, 4), 0.25), np.kron(np.eye(2), np.full((2, 2), 0.5))
    one, mixed = np.eye(4)[[2, 0, 3, 1]], np.eye(4)[[0, 0, 0, 0]]
    found = normalised_mutual_information(np.stack([even, one, mixed, pairs]))
    np.testing.assert_allclose(found, [0, 1, 0, 0.5], atol=1e-12)
    p = np.random.default_rng(0).dirichlet(np.ones(5), size=5)
    keys = p.mean(axis=0)
    information = sum(p[q, k] / 5 * np.log(p[q, k] / keys[k]) for q in range(5) for k in range(5))
    expected = information / np.sqrt(np.log(5) * -(keys * np.log(keys)).sum())
    assert normalised_mutual_information(p) == pytest.approx(expected, rel=1e-12)
    assert normalised_mutual_information(np.ones((1, 1))) == 0


def test_uniform_in_float32_is_nothing():
    """Rounding must not look like information, nor make a root of a negative number."""
    found = normalised_mutual_information(np.full((2, 196, 196), np.float32(1 / 196)))
    assert (found >= 0).all() and (found < 1e-6).all()
    sure = np.zeros((49, 49), np.float32)
    sure[:, 0], sure[0, 0] = 1, np.nextafter(np.float32(1), 0)
    assert 0 <= normalised_mutual_information(sure) < 1e-3


def test_windows_weigh_by_their_queries():
    """A one-to-one window of four, an even one of two, and one of a single patch, which counts for nothing."""
    windows = [
        Window(np.array([0, 1, 2, 3]), np.stack([np.eye(4), np.full((4, 4), 0.25)])[None]),
        Window(np.array([4, 5]), np.full((1, 2, 2, 2), 0.5)),
        Window(np.array([6]), np.ones((1, 2, 1, 1))),
    ]
    np.testing.assert_allclose(layer_information(Layer("", (1, 7), (8, 8), windows)), [[4 / 6, 0]], atol=1e-12)
    np.testing.assert_array_equal(layer_information(Layer("", (1, 1), (8, 8), windows[2:])), [[0, 0]])


class Reader:
    """Attention of images that are named by a number: 1 is one-to-one with the neighbour, 0 is even."""

    def __init__(self):
        self.names = ["block 1"]

    def __call__(self, inputs):
        one, even = np.eye(2)[[1, 0]], np.full((2, 2), 0.5)
        weights = np.stack([one if image else even for image in inputs])[:, None]  # [B, 1, 2, 2]
        return [Layer("block 1", (1, 2), (8, 8), [Window(np.array([0, 1]), weights)])]


def test_means_over_images():
    """Each image counts once, however they fall into batches."""
    numbers = layer_numbers(Reader(), iter([np.array([1, 0]), np.array([1])]))
    assert numbers["layers"] == ["block 1"] and numbers["images"] == 3
    np.testing.assert_allclose(numbers["nmi"], [[2 / 3]])
    np.testing.assert_allclose(numbers["distance_px"], [[(8 + 4 + 8) / 3]])
    with pytest.raises(UserError, match="none of the images can be read"):
        layer_numbers(Reader(), [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models and five images, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("nmi")
    for seed in (0, 1):
        write_tiny(folder / f"run{seed}" / "weights.safetensors", seed)
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for k in range(4):
        assert cv2.imwrite(str(folder / f"images/{k}.png"), rng.integers(0, 256, (40, 50, 3), np.uint8))
    (folder / "images/9.png").write_text("no image")
    return folder


def test_command(folder):
    """Two models and the first one untrained, which here it is anyway, in one plot; numbers beside it with names."""
    ckpt = [str(folder / f"run{seed}/weights.safetensors") for seed in (0, 1)]
    path = nmi(ckpt, str(folder / "images"), 5, True, str(folder / "out/plot.png"), "CPU", 3)
    assert path == folder / "out/plot.png" and cv2.imread(str(path)).shape[1] > 1000
    runs = json.loads((folder / "out/plot.json").read_text())["runs"]
    assert [run["label"] for run in runs] == ["run0, step 7", "run1, step 7", "run0, untrained"]
    assert [run["ckpt"] for run in runs] == [*ckpt, ckpt[0]] and [run["images"] for run in runs] == [4] * 3
    values = np.array([run["nmi"] for run in runs])
    assert values.shape == (3, 2, 2) and (values > 0).all() and (values < 0.5).all()
    assert (values[0] != values[1]).all() and (values[0] == values[2]).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": 0}, "--count is 0, expected at least 1"),
        ({"batch_size": -1}, "--batch-size is -1, expected at least 1"),
        ({"out": "plot.svg"}, "--out is plot.svg, expected a file that ends in .png"),
        ({"ckpt": []}, "--ckpt is ''"),
        ({"ckpt": ["run0", "run0"]}, "--ckpt is 'run0 run0', expected different runs"),
        ({"ckpt": ["none"]}, "none does not exist"),
        ({"data_dir": "none"}, "none does not exist"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, change, said):
    """Each names what was given and what was expected; no picture is written."""
    monkeypatch.chdir(folder)
    given = {"ckpt": ["run0/weights.safetensors"], "data_dir": "images", "out": "new.png", "device": "CPU"}
    with pytest.raises(UserError, match=said) as error:
        nmi(**{**given, **change})
    assert "\n" not in str(error.value) and not (folder / "new.png").exists()
