"""Pictures: glyphs lie along edges, reconstructions show what they say, and every file is written and readable."""

from __future__ import annotations

import json

import cv2
import matplotlib
import numpy as np
import pytest

from localmim.analysis import pictures
from localmim.analysis.pictures import hog_glyphs, loss_curve, reconstruction_sheet
from localmim.data.builtin import draw_image
from localmim.errors import UserError


def _hog(image, cell, nbins=9):
    """HOG of uint8 [H, W, 3] by the definition: [H/cell, W/cell, 3, nbins]."""
    x = np.pad(image.astype(np.float64), ((1, 1), (1, 1), (0, 0)), "reflect")
    rows = x[:-2] + 2 * x[1:-1] + x[2:]
    cols = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]
    g0, g1 = rows[:, :-2] - rows[:, 2:], cols[:-2] - cols[2:]  # left minus right, top minus bottom
    bins = np.floor(np.arctan2(g0, g1) / np.pi * nbins).astype(int) % nbins
    votes = np.hypot(g0, g1)[..., None] * np.eye(nbins)[bins]  # [H, W, 3, nbins]
    H, W = image.shape[:2]
    hog = votes.reshape(H // cell, cell, W // cell, cell, 3, nbins).mean((1, 3))
    return hog / np.maximum(np.linalg.norm(hog, axis=-1, keepdims=True), 1e-12)


def _cells(images, cell):
    return np.stack([_hog(image, cell) for image in images])


@pytest.mark.parametrize("degrees", [0, 20, 45, 70, 90, 110, 135, 160])
def test_glyph_lies_along_the_edge(degrees):
    """An edge at a known slant (clockwise from the x axis, y down) must give strokes at that slant, within a bin."""
    slant = np.radians(degrees)
    y, x = np.mgrid[-31.5:32, -31.5:32]
    side = y * np.cos(slant) - x * np.sin(slant)  # distance from a line through the centre
    image = np.repeat((255 / (1 + np.exp(-side)))[..., None], 3, axis=2).astype(np.uint8)
    picture = hog_glyphs(_hog(image, 16)[1:3, 1:3], 33)  # four cells around the centre
    assert picture.shape == (66, 66, 3) and picture.dtype == np.uint8
    cells = picture[..., 0].reshape(2, 33, 2, 33).transpose(0, 2, 1, 3).reshape(4, 33, 33).astype(float)
    strongest = cells[np.argmax(cells.max((1, 2)))]
    v, u = np.mgrid[-16:17, -16:17]
    bright = np.where(strongest > 0.6 * strongest.max(), strongest, 0)
    angle = 0.5 * np.arctan2(2 * (bright * u * v).sum(), (bright * (u * u - v * v)).sum())
    off = np.degrees(angle) - degrees
    assert abs((off + 90) % 180 - 90) < 180 / 9 / 2 + 3


def test_glyph_brightness_follows_strength():
    """Brightness is the mean over channels; negative predictions and NaN are black."""
    hog = np.zeros((1, 3, 2, 4))
    hog[0, 0, :, 1] = [1.0, 0.2]
    hog[0, 1, :, 1] = -1.0
    hog[0, 2, :, 1] = np.nan
    picture = hog_glyphs(hog, 20)
    assert picture[:, :20].max() == round(255 * 0.6)
    assert picture[:, 20:].max() == 0


def test_reconstruction_takes_prediction_where_hidden_and_target_where_visible():
    """Swapping the two would make a picture that flatters; NaN at visible cells must not leak into it."""
    target, prediction = np.full((4, 4, 3), 100, np.uint8), np.full((4, 4, 3), 20, np.uint8)
    share = np.array([[1, 1, 0, 0]] * 4, np.float32)
    truth, result = pictures._pair(target, prediction, share, 280)
    assert (truth == 100).all() and (result[:, :2] == 20).all()
    assert (result[:, 2:] == round(255 + pictures.VISIBLE * (100 - 255))).all()

    hog, guess = np.zeros((1, 2, 1, 4)), np.full((1, 2, 1, 4), np.nan)
    hog[..., 0], guess[0, 0, 0, 2] = 1.0, 0.5
    truth, result = pictures._pair(hog, guess, np.array([[1.0, 0.0]]), 40)
    assert truth.max() == 255 and (truth[:, :20] == truth[:, 20:]).all()
    np.testing.assert_array_equal(result[:, :20], hog_glyphs(np.nan_to_num(guess), 20)[:, :20])
    assert result[:, 20:].min() == round(0.7 * pictures.VEIL_HOG)


def test_mask_on_finer_and_coarser_grids():
    """Fine cells repeat their patch; a coarse cell holds the hidden share of its 2 x 2 patches."""
    mask = np.array([[[1, 0], [0, 0]]], np.float32)
    np.testing.assert_array_equal(pictures._mask_at(mask, (4, 2))[0], [[1, 0], [1, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(pictures._mask_at(mask, (1, 1))[0], [[0.25]])
    with pytest.raises(ValueError, match="does not fit"):
        pictures._mask_at(mask, (3, 2))


@pytest.mark.parametrize("height", [64, 32])
def test_sheet_of_hog_and_of_pixels(tmp_path, height):
    """Both kinds of target, four scales, also on rectangular images, give a readable PNG that shows the images."""
    images = np.stack([draw_image(kind, 0, size=64)[:height] for kind in ("house", "fish")])
    masks = np.random.default_rng(0).permutation(height).reshape(1, height // 8, 8).repeat(2, 0) >= height // 4
    cells = (2, 4, 8, 16)
    names = [f"{cell} px cells" for cell in cells]
    targets = [_cells(images, cell) for cell in cells]
    for kind, truths in (("hog", targets), ("pixels", [images] * 4)):
        path = reconstruction_sheet(images, masks, truths, [t * 0.9 for t in truths], names, tmp_path / f"{kind}.png")
        sheet = cv2.imread(str(path))[..., ::-1]
        side = 64 * 5  # the first whole zoom to at least 280 pixels
        gap, head = round(0.03 * side), round(0.25 * side)
        panel = sheet[head : head + height * 5, gap : gap + side]
        np.testing.assert_array_equal(panel[2::5, 2::5], images[0])
    with pytest.raises(ValueError, match="4 targets, 3 predictions"):
        reconstruction_sheet(images, masks, targets, targets[:3], names, tmp_path / "no.png")


def _write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_loss_curve_reads_what_a_run_writes(tmp_path):
    """Other lines, a non-finite loss and a repeated step are in real files; the last line of a step counts."""
    metrics = _write(
        tmp_path / "metrics.jsonl",
        [{"event": "start"}, {"step": 3, "knn": 50.0}]
        + [{"step": s, "loss": 4 / s, "loss_scales": [3 / s, 1 / s], "lr": 1e-3 * s} for s in range(1, 200)]
        + [{"step": 5, "loss": "nan", "loss_scales": [None, "inf"]}],
    )
    records = pictures._read_losses(metrics)
    assert list(records)[:3] == [1, 2, 3] and len(records) == 199 and records[5]["loss"] == "nan"
    before = dict(matplotlib.rcParams)
    path = loss_curve(metrics, tmp_path / "new" / "loss.png", ["4 px", "8 px"])
    image = cv2.imread(str(path))
    assert image.shape[0] > 400 and image.std() > 5
    assert dict(matplotlib.rcParams) == before
    lone = _write(tmp_path / "lone.jsonl", [{"step": 1, "loss": 2.0}])
    assert cv2.imread(str(loss_curve(lone, tmp_path / "lone.png"))) is not None


def test_smoothing_is_a_mean_that_skips_gaps():
    """A straight line stays one away from the ends, and one missing value leaves no hole."""
    values = np.arange(300.0)
    values[100] = np.nan
    smooth = pictures._smooth(values)
    assert np.isfinite(smooth).all()
    np.testing.assert_allclose(smooth[120:290], values[120:290])
    assert smooth[0] == np.arange(6).mean()


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ('{"step": 1}\n', "no line with a step and a loss"), ("{\n", "line 1 is not JSON")],
)
def test_loss_curve_names_what_is_wrong(tmp_path, text, message):
    """A wrong file is one line that names it, and no picture is written."""
    metrics = tmp_path / "metrics.jsonl"
    if text is not None:
        metrics.write_text(text)
    with pytest.raises(UserError, match=message):
        loss_curve(metrics, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
