"""RandAugment is timm's, op by op as Pillow does them; crops are torchvision's, erasing has timm's shapes."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import cv2
import numpy as np
import pytest
from data_images import draw
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from localmim.data import augment
from localmim.data.augment import (
    CROP,
    ERASE,
    OPS,
    RAND_AUGMENT,
    Policy,
    RandAugment,
    RandomCrop,
    RandomErasing,
    generator,
    parse_policy,
)
from localmim.errors import UserError

FILL = (124, 116, 104)
RECIPE = "m9-mstd0.5-inc1"


@pytest.fixture(scope="module")
def noisy():
    """Dark and bright parts, fine grain, and levels 0 and 255 left out."""
    grain = np.random.default_rng(0).integers(-30, 31, (60, 80, 3))
    return np.clip(draw(1, 60, 80) * 0.7 + 20 + grain, 4, 240).astype(np.uint8)


def apply(name, image, value, interpolation="bicubic"):
    return augment.apply(name, image, value, FILL, interpolation)


def test_tables_are_pillows(noisy):
    """Each level must become what timm's users get, down to how Pillow cuts fractions off."""
    pillow = Image.fromarray(noisy)
    cases = [("AutoContrast", 0, ImageOps.autocontrast(pillow)), ("Equalize", 0, ImageOps.equalize(pillow))]
    cases.append(("Invert", 0, ImageOps.invert(pillow)))
    cases += [("Posterize", bits, ImageOps.posterize(pillow, bits)) for bits in (1, 3, 4)]
    cases += [("Solarize", level, ImageOps.solarize(pillow, level)) for level in (0, 26, 128, 256)]
    cases.append(("SolarizeAdd", 99, pillow.point([min(255, k + 99) if k < 128 else k for k in range(256)] * 3)))
    cases.append(("Posterize", 0, np.zeros_like(noisy)))  # m10; new releases of Pillow refuse it
    for factor in (0.1, 0.19, 1.0, 1.81):
        cases.append(("Brightness", factor, ImageEnhance.Brightness(pillow).enhance(factor)))
        cases.append(("Contrast", factor, ImageEnhance.Contrast(pillow).enhance(factor)))
    for name, value, expected in cases:
        result = apply(name, noisy, value)
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result, np.asarray(expected), err_msg=f"{name} {value}")


def test_flat_and_tiny_images_as_pillow():
    """One level, two levels and less than 255 pixels: the divisions that could be by zero."""
    for image in (np.full((9, 8, 3), 77, np.uint8), np.uint8([[[3, 9, 9], [3, 9, 250]]]), draw(3, 40, 30) // 128 * 99):
        pillow = Image.fromarray(image)
        np.testing.assert_array_equal(apply("AutoContrast", image, 0), np.asarray(ImageOps.autocontrast(pillow)))
        np.testing.assert_array_equal(apply("Equalize", image, 0), np.asarray(ImageOps.equalize(pillow)))


@pytest.mark.parametrize("factor", [0.1, 0.19, 1.0, 1.81])
def test_colour_and_sharpness_are_pillows(noisy, factor):
    """OpenCV rounds where Pillow cuts off, once more for the grey of Color; the rim is sharpened as Pillow does."""
    for name, enhance in (("Color", ImageEnhance.Color), ("Sharpness", ImageEnhance.Sharpness)):
        expected = np.asarray(enhance(Image.fromarray(noisy)).enhance(factor)).astype(int)
        assert np.abs(apply(name, noisy, factor) - expected).max() <= (2 if name == "Color" else 1), name
        assert factor == 1 or np.abs(expected - noisy).mean() > 3


@pytest.mark.parametrize("interpolation, limit", [("bilinear", 2), ("bicubic", 3)])
@pytest.mark.parametrize("value", [1, -1])
def test_geometry_is_pillows(interpolation, limit, value):
    """Direction, centre, half pixels and fill colour; the two pixels around where image and fill meet are left out."""
    image = cv2.GaussianBlur(draw(2, 120, 160), (0, 0), 4)
    height, width = image.shape[:2]
    pillow = Image.fromarray(image)
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]

    def affine(*matrix):
        return pillow.transform(pillow.size, Image.Transform.AFFINE, matrix, resample=method, fillcolor=FILL)

    cases = {
        ("Rotate", 27 * value): pillow.rotate(27 * value, resample=method, fillcolor=FILL),
        ("ShearX", 0.27 * value): affine(1, 0.27 * value, 0, 0, 1, 0),
        ("ShearY", 0.27 * value): affine(1, 0, 0, 0.27 * value, 1, 0),
        ("TranslateX", 0.4 * value): affine(1, 0, 0.4 * value * width, 0, 1, 0),
        ("TranslateY", 0.4 * value): affine(1, 0, 0, 0, 1, 0.4 * value * height),
    }
    for (name, amount), expected in cases.items():
        expected = np.asarray(expected)
        outside = (expected == FILL).all(-1).astype(np.uint8)
        assert outside.mean() > 0.05
        outside[[0, -1]] = outside[:, [0, -1]] = 1
        rim = cv2.dilate(outside, np.ones((5, 5))) - cv2.erode(outside, np.ones((5, 5)))
        difference = np.abs(apply(name, image, amount, interpolation) - expected.astype(int)).max(-1)
        assert difference[rim == 0].max() <= limit, name
        assert rim.mean() < 0.2, name


