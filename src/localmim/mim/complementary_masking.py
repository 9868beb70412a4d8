"""FastConvMAE's masks: a random order of the patches, cut into sets of which each is visible in one view of the image.

Every patch is visible exactly once, so the V views of an image cost one pass through an encoder that computes visible
patches alone, and the loss is the mean of V losses with a mask each. The published ratio of 0.75 gives four views.
Deviation from the authors' code: theirs has the sizes of 224 px written out; here the sets must be of one size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from localmim.errors import UserError
from localmim.mim.masking import RandomMasking, TokenMask, mask_from_shuffle


@dataclass(frozen=True)
class ViewsMask(TokenMask):
    """Masks of V views an image; every array has B*V rows, the views of an image side by side.

    Attributes:
        views: V.
    """

    views: int = 1

    def mask(self) -> np.ndarray:
        """[B, L] float32, 1 = hidden, of each image's first view."""
        return super().mask()[:: self.views]


def complementary_masks(noise: np.ndarray, views: int) -> ViewsMask:
    """Cuts each image's order of ascending noise [B, L] into sets of L/V: view v sees set v."""
    shuffle = np.argsort(noise, axis=1, kind="stable")
    B, L = noise.shape
    keep = L // views
    turned = np.stack([np.roll(shuffle, -v * keep, axis=1) for v in range(views)], axis=1).reshape(B * views, L)
    mask = mask_from_shuffle(turned, keep)
    return ViewsMask(mask.ids_keep, mask.ids_mask, mask.ids_restore, views)


class ComplementaryMasking:
    """Hides a share of the patches of an image at random, in as many views as it takes to see each patch once.

    Args:
        num_patches: Patches L of an image.
        ratio: Share that is hidden in each view: 1 - 1/V.
        seed: The run's seed.

    Raises:
        UserError: 1 / (1 - ratio) is no whole number V, or V does not divide L.
    """

    by_batch = False

    def __init__(self, num_patches: int, ratio: float, seed: int):
        self.random, self.num_patches = RandomMasking(num_patches, ratio, seed), num_patches
        self.views = round(1 / (1 - ratio))
        if abs(self.views * (1 - ratio) - 1) > 1e-6:
            raise UserError(
                f"mask.ratio {ratio} does not leave a whole fraction visible; FastConvMAE needs 1/2, 2/3, 3/4, ..."
            )
        if num_patches % self.views:
            raise UserError(
                f"mask.ratio {ratio} makes {self.views} views, which do not divide an image's {num_patches} patches"
            )

    def describe(self) -> str:
        return (
            f"{self.num_patches // self.views} of {self.num_patches} patches visible in each of {self.views} views, "
            "each patch in one"
        )

    def __call__(self, epoch: int, samples: np.ndarray, draw: int | None = None) -> ViewsMask:
        """Masks of a batch; `samples` [B] are positions in the data set. Each image has its own, whatever the draw."""
        return complementary_masks(np.stack([self.random.noise(epoch, int(s)) for s in samples]), self.views)
