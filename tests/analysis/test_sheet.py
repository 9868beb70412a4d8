"""Pictures of reconstructions: each part is where it belongs, at the image's own aspect, and text has room."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from localmim.analysis import sheet
from localmim.analysis.paper import BLOCK, GAP, LINE, MARGIN, Page
from localmim.analysis.sheet import DARK, HIDDEN, PANEL, PAPER, Reconstruction, Scale, draw, palette

RNG = np.random.default_rng(0)
MASK = np.array([[1, 0], [0, 1]], np.float32)


def scale_of(kind, target, prediction, name="block 2, 8 px cells") -> Scale:
    return Scale(name, kind, np.asarray(target, np.float32), np.asarray(prediction, np.float32))


def panels_of(pixels, mask, *scales: Scale) -> list[dict[str, np.ndarray]]:
    return sheet._panels(Reconstruction("image", pixels, mask, list(scales)))


def test_pasted_pixels():
    """Where it is hidden the prediction, elsewhere the image, bit for bit where no size changes; the prediction alone
    has nothing where nothing was predicted, and NaN leaks into nothing."""
    image = RNG.integers(0, 256, (PANEL, PANEL, 3), dtype=np.uint8)
    guess = RNG.integers(0, 256, (PANEL, PANEL, 3), dtype=np.uint8)
    hidden = MASK.repeat(PANEL // 2, 0).repeat(PANEL // 2, 1)[..., None] > 0
    (panels,) = panels_of(image, MASK, scale_of("pixels", image / 255, np.where(hidden, guess / 255, np.nan)))
    assert list(panels) == ["input", "masked", "prediction", "pasted"]
    np.testing.assert_array_equal(panels["input"], image)
    np.testing.assert_array_equal(panels["masked"], np.where(hidden, HIDDEN, image))
    np.testing.assert_array_equal(panels["prediction"], np.where(hidden, guess, PAPER))
    np.testing.assert_array_equal(panels["pasted"], np.where(hidden, guess, image))


def test_stretched_to_the_image():
    """The model's square picture takes the aspect of the image, and colours end where the mask does."""
    image, red = np.full((200, 100, 3), [0, 0, 255], np.uint8), np.full((8, 8, 3), np.nan)
    red[:4, :4], red[4:, 4:] = [1, 0, 0], [1, 0, 0]
    (panels,) = panels_of(image, MASK, scale_of("pixels", image[:8, :8] / 255, red))
    assert {panel.shape for panel in panels.values()} == {(PANEL, PANEL // 2, 3)}
    pasted = panels["pasted"].reshape(2, PANEL // 2, 2, PANEL // 4, 3)
    for i in range(2):
        for j in range(2):
            assert (pasted[i, :, j] == ([255, 0, 0] if MASK[i, j] else [0, 0, 255])).all()


def test_a_cell_that_is_hidden_in_part():
    """It is predicted as a whole; pasted are its hidden patches."""
    image = np.full((64, 64, 3), 9, np.uint8)
    (panels,) = panels_of(image, MASK, scale_of("codebook", [[3]], [[5]]))
    half, colour = PANEL // 2, palette(np.array([[5]]))[0, 0]
    assert (panels["prediction"] == colour).all()
    assert (panels["pasted"][:half, :half] == colour).all() and (panels["pasted"][:half, half:] == 9).all()
    assert (panels["target"] == palette(np.array([[3]]))[0, 0]).all()


def test_outside_the_windows():
    """What a model does not look at is pale, neither hidden nor predicted."""
    image = np.full((64, 64, 3), 55, np.uint8)
    mask = np.array([[1, 0], [np.nan, np.nan]], np.float32)
    (panels,) = panels_of(image, mask, scale_of("codebook", np.zeros((2, 2)), [[1, np.nan], [np.nan, np.nan]]))
    half = PANEL // 2
    for title in ("masked", "pasted"):
        assert (panels[title][half:] == 205).all() and (panels[title][:half, half:] == 55).all()
    assert (panels["prediction"][half:] == PAPER).all()


def test_hog_is_drawn_over_the_image():
    """The target over a dim grey image, the prediction over the dark, visible patches of the pasted one in colour."""
    hog, guess = np.zeros((2, 2, 1, 4)), np.full((2, 2, 1, 4), np.nan)
    hog[..., 0], guess[0, 0], guess[1, 1] = 1.0, [0, 0, 1, 0], [0, 0, 0, 0]
    image = np.full((64, 64, 3), [0, 0, 255], np.uint8)
    (panels,) = panels_of(image, MASK, scale_of("hog", hog, guess))
    half = PANEL // 2
    assert panels["target"].max() == 255 and panels["target"].min() == round(255 / 3 * sheet.DIM)
    assert panels["prediction"][:half, :half].max() == 255 and (panels["prediction"][half:, half:] == DARK).all()
    assert (panels["prediction"][:half, half:] == PAPER).all()
    assert (panels["pasted"][:half, half:] == [0, 0, 255]).all()
    np.testing.assert_array_equal(panels["pasted"][:half, :half], panels["prediction"][:half, :half])


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_number_of_channels(channels):
    """Of one or two the first is grey, of more the first three are colours."""
    image = RNG.integers(0, 256, (PANEL, PANEL, channels), dtype=np.uint8)
    (panels,) = panels_of(image, MASK, scale_of("pixels", image / 255, image / 255))
    expected = image[..., :3] if channels > 2 else image[..., :1].repeat(3, -1)
    np.testing.assert_array_equal(panels["prediction"], expected)


def test_palette():
    """An id has one colour wherever it is; neighbouring ids are far apart, and none is grey like what is hidden."""
    ids = np.arange(512).reshape(16, 32)
    colours = palette(ids).reshape(-1, 3).astype(int)
    assert (palette(ids.T).reshape(32, 16, 3) == palette(ids).transpose(1, 0, 2)).all()
    assert np.abs(np.diff(colours, axis=0)).sum(1).min() > 60
    assert np.ptp(colours, axis=1).min() > 40 and len(np.unique(colours, axis=0)) > 400


def draw_some(path, scales: int, names=("first", "second")) -> np.ndarray:
    """The page of two images, one wide, one high, with some scales of two kinds: RGB."""
    found = []
    for name, size in zip(names, ((60, 90), (90, 60))):
        cells = [2 ** (scales - k) for k in range(scales)]
        parts = [scale_of("codebook", np.ones((c, c)), np.full((c, c), 2.0), f"scale {c}") for c in cells]
        found.append(Reconstruction(name, np.full((*size, 3), [0, 0, 255], np.uint8), MASK, parts))
    return cv2.imread(str(draw(found, path)))[..., ::-1]


@pytest.mark.parametrize("scales", [1, 3])
def test_page(tmp_path, scales):
    """Panels are where the layout says, pixel by pixel, of both shapes, in one column as wide as the widest."""
    page = draw_some(tmp_path / "new" / "page.png", scales)
    columns = 5 if scales == 1 else 4
    assert page.shape[1] == 2 * MARGIN + columns * PANEL + (columns - 1) * GAP
    top, (high, wide) = MARGIN + (2 if scales == 1 else 3) * LINE, (PANEL * 2 // 3, PANEL)
    assert (page[top : top + high, MARGIN : MARGIN + wide] == [0, 0, 255]).all()
    below = top + high + GAP + (LINE if scales > 1 else BLOCK + LINE)
    left = MARGIN if scales > 1 else MARGIN + (PANEL - high) // 2  # of several scales the masked image stands there
    corner = page[below, left]
    assert (corner == ([HIDDEN] * 3 if scales > 1 else [0, 0, 255])).all()
    assert (page[below - 1, left] == 255).all() and (page[below, left - 1] == 255).all()
    pasted = page[top : top + high, -MARGIN - wide : -MARGIN]
    assert (pasted[: high // 2, : wide // 2] == palette(np.array([[2]]))[0, 0]).all()
    assert (pasted[: high // 2, wide // 2 :] == [0, 0, 255]).all()


def test_names_of_files(tmp_path, recwarn):
    """A long name is shortened in its middle and stays on the page; letters without a font, formulas and bytes that
    are no letters neither warn nor end the program."""
    page = draw_some(tmp_path / "page.png", 1, ("x" * 400 + "0001.png", "房\udcff$x_1$\n.png"))
    assert (page[:, -MARGIN:] == 255).all() and (page[:, :MARGIN] == 255).all()
    text = Page(500).shortened("beginning_" + "x" * 400 + "_end.png", 300)
    assert text.startswith("beginning") and text.endswith("end.png") and "…" in text
    assert Page(500).length(text) <= 300 < Page(500).length(text + "xxxx")
    assert not recwarn.list


def test_legend(tmp_path):
    """It says what is drawn: the scale where there is one, the normalisation, windows; and it wraps."""
    pixels = scale_of("pixels", np.zeros((4, 4, 3)), np.zeros((4, 4, 3)))
    found = Reconstruction("image", np.zeros((8, 8, 3), np.uint8), MASK, [pixels])
    assert sheet._legend(found).startswith("Block 2, 8 px cells. Prediction")
    assert "deviation" not in sheet._legend(found) and "Pale" not in sheet._legend(found)
    windows = found._replace(mask=np.where(MASK > 0, 1, np.nan), scales=[pixels._replace(normalised=True)] * 2)
    said = sheet._legend(windows)
    assert said.startswith("Prediction") and "mean and the deviation" in said and "Pale: outside" in said
    lines = Page(500).wrapped(said, 300)
    assert " ".join(lines) == said and all(Page(500).length(line) <= 300 for line in lines)
