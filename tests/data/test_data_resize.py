"""Resizing of 8 bit images is Pillow's to the bit, and parts, mirrors and any channels come out as by themselves."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from mindspore.dataset import vision
from PIL import Image

from localmim.data.resize import normalise, resize, resized_lines, to_image, to_lines

SIZES = [(1, 1), (2, 3), (5, 400), (48, 60), (64, 64), (131, 77), (300, 451)]


@pytest.fixture(scope="module")
def noisy():
    return np.random.default_rng(0).integers(0, 256, (320, 460, 3)).astype(np.uint8)


@pytest.mark.parametrize("H, W", SIZES)
def test_minddata_has_it_too(noisy, H, W):
    """An implementation of the same rule that was not written here: larger, smaller, thin, of one pixel."""
    image = np.ascontiguousarray(noisy[:H, :W])
    for size in ((64, 64), (1, 90), (130, 7)):
        found = to_image(resized_lines(image, size))
        np.testing.assert_array_equal(found, vision.Resize(size, vision.Inter.PILCUBIC)(image))


def test_pillow_has_it_for_every_length():
    """Windows of every length up to 300 px, at both ends: Pillow's own weights, with no step of the rounding aside."""
    row = np.random.default_rng(1).integers(0, 256, (1, 300)).astype(np.uint8)
    for length in range(1, 301):
        part = row[:, :length]
        expected = np.asarray(Image.fromarray(part).resize((56, 1), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(resized_lines(part[..., None], (1, 56))[:, 0], expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 12])
def test_parts_and_mirrors(channels):
    """A view into a larger image and `mirrored` give what a copy, and a copy that is mirrored, give."""
    image = np.random.default_rng(2).integers(0, 256, (90, 120, channels)).astype(np.uint8)
    part, size = image[11:83, 20:97], (32, 48)
    plain = resized_lines(part.copy(), size)
    assert plain.shape == (32, channels, 48)
    np.testing.assert_array_equal(resized_lines(part, size), plain)
    mirror = resized_lines(part[:, ::-1].copy(), size)
    np.testing.assert_array_equal(resized_lines(part, size, mirrored=True), mirror)
    assert (mirror != plain).any()
    planes = np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)  # as CIFAR lies in memory
    np.testing.assert_array_equal(resized_lines(planes[11:83, 20:97], size), plain)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 3, 12])
def test_lines(dtype, channels):
    """Rows of each channel, there and back, and normalised as numpy does, to the bit."""
    image = np.random.default_rng(3).integers(0, 256, (7, 9, channels)).astype(dtype)
    lines = to_lines(image)
    np.testing.assert_array_equal(lines, image.transpose(0, 2, 1))
    np.testing.assert_array_equal(to_image(lines), image)
    shift, scale = np.random.default_rng(4).random((2, channels), np.float32)
    out = np.empty((channels, 7, 9), np.float32)
    normalise(lines, shift, scale, out)
    np.testing.assert_array_equal(out, (image.transpose(2, 0, 1) - shift[:, None, None]) * scale[:, None, None])


def test_float_images_are_not_rounded(noisy):
    """The same sums without 8 bits in between: within a level and a half of them where nothing is cut off."""
    image = noisy // 2 + 64
    found = resize(image.astype(np.float32), (50, 61))
    assert found.dtype == np.float32
    assert np.abs(found - resize(image, (50, 61))).max() < 1.5
    flat = resize(cv2.merge([np.full((9, 8), 0.3, np.float32)] * 3), (31, 4))
    np.testing.assert_allclose(flat, 0.3, rtol=1e-6)