def test_arguments():
    """timm's ranges: what each op gets at magnitude 0, 9 and 10, in the increasing set and the plain one."""
    signed = {"Rotate": 27, "ShearX": 0.27, "ShearY": 0.27, "TranslateX": 0.405, "TranslateY": 0.405}
    for name, value in signed.items():
        for increasing in (True, False):
            assert augment.argument(name, 9, 1, increasing) == pytest.approx(value)
            assert augment.argument(name, 9, -1, increasing) == pytest.approx(-value)
            assert augment.argument(name, 0, 1, increasing) == 0
    levels = (0, 9, 10)
    for name, increasing, plain in (
        ("Posterize", (4, 1, 0), (0, 3, 4)),
        ("Solarize", (256, 26, 0), (0, 230, 256)),
        ("SolarizeAdd", (0, 99, 110), (0, 99, 110)),
    ):
        assert tuple(augment.argument(name, level, 1, True) for level in levels) == increasing
        assert tuple(augment.argument(name, level, 1, False) for level in levels) == plain
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):
        assert [augment.argument(name, level, 1, True) for level in levels] == pytest.approx([1, 1.81, 1.9])
        assert [augment.argument(name, level, -1, True) for level in levels] == pytest.approx([1, 0.19, 0.1])
        assert [augment.argument(name, level, 1, False) for level in levels] == pytest.approx([0.1, 1.72, 1.9])


def test_policy_from_text():
    """timm's notation, with and without its first word."""
    assert parse_policy(RECIPE) == parse_policy(f"rand-{RECIPE}") == Policy(9, 2, 0.5, True)
    assert parse_policy("n3-m7") == Policy(7, 3, 0, False)
    assert parse_policy("m5-inc0") == Policy(5)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("m9-x3", "its part 'x3' is unknown: expected m, n, mstd, inc"),
        ("m9-", "its part '' is unknown"),
        ("auto-m9", "its part 'auto' is unknown"),
        ("m9-m8", "which says m twice"),
        ("m11", "expected m to be a number, 0 to 10"),
        ("m9-n1.5", "expected n to be a whole number, 1 to 15"),
        ("m9-n0", "expected n to be a whole number, 1 to 15"),
        ("m9-inc2", "expected inc to be a whole number, 0 to 1"),
    ],
)
def test_wrong_policies(spec, message):
    """One line that names the key, the text and the part."""
    with pytest.raises(UserError) as error:
        parse_policy(spec)
    assert message in str(error.value) and str(error.value).startswith(f"data.rand_augment is {spec!r}, ")


