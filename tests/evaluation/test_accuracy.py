"""Counting hits: ties, ranks, short batches, what cannot be read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from mindspore import Tensor, nn

from localmim.config import DataConfig
from localmim.data.sources import ArraySource
from localmim.distributed import Ranks
from localmim.errors import UserError
from localmim.evaluation.accuracy import accuracy, class_numbers, score


class Grey(nn.Cell):
    """Logits that favour the class of an image's brightness, which the tests choose."""

    def __init__(self, classes: int):
        super().__init__()
        self.encoder = SimpleNamespace(image_size=(8, 8), in_chans=3)
        self.places = Tensor(np.arange(classes, dtype=np.float32))

    def construct(self, images):
        brightness = images.mean(axis=(1, 2, 3)).reshape(-1, 1) * 10
        return -((brightness - self.places.reshape(1, -1)) ** 2)


CONFIG = DataConfig(mean=[0.0] * 3, std=[1.0] * 3, workers=1)


def grey_images(values) -> list[np.ndarray]:
    return [np.full((8, 8, 3), v / 10, np.float32) for v in values]


class Gathered(Ranks):
    """Ranks whose totals are put aside instead of being added up."""

    seen: ClassVar[list] = []

    def total(self, values):
        self.seen.append(values)
        return values


def test_top_one_and_top_five():
    """Hits by rank of the own logit; the first of equal logits wins; cross-entropy is the mean."""
    logits = np.asarray([[0, 1, 2, 3, 4, 5, 6.0]] * 4)
    hits, hits5, loss, images = score(logits, np.asarray([6, 2, 1, 0]))
    assert (hits, hits5, images) == (1, 2, 4)
    expected = [np.log(np.exp(logits[0]).sum()) - logits[0, k] for k in (6, 2, 1, 0)]
    assert loss == pytest.approx(sum(expected))
    ties = np.zeros((2, 7))
    assert score(ties, np.asarray([0, 1]))[:2].tolist() == [1, 2]
    assert score(ties, np.asarray([5, 6]))[:2].tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore:invalid value")
def test_logits_that_are_not_finite_are_misses():
    """A broken model must not score by luck."""
    logits = np.asarray([[np.nan, 0.0, 0], [0, np.inf, 0]])
    assert score(logits, np.asarray([0, 1]))[:2].tolist() == [0, 0]


def test_a_short_last_batch_is_counted_once():
    """Eleven images in batches of four: the zeros that fill up the last batch count for nothing."""
    labels = np.arange(11) % 6
    source = ArraySource(grey_images(labels), labels)
    result = accuracy(Grey(6), source, CONFIG, batch_size=4, bar=False)
    assert result["images"] == 11 and result["unreadable"] == 0
    assert result["top1"] == 100 and result["top5"] == 100
    wrong = ArraySource(grey_images((labels + 1) % 6), labels)
    assert accuracy(Grey(6), wrong, CONFIG, batch_size=4, bar=False)["top1"] == 0


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_images_and_count_each_once(world):
    """Parts of unequal length add up to the whole; more ranks than a multiple changes nothing."""
    rng = np.random.default_rng(0)
    labels, shown = rng.integers(0, 6, 11), rng.integers(0, 6, 11)
    source = ArraySource(grey_images(shown), labels)
    whole = accuracy(Grey(6), source, CONFIG, batch_size=2, bar=False)
    Gathered.seen = []
    for rank in range(world):
        accuracy(Grey(6), source, CONFIG, batch_size=2, ranks=Gathered(rank, world), bar=False)
    hits, hits5, loss, images, unreadable = np.sum(Gathered.seen, axis=0)
    assert images == 11 and unreadable == 0 and len(Gathered.seen) == world
    assert whole["top1"] == pytest.approx(100 * hits / images)
    assert whole["top5"] == pytest.approx(100 * hits5 / images)
    assert whole["loss"] == pytest.approx(loss / images)


def test_classes_are_matched_by_name():
    """A validation folder with some of the classes, in its own order of numbers."""
    source = ArraySource(grey_images([4, 2]), [0, 1], ["d", "b"])
    numbers = class_numbers(source, ["a", "b", "c", "d"], "val")
    assert numbers.tolist() == [3, 1]
    shown = ArraySource(grey_images([3, 1]), [0, 1], ["d", "b"])
    assert accuracy(Grey(4), shown, CONFIG, numbers=numbers, bar=False)["top1"] == 100
    with pytest.raises(UserError, match="val has the class 'b'"):
        class_numbers(source, ["a", "d"], "val")


def test_a_list_has_numbers_for_classes():
    """A flat folder with a list of numbers fits a classifier of named folders by the folders' order."""
    listed = ArraySource(grey_images([2, 0]), [2, 0], ["0", "1", "2"])
    assert class_numbers(listed, ["ant", "bee", "cat", "dog"], "val.txt").tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"val\.txt has the class '0'"):
        class_numbers(listed, ["ant", "bee"], "val.txt")
