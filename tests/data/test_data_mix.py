"""Mixed batches are what a few lines of numpy give from the same random draws, and repeat themselves exactly."""

from __future__ import annotations

import numpy as np
import pytest

from localmim.data.mix import MIX, Mix
from localmim.errors import UserError

CLASSES = 5
LABELS = np.array([0, 4, 2, 2, 1, 3], np.int32)
PARTNER = [1, 0, 3, 2, 5, 4]


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(6, 3, 20, 30)).astype(np.float32)


def soft(labels, smoothing):
    targets = np.full((len(labels), CLASSES), smoothing / CLASSES, np.float32)
    targets[np.arange(len(labels)), labels] = 1 - smoothing + smoothing / CLASSES
    return targets


def mixed(images, labels, mixup, cutmix, prob, switch_prob, smoothing, key):
    """Our own: images, targets, and what was done."""
    draw = np.random.RandomState([*key, MIX])
    first, last = soft(labels, smoothing), soft(labels[PARTNER], smoothing)
    if draw.rand() >= prob:
        return images, first, "none"
    cut = draw.rand() < switch_prob if mixup and cutmix else bool(cutmix)
    share = draw.beta(cutmix, cutmix) if cut else draw.beta(mixup, mixup)
    result = images.copy()
    if cut:
        height, width = images.shape[2:]
        h, w = int(height * np.sqrt(1 - share)), int(width * np.sqrt(1 - share))
        y, x = draw.randint(height), draw.randint(width)
        box = np.s_[:, :, max(y - h // 2, 0) : y + h // 2, max(x - w // 2, 0) : x + w // 2]
        result[box] = images[PARTNER][box]
        share = 1 - result[box][0, 0].size / (height * width)  # what the border cut off is not mixed in
    else:
        result = images * np.float32(share) + images[PARTNER] * np.float32(1 - share)
    return result, first * share + last * (1 - share), "cut" if cut else "mix"


@pytest.mark.parametrize(
    "mixup, cutmix, prob, switch_prob, smoothing, kinds",
    [
        (0.8, 0.0, 1.0, 0.5, 0.0, {"mix"}),
        (0.0, 1.0, 1.0, 0.5, 0.1, {"cut"}),
        (0.8, 1.0, 1.0, 0.5, 0.1, {"mix", "cut"}),
        (0.8, 1.0, 0.6, 0.3, 0.1, {"mix", "cut", "none"}),
    ],
)
def test_against_our_own_lines(images, mixup, cutmix, prob, switch_prob, smoothing, kinds):
    """mindcv's arithmetic: blend, box, weight after clipping, smoothed targets; and nothing is changed in place."""
    mix = Mix(CLASSES, mixup, cutmix, prob, switch_prob, smoothing, seed=7, rank=1)
    before, seen = images.copy(), set()
    for step in range(40):
        result, targets = mix(images, LABELS, 2, step)
        expected = mixed(images, LABELS, mixup, cutmix, prob, switch_prob, smoothing, (7, 2, step, 1))
        np.testing.assert_allclose(result, expected[0], atol=1e-5)
        np.testing.assert_allclose(targets, expected[1], atol=1e-6)
        assert result.dtype == targets.dtype == np.float32
        np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
        seen.add(expected[2])
    assert seen == kinds
    np.testing.assert_array_equal(images, before)


def test_how_often(images):
    """Half of the mixed batches are cut, and mixup's weight has the deviation of Beta(0.8, 0.8)."""
    mix, shares, cuts = Mix(2, 0.8, 1.0), [], 0
    ends = np.stack([np.zeros((3, 20, 30), np.float32), np.ones((3, 20, 30), np.float32)])
    for step in range(1000):
        result, _ = mix(ends, np.array([0, 1]), 0, step)
        if np.ptp(result[0]):
            cuts += 1
        else:
            shares.append(result[0].mean())
    assert cuts == pytest.approx(500, abs=80)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06) and np.std(shares) == pytest.approx(0.31, abs=0.03)


def test_only_targets(images):
    """Without mixup and cutmix the images pass, and odd batches are fine."""
    for smoothing in (0.0, 0.1):
        result, targets = Mix(CLASSES, label_smoothing=smoothing)(images[:3], LABELS[:3], 0, 0)
        np.testing.assert_array_equal(result, images[:3])
        np.testing.assert_allclose(targets, soft(LABELS[:3], smoothing), atol=1e-7)
        assert targets.dtype == np.float32


def test_repeats_itself_and_leaves_numpy_alone(images):
    """A function of (seed, epoch, step, rank); numpy's global stream goes on as if nothing had happened."""

    def result(seed=0, epoch=0, step=0, rank=0):
        return Mix(CLASSES, 0.8, seed=seed, rank=rank)(images, LABELS, epoch, step)[0].tobytes()

    np.random.seed(3)
    expected = np.random.random(3).tolist()
    np.random.seed(3)
    got = []
    first = result()
    for _ in range(3):
        got.append(np.random.random())
        assert result() == first
    assert got == expected
    assert len({first, result(seed=1), result(epoch=1), result(step=1), result(rank=1)}) == 5


def test_numpy_is_left_alone_after_an_error(images, monkeypatch):
    """Also when the call fails."""
    mix = Mix(CLASSES, 0.8)
    monkeypatch.setattr(mix, "mixup", lambda *args: np.random.random() / 0)
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    with pytest.raises(ZeroDivisionError):
        mix(images, LABELS, 0, 0)
    assert np.random.get_state()[1].tolist() == before


def test_wrong_batches(images):
    """An odd batch has an image that would meet itself; a label outside the classes would count as another one."""
    mix = Mix(CLASSES, 0.8)
    with pytest.raises(UserError, match="batch_size is 3, expected an even number"):
        mix(images[:3], LABELS[:3], 0, 0)
    for wrong in (-1, CLASSES):
        with pytest.raises(UserError, match=f"an image of class {wrong}, expected 0 to 4"):
            mix(images[:2], np.array([0, wrong], np.int32), 0, 0)