def test_what_is_drawn(monkeypatch):
    """Two ops an image, each applied half of the time, all equally often, at N(9, 0.5) cut off at 10, both ways."""
    seen = []
    monkeypatch.setattr(augment, "apply", lambda name, image, value, *rest: seen.append((name, value)) or image)
    policy, image, count = RandAugment(parse_policy(RECIPE), FILL), np.zeros((4, 4, 3), np.uint8), 4000
    for sample in range(count):
        policy(image, generator(0, 0, sample, RAND_AUGMENT))
    assert len(seen) == pytest.approx(count, rel=0.05)
    times = Counter(name for name, _ in seen)
    assert set(times) == set(OPS) and len(OPS) == 15
    assert all(abs(n - count / 15) < 5 * math.sqrt(count / 15) for n in times.values())
    angles = np.array([value for name, value in seen if name == "Rotate"])
    levels = np.abs(angles) / 3
    assert (angles > 0).mean() == pytest.approx(0.5, abs=0.15)
    assert levels.mean() == pytest.approx(9, abs=0.15) and levels.std() == pytest.approx(0.5, abs=0.1)
    assert levels.max() <= 10


def test_policy_repeats_itself(noisy):
    """The result is a function of (image, seed, epoch, sample), and the image stays as it was."""
    policy, before = RandAugment(parse_policy(RECIPE), FILL), noisy.copy()

    def results(seed, epoch):
        return [policy(noisy, generator(seed, epoch, sample, RAND_AUGMENT)).tobytes() for sample in range(30)]

    first = results(0, 0)
    assert first == results(0, 0)
    assert first != results(1, 0) and first != results(0, 1) and len(set(first)) > 15
    np.testing.assert_array_equal(noisy, before)


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8)], ids=["float", "grey"])
def test_images_that_cannot_be_augmented(image):
    """Tables of 256 levels for three channels: anything else is named, not bent into shape."""
    with pytest.raises(UserError, match=r"data.rand_augment needs 8 bit colour images, but data.dir holds"):
        RandAugment(Policy(), FILL)(image, generator(0, 0, 0, RAND_AUGMENT))


def test_streams_are_apart():
    """Each of (seed, epoch, sample, purpose) has a stream of its own, also where a neighbour's would begin."""
    streams = [generator(*key) for key in itertools.product((0, 2**32 - 1), (0, 1), (0, 1, 2**31 - 1), (1, 2, 3))]
    draws = [tuple(stream.integers(2**63, size=40).tolist()) for stream in streams]
    assert len({value for row in draws for value in row}) == 40 * len(draws) == 40 * 36
    assert draws[0] == tuple(generator(0, 0, 0, 1).integers(2**63, size=40).tolist())


def test_crops_are_torchvisions():
    """Area uniform in the scale, log of the aspect uniform, places all over the image, half of them mirrored."""
    crop, image = RandomCrop((0.2, 0.5), (0.75, 4 / 3), 0.5), np.mgrid[:120, :160].transpose(1, 2, 0).astype(np.int32)
    areas, aspects, mirrored, covered, count = [], [], 0, np.zeros((120, 160)), 2000
    for sample in range(count):
        part = crop(image, generator(0, 0, sample, CROP))
        h, w = part.shape[:2]
        flipped = part[0, 0, 1] > part[0, -1, 1]
        plain = part[:, ::-1] if flipped else part
        top, left = plain[0, 0]
        np.testing.assert_array_equal(plain, image[top : top + h, left : left + w])
        assert part.flags.c_contiguous
        mirrored += flipped
        areas.append(h * w / 120 / 160)
        aspects.append(math.log(w / h))
        covered[top : top + h, left : left + w] = 1
    assert covered.any(0).all() and covered.any(1).all() and covered.mean() > 0.999
    assert mirrored == pytest.approx(count / 2, rel=0.1)
    for values, low, high, slack in ((areas, 0.2, 0.5, 0.006), (aspects, math.log(0.75), math.log(4 / 3), 0.02)):
        thirds = np.quantile(values, (0, 1 / 3, 2 / 3, 1))
        np.testing.assert_allclose(thirds, np.linspace(low, high, 4), atol=3 * slack)
        assert thirds[0] > low - slack and thirds[3] < high + slack


