"""Damaged JPEG files that end the process or hang inside MindData must be caught before it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from data_images import draw, jpeg
from mindspore.dataset import vision

from localmim.data.jpeg import is_plain_jpeg
from localmim.data.sources import UnreadableImage, for_minddata


def as_bytes(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8)


def segment(raw: bytes, marker: int) -> int:
    """Where the first segment with a marker begins."""
    return raw.index(bytes([0xFF, marker]))


def test_usual_files_pass():
    """Colour, grey, restart intervals, optimised tables, zero padding: all go to MindData as they are."""
    bgr = draw(0)[..., ::-1]
    for image, options in [
        (bgr, []),
        (bgr[..., 0], []),
        (bgr, [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]),
        (bgr, [cv2.IMWRITE_JPEG_OPTIMIZE, 1, cv2.IMWRITE_JPEG_QUALITY, 30]),
    ]:
        raw = cv2.imencode(".jpg", image, options)[1]
        assert is_plain_jpeg(raw) and for_minddata(raw) is raw
    assert is_plain_jpeg(as_bytes(jpeg(draw(0)) + b"\0" * 7))


def test_unusual_but_readable_files_come_as_bmp():
    """A progressive file, and one with something behind its end, decode to the same pixels."""
    plain, progressive = (
        cv2.imencode(".jpg", draw(0), [cv2.IMWRITE_JPEG_PROGRESSIVE, flag])[1] for flag in (0, 1)
    )  # fmt: skip
    for raw in (progressive, as_bytes(plain.tobytes() + b"appended")):
        assert not is_plain_jpeg(raw)
        handed = for_minddata(raw)
        assert handed[:2].tobytes() == b"BM"
        np.testing.assert_array_equal(cv2.imdecode(handed, 1), cv2.imdecode(raw, 1))


@pytest.mark.parametrize(
    "marker, offset, value",
    [
        (0xC4, 16, 0xB4),
        (0xC4, 4, 0x20),
        (0xC4, 5, 0xFF),
        (0xC0, 11, 0x00),
        (0xC0, 5, 0x00),
        (0xDB, 4, 0x05),
        (0xDA, 6, 0x77),
    ],
)
def test_damaged_headers_do_not_pass(marker, offset, value):
    """One changed byte in Huffman tables, frame, quantisation tables or scan; the first one crashes MindData."""
    raw = bytearray(jpeg(draw(0)))
    raw[segment(bytes(raw), marker) + offset] = value
    if marker == 0xC0 and offset == 5:
        raw[segment(bytes(raw), marker) + 6] = value  # a height of 0
    assert not is_plain_jpeg(as_bytes(bytes(raw)))


def test_every_truncation_is_refused():
    """Whatever is missing at the end; some of these lengths hang MindData, others divide by zero in it."""
    raw = jpeg(draw(17))
    for length in range(len(raw)):
        with pytest.raises(UnreadableImage):
            for_minddata(as_bytes(raw[:length]))


def test_random_damage_never_crashes_minddata():
    """600 files with up to five changed bytes: each is refused here, or MindData returns from it."""
    base = jpeg(draw(3))
    crop = vision.RandomCropDecodeResize((24, 32), (0.2, 1.0))
    returned = 0
    for k in range(600):
        rng = np.random.default_rng(k)
        raw = np.array(as_bytes(base))
        raw[rng.integers(0, 700 if k % 2 else len(raw), rng.integers(1, 6))] = rng.integers(0, 256)
        try:
            handed = for_minddata(raw)
        except UnreadableImage:
            continue
        assert crop(handed).shape == (24, 32, 3)
        returned += 1
    assert 100 < returned < 600
