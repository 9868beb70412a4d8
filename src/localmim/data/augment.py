"""Random crops, RandAugment and random erasing, each a pure function of (image, random generator).

`generator` makes the random numbers of one image from (seed, epoch, number of the image, purpose), so threads, batch
size, devices and restarts do not change what an image gets.

RandAugment (Cubuk et al., 2019, https://arxiv.org/abs/1909.13719) is timm's form of it, "rand-m9-mstd0.5-inc1": 15 ops,
written here with OpenCV and tables of 256 entries. It follows Pillow, which timm uses: the tables are equal, and
the rest differs by rounding, by OpenCV's bicubic kernel (a = -0.75, Pillow's is -1), and by the border of a turned or
moved image, which OpenCV blends into the fill colour and Pillow cuts. timm takes "inc0" for inc1; here it is off.

Why not mindcv 0.3's `RandAugment`, as run and compared with Pillow:
- it gives the shear factor (0.27 at m9) to an op that takes degrees, so ShearX and ShearY hardly change the image;
- it posterizes backwards: where 1 bit was to be kept, 7 are (m9), and the weakest magnitude changes most;
- it has 14 ops, SolarizeAdd is missing; its Equalize is off by up to 8 levels;
- it reads `mstd` and drops it: the deviation of the magnitude is always 0.5;
- it draws from the global `random` and numpy states, so with several threads no run can be repeated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from localmim.errors import UserError

RAND_AUGMENT, ERASE, CROP = 1, 2, 3  # purposes of `generator`: one stream each

# in timm's order
OPS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)
PROBABILITY = 0.5  # that an op which was drawn is applied
MAX_MAGNITUDE = 10.0
INTERPOLATION = {"bicubic": cv2.INTER_CUBIC, "bilinear": cv2.INTER_LINEAR}

IDENTITY = np.arange(256, dtype=np.uint8)
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH

ERASED_AREA = (0.02, 1 / 3)  # share of the image
ERASED_ASPECT = (0.3, 1 / 0.3)  # height by width
ERASE_ATTEMPTS = 10
CROP_ATTEMPTS = 10


def generator(seed: int, epoch: int, sample: int, purpose: int) -> np.random.Generator:
    """The random numbers of one image for one purpose.

    Philox turns (key, counter) into numbers, so a stream is a place in its counter: nothing has to be mixed first.
    """
    return np.random.Generator(np.random.Philox(counter=[0, 0, sample, purpose], key=[seed, epoch]))


class RandomCrop:
    """A random part of an image, mirrored with a probability; torchvision's RandomResizedCrop without its resizing.

    The area is uniform, the aspect log-uniform, and the place uniform. A part that does not fit is drawn again, at most
    10 times; then it is the largest part in the middle with an aspect that is allowed.

    Args:
        scale: lowest and highest area, share of the image.
        ratio: lowest and highest width by height.
        hflip: probability of a mirror image.
    """

    def __init__(self, scale: tuple[float, float], ratio: tuple[float, float], hflip: float):
        self.scale, self.ratio, self.hflip = scale, ratio, hflip
        self.log_ratio = math.log(ratio[0]), math.log(ratio[1])

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the part, pixels."""
        (low, high), (log_low, log_high) = self.scale, self.log_ratio
        for _ in range(CROP_ATTEMPTS):
            area = (low + (high - low) * rng.random()) * height * width
            aspect = math.exp(log_low + (log_high - log_low) * rng.random())
            h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < h <= height and 0 < w <= width:
                return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
        h, w = height, width
        if width < height * self.ratio[0]:
            h = max(1, round(width / self.ratio[0]))
        elif width > height * self.ratio[1]:
            w = max(1, round(height * self.ratio[1]))
        return (height - h) // 2, (width - w) // 2, h, w

    def part(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
        """The part of [H, W, C], a view [h, w, C], and whether it is to be mirrored."""
        top, left, h, w = self.box(*image.shape[:2], rng)
        return image[top : top + h, left : left + w], rng.random() < self.hflip

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """[H, W, C] to a contiguous [h, w, C]; the argument stays as it is."""
        part, mirrored = self.part(image, rng)
        if mirrored:
            return cv2.flip(part, 1).reshape(part.shape)  # OpenCV drops an axis of one channel
        return np.ascontiguousarray(part)


@dataclass(frozen=True)
class Policy:
    """What a RandAugment spec says.

    Attributes:
        magnitude: mean magnitude, 0 to 10.
        layers: ops drawn for an image, with replacement.
        deviation: standard deviation of the magnitude; the sum is clipped to 0 to 10.
        increasing: every op changes the image more at a larger magnitude.
    """

    magnitude: float = MAX_MAGNITUDE
    layers: int = 2
    deviation: float = 0.0
    increasing: bool = False


def parse_policy(spec: str) -> Policy:
    """timm's notation: `[rand-]m9-n2-mstd0.5-inc1`; what is left out is as in `Policy`.

    Raises:
        UserError: an unknown or repeated part, or a value outside its range.
    """
    known = {"m": ("magnitude", 0, MAX_MAGNITUDE), "n": ("layers", 1, 15), "mstd": ("deviation", 0, MAX_MAGNITUDE)}
    known["inc"] = ("increasing", 0, 1)
    values: dict[str, float] = {}
    for part in spec.removeprefix("rand-").split("-"):
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if not match or match[1] not in known:
            raise UserError(
                f"data.rand_augment is {spec!r}, its part {part!r} is unknown: expected {', '.join(known)}, each with "
                "a number, for example m9-mstd0.5-inc1"
            )
        name, low, high = known[match[1]]
        value = float(match[2])
        if name in values:
            raise UserError(f"data.rand_augment is {spec!r}, which says {match[1]} twice")
        if not low <= value <= high or (name in ("layers", "increasing") and value != int(value)):
            kind = "a whole number" if name in ("layers", "increasing") else "a number"
            raise UserError(f"data.rand_augment is {spec!r}, expected {match[1]} to be {kind}, {low:g} to {high:g}")
        values[name] = value
    layers, increasing = int(values.pop("layers", Policy.layers)), bool(values.pop("increasing", False))
    return Policy(**values, layers=layers, increasing=increasing)


class RandAugment:
    """A few random ops on one 8 bit colour image.

    Args:
        policy: how many, and how strong.
        fill: colour of what comes in from outside the image, 3 values in 0..255; timm takes the mean colour.
        interpolation: bicubic or bilinear, of the ops that move pixels; timm takes that of the crop.
    """

    def __init__(self, policy: Policy, fill: Sequence[int], interpolation: str = "bicubic"):
        self.policy, self.fill, self.interpolation = policy, tuple(fill), interpolation

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 [H, W, 3] to the same; the argument stays as it is.

        Raises:
            UserError: another type or number of channels.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            kind = f"{image.dtype} of shape {image.shape}"
            raise UserError(f"data.rand_augment needs 8 bit colour images, but data.dir holds an image that is {kind}")
        policy = self.policy
        for _ in range(policy.layers):
            name = OPS[rng.integers(len(OPS))]
            applied, sign = rng.random() < PROBABILITY, rng.choice((-1, 1))
            level = float(np.clip(rng.normal(policy.magnitude, policy.deviation), 0, MAX_MAGNITUDE))
            if applied:
                image = apply(
                    name, image, argument(name, level, sign, policy.increasing), self.fill, self.interpolation
                )
        return image


def argument(name: str, level: float, sign: int, increasing: bool) -> float:
    """What op `name` is called with at magnitude `level` (0 to 10), in the units of `apply`.

    Args:
        sign: 1 or -1, for the ops that go two ways.
        increasing: the meaning of Posterize, Solarize, Color, Contrast, Brightness and Sharpness, see `Policy`.
    """
    share = level / MAX_MAGNITUDE
    if name == "Rotate":
        return sign * 30 * share
    if name in ("ShearX", "ShearY"):
        return sign * 0.3 * share
    if name in ("TranslateX", "TranslateY"):
        return sign * 0.45 * share
    if name == "Posterize":
        return 4 - int(4 * share) if increasing else int(4 * share)
    if name == "Solarize":
        return 256 - int(256 * share) if increasing else int(256 * share)
    if name == "SolarizeAdd":
        return int(110 * share)
    return 1 + sign * 0.9 * share if increasing else 0.1 + 1.8 * share


def apply(name: str, image: np.ndarray, value: float, fill: Sequence[int], interpolation: str) -> np.ndarray:
    """One op.

    Args:
        name: one of `OPS`.
        image: uint8 [H, W, 3].
        value: Rotate: degrees, counter-clockwise. Shear: pixels a pixel. Translate: share of the side. Posterize: bits
            that are kept (0: a black image). Solarize: the level from which on values are inverted. SolarizeAdd: what
            is added to values below 128. Color, Contrast, Brightness, Sharpness: 1 changes nothing, 0 is grey, flat,
            black, smooth. The other ops take no value.
        fill, interpolation: as in `RandAugment`.

    Returns:
        uint8 [H, W, 3].
    """
    if name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):
        height, width = image.shape[:2]
        to_source = _to_source(name, value, height, width)
        flags = INTERPOLATION[interpolation] | cv2.WARP_INVERSE_MAP
        return cv2.warpAffine(
            image, to_source, (width, height), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=fill
        )
    if name == "Color":
        grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        return cv2.addWeighted(image, value, grey, 1 - value, 0)
    if name == "Sharpness":
        smooth = cv2.filter2D(image, -1, SMOOTH)
        for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):  # as Pillow: the rim is not smoothed
            smooth[edge] = image[edge]
        return cv2.addWeighted(image, value, smooth, 1 - value, 0)
    return cv2.LUT(image, _table(name, image, value))