@pytest.mark.parametrize(
    "ratio, shape, expected",
    [
        ((1.0, 1.0), (40, 60), (0, 10, 40, 40)),
        ((1.0, 1.0), (61, 40), (10, 0, 40, 40)),
        ((1.5, 1.5), (40, 40), (6, 0, 27, 40)),
        ((0.5, 2.0), (10, 90), (0, 35, 10, 20)),
        ((0.5, 2.0), (1, 1), (0, 0, 1, 1)),
        ((100.0, 100.0), (1, 1), (0, 0, 1, 1)),
    ],
)
def test_crop_that_never_fits(ratio, shape, expected):
    """Ten tries that fail end with the largest part in the middle whose aspect is the nearest that is allowed."""
    assert RandomCrop((1.0, 1.0), ratio, 0.0).box(*shape, generator(0, 0, 0, CROP)) == expected


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_mirror_images(channels, dtype):
    """Any number of channels, 8 bit or float, and arrays that do not lie in order."""
    image = np.random.default_rng(0).integers(0, 256, (channels, 9, 7)).astype(dtype).transpose(1, 2, 0)
    for hflip, expected in ((1.0, image[:, ::-1]), (0.0, image)):
        found = RandomCrop((1.0, 1.0), (7 / 9, 7 / 9), hflip)(image, generator(0, 0, 0, CROP))
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == dtype


def test_erased_rectangles():
    """One rectangle in a quarter of the images: N(0, 1) inside, area 2 % to 1/3, aspect 0.3 to 1/0.3, all over it."""
    erase, image = RandomErasing(0.25), np.full((3, 64, 96), 9, np.float32)
    areas, aspects, values, covered, count = [], [], [], np.zeros((64, 96)), 1200
    for sample in range(count):
        result = erase(image, generator(0, 0, sample, ERASE))
        changed = (result != 9).all(0)
        if not changed.any():
            assert result is image
            continue
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert changed.sum() == h * w and (result[:, ~changed] == 9).all() and result.dtype == np.float32
        areas.append(h * w / image[0].size)
        aspects.append(h / w)
        values.append(result[:, changed].ravel())
        covered += changed
    assert len(areas) == pytest.approx(count / 4, rel=0.15) and (image == 9).all()
    assert covered.any(0).all() and covered.any(1).all()
    assert 0.018 < min(areas) < 0.04 and 0.28 < max(areas) < 0.345
    assert 0.27 < min(aspects) < 0.4 and 2 < max(aspects) < 3.5
    values = np.concatenate(values)
    assert abs(values.mean()) < 0.01 and values.std() == pytest.approx(1, abs=0.01)
    np.testing.assert_array_equal(*(erase(image, generator(0, 0, 0, ERASE)) for _ in range(2)))


def test_erasing_other_shapes():
    """Encoded grey images have no channel axis; where no rectangle fits, the image stays as it is."""
    erase = RandomErasing(1.0)
    assert (erase(np.full((32, 32), 9, np.float32), generator(0, 0, 0, ERASE)) != 9).any()
    thin = np.ones((3, 1, 500), np.float32)
    assert erase(thin, generator(0, 0, 0, ERASE)) is thin


def test_smoothing_kernel_is_pillows():
    """The kernel of Sharpness, as Pillow lists it."""
    size, scale, offset, weights = ImageFilter.SMOOTH.filterargs
    assert size == (3, 3) and offset == 0
    np.testing.assert_allclose(augment.SMOOTH.ravel(), np.asarray(weights) / scale, rtol=1e-6)
