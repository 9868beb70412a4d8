"""Weighted k-NN against cases worked out by hand, its ties, its chunks and its messages."""

from __future__ import annotations

import math

import numpy as np
import pytest

from localmim.errors import UserError
from localmim.evaluation import knn
from localmim.evaluation.knn import weighted_knn


def _at(*degrees):
    """Unit vectors [n, 2] at these angles, so that a cosine can be worked out by hand."""
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)


def test_nearest_neighbour_ignores_length():
    """Features are L2-normalised: only the direction counts."""
    train = _at(0, 90, 180) * np.array([[1e-3], [1e3], [1]], np.float32)
    result = weighted_knn(train, np.array([0, 1, 2]), _at(10, 80, 170, 130), np.array([0, 1, 2, 1]), k=1)
    assert result == {"top1": 100.0, "top5": 100.0, "k": 1, "temperature": 0.07, "n_train": 3, "n_test": 4}


def test_temperature_decides_between_near_one_and_two_farther():
    """One vote at 10 degrees against two at 30: exp(cos 10 / T) beats 2 exp(cos 30 / T) only below T = 0.172."""
    train, labels = _at(10, 30, -30, 180), np.array([0, 1, 1, 2])
    limit = (math.cos(math.radians(10)) - math.cos(math.radians(30))) / math.log(2)
    for temperature, winner in ((0.95 * limit, 0), (1.05 * limit, 1)):
        result = weighted_knn(train, labels, _at(0), np.array([winner]), k=3, temperature=temperature)
        assert result["top1"] == 100.0
    result = weighted_knn(train, labels, _at(0), np.array([2]), k=3)
    assert result["top5"] == 0.0  # class 2 got no vote, though only three classes exist


def test_extreme_temperatures_stay_finite():
    """exp(1 / 1e-4) would overflow; a huge temperature counts heads."""
    train, labels, test = _at(10, 30, -30), np.array([0, 1, 1]), _at(0)
    assert weighted_knn(train, labels, test, np.array([0]), k=3, temperature=1e-4)["top1"] == 100.0
    assert weighted_knn(train, labels, test, np.array([1]), k=3, temperature=1e6)["top1"] == 100.0


def test_top5_counts_five_best_classes():
    """Seven classes in order of distance: the fifth is a hit, the sixth is not."""
    train, labels = _at(0, 10, 20, 30, 40, 50, 60), np.arange(7)
    test = np.repeat(_at(0), 7, axis=0)
    result = weighted_knn(train, labels, test, labels, k=7)
    assert result["top1"] == pytest.approx(100 / 7)
    assert result["top5"] == pytest.approx(500 / 7)


def test_ties_take_the_first_image_and_the_lower_class():
    """Equal similarities: the first k in order; equal votes: the lower label. So a repeat gives the same figure."""
    train = np.repeat(_at(0), 6, axis=0)
    test = _at(0)
    assert weighted_knn(train, np.array([3, 3, 1, 1, 1, 1]), test, np.array([3]), k=2)["top1"] == 100.0
    assert weighted_knn(train, np.array([3, 1, 1, 3, 1, 1]), test, np.array([1]), k=4)["top1"] == 100.0


def test_agrees_with_a_plain_loop_in_any_chunk(monkeypatch):
    """Random features against the definition written as a loop; cutting the test set must not change the result."""
    rng = np.random.default_rng(0)
    train, train_labels = rng.normal(size=(60, 5)), rng.integers(0, 8, 60)
    test, test_labels = rng.normal(size=(37, 5)), rng.integers(0, 8, 37)
    hits = np.zeros(2)
    for x, label in zip(test, test_labels):
        cosine = train @ x / np.linalg.norm(train, axis=1) / np.linalg.norm(x)
        votes = np.zeros(8)
        for i in np.argsort(-cosine)[:9]:
            votes[train_labels[i]] += math.exp(cosine[i] / 0.1)
        order = [c for c in np.argsort(-votes) if votes[c] > 0]
        hits += [label == order[0], label in order[:5]]
    arguments = (train, train_labels, test, test_labels)
    whole = weighted_knn(*arguments, k=9, temperature=0.1)
    assert [whole["top1"], whole["top5"]] == pytest.approx(list(100 * hits / 37))
    monkeypatch.setattr(knn, "CHUNK", 60 * 4)
    assert weighted_knn(*arguments, k=9, temperature=0.1) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 5}, "k is 5, expected 1 to the number of training images, 4"),
        ({"k": 0}, "k is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"num_classes": 3}, "a label is 3"),
        ({"test_features": np.ones((2, 3))}, "2 wide and test features 3"),
        ({"test_features": np.array([[1.0, np.nan], [1.0, 0.0]])}, "of 1 images are not finite, first at row 0"),
        ({"train_features": np.ones(4)}, "expected .images, width."),
        ({"train_labels": np.array([0, 1])}, "expected one for each of 4 rows"),
        ({"train_labels": np.array([0, 1, 2, -1])}, "whole numbers from 0"),
    ],
)
def test_wrong_input_is_one_clear_line(change, message):
    """Each mistake names the argument and what was expected."""
    good = {
        "train_features": _at(0, 90, 180, 270),
        "train_labels": np.arange(4),
        "test_features": _at(0, 90),
        "test_labels": np.arange(2),
        "k": 2,
    }
    assert weighted_knn(**good)["top1"] == 100.0
    with pytest.raises(UserError, match=message) as caught:
        weighted_knn(**{**good, **change})
    assert "\n" not in str(caught.value)