def _to_source(name: str, value: float, height: int, width: int) -> np.ndarray:
    """Matrix [2, 3] from a place in the result to the place in the image that it is taken from, pixels.

    Shears leave the upper left corner of the image where it is, half a pixel from the centre of its first pixel.
    """
    if name == "Rotate":
        return cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -value, 1)
    matrix = np.eye(2, 3)
    if name == "ShearX":
        matrix[0, 1:] = value, value / 2
    elif name == "ShearY":
        matrix[1, ::2] = value, value / 2
    elif name == "TranslateX":
        matrix[0, 2] = value * width
    else:
        matrix[1, 2] = value * height
    return matrix


def _table(name: str, image: np.ndarray, value: float) -> np.ndarray:
    """The new value of each of the 256 levels: uint8 [256], or [1, 256, 3] when channels differ."""
    if name == "Invert":
        return 255 - IDENTITY
    if name == "Posterize":
        return IDENTITY & np.uint8(0xFF & (0xFF << (8 - int(value))))
    if name == "Solarize":
        return np.where(value <= IDENTITY, 255 - IDENTITY, IDENTITY)
    if name == "SolarizeAdd":
        return np.where(IDENTITY < 128, np.minimum(IDENTITY.astype(int) + int(value), 255), IDENTITY).astype(np.uint8)
    if name == "Brightness":
        return _blend(0, value)
    if name == "Contrast":
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        return _blend(int(cv2.mean(grey)[0] + 0.5), value)
    per_channel = {"AutoContrast": _stretched, "Equalize": _equalized}[name]
    counts = [cv2.calcHist([image], [c], None, [256], [0, 256])[:, 0].astype(np.int64) for c in range(3)]
    return np.stack([per_channel(count) for count in counts], 1)[None]


