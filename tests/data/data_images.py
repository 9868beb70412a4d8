"""Small images that the tests of the input pipeline share."""

from __future__ import annotations

import cv2
import numpy as np


def draw(seed: int, height: int = 48, width: int = 60) -> np.ndarray:
    """A smooth random colour image, uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