def _blend(base: int, factor: float) -> np.ndarray:
    """base + factor x (level - base), cut off as Pillow does."""
    return np.clip(base + np.float32(factor) * (IDENTITY.astype(np.float32) - base), 0, 255).astype(np.uint8)


def _stretched(counts: np.ndarray) -> np.ndarray:
    """The darkest level that occurs becomes 0, the brightest one 255."""
    used = np.flatnonzero(counts)
    low, high = used[0], used[-1]
    if low == high:
        return IDENTITY
    scale = 255 / (high - low)
    return np.clip(IDENTITY * scale - low * scale, 0, 255).astype(np.uint8)


def _equalized(counts: np.ndarray) -> np.ndarray:
    """Each level becomes its rank, so that all levels occur about equally often."""
    used = counts[counts > 0]
    step = (used.sum() - used[-1]) // 255
    if len(used) == 1 or step == 0:
        return IDENTITY
    below = np.cumsum(counts) - counts
    return np.minimum((step // 2 + below) // step, 255).astype(np.uint8)


class RandomErasing:
    """Fills a random rectangle with noise (Zhong et al., 2017, https://arxiv.org/abs/1708.04896; timm's "pixel" mode).

    Its area is uniform in 2 % to 1/3 of the image, its aspect log-uniform in 0.3 to 1/0.3; each value in it is drawn
    from N(0, 1), so images should be normalised before. A rectangle that does not fit is drawn again, at most 10 times.

    Args:
        probability: of a rectangle.
    """

    def __init__(self, probability: float):
        self.probability = probability

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """float32 [..., H, W] to the same; the argument stays as it is."""
        if rng.random() >= self.probability:
            return image
        height, width = image.shape[-2:]
        for _ in range(ERASE_ATTEMPTS):
            area = rng.uniform(*ERASED_AREA) * height * width
            aspect = math.exp(rng.uniform(*map(math.log, ERASED_ASPECT)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
                image = image.copy()
                image[..., top : top + h, left : left + w] = rng.standard_normal((*image.shape[:-2], h, w), np.float32)
                break
        return image
