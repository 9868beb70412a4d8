"""Masks are data: pure functions of (seed, epoch, sample), made on the host, fed to the graph as index arrays.

Nothing here depends on the batch, the number of workers or how often a run was resumed: the mask of sample 7 in epoch 3
is the same wherever and whenever it is asked for. 1 = hidden throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from localmim.errors import UserError


class Mask(Protocol):
    """A batch's masks, ready for the graph; of one shape for every batch.

    Attributes:
        views: Rows of the encoder that an image makes.
    """

    views: int

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What enters the graph; the encoder knows the order."""

    def mask(self) -> np.ndarray:
        """[B, cells] float32 on the encoder's `mask_grid`, row-major, 1 = hidden."""

    def tap(self, k: int):
        """Has `ids_mask` [B, R] (or [B*V, R], V views an image): the patch of each row that decoder k predicts."""


class Masking(Protocol):
    """Draws masks.

    Attributes:
        by_batch: Whether the images of a batch share a draw, so that a mask depends on the batch an image is in.
    """

    by_batch: bool

    def __call__(self, epoch: int, samples: np.ndarray, draw: int | None = None) -> Mask:
        """Masks of a batch.

        Args:
            samples: Positions in the data set, [B].
            draw: What a mask shared by a batch follows from in place of its first image (`shared_draws`).
        """

    def describe(self) -> str:
        """How much is hidden, in words."""


@dataclass(frozen=True)
class TokenMask:
    """A batch's masks for an encoder that sees visible patches only: index arrays, int32.

    Attributes:
        ids_keep: [B, K] visible patches, in the order in which the encoder sees them.
        ids_mask: [B, M] hidden patches.
        ids_restore: [B, L] position of each patch in the concatenation of ids_keep and ids_mask.
    """

    ids_keep: np.ndarray
    ids_mask: np.ndarray
    ids_restore: np.ndarray
    views: ClassVar[int] = 1

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What enters the graph, in this order: ids_keep, ids_mask, ids_restore."""
        return self.ids_keep, self.ids_mask, self.ids_restore

    def tap(self, k: int) -> TokenMask:
        """The mask at the grid of tap k: the same for all."""
        return self

    def mask(self) -> np.ndarray:
        """[B, L] float32, 1 = hidden, in image order."""
        return (self.ids_restore >= self.ids_keep.shape[1]).astype(np.float32)


def num_visible(num_patches: int, ratio: float) -> int:
    """Visible patches, int(L * (1 - ratio)): truncated in floating point as the authors do (100 at 0.9 gives 9).

    Raises:
        UserError: The ratio is outside (0, 1), leaves nothing visible or hides nothing.
    """
    if not 0 < ratio < 1:
        raise UserError(f"mask.ratio must lie between 0 and 1, both excluded, got {ratio}")
    keep = int(num_patches * (1 - ratio))
    if keep < 1:
        raise UserError(f"mask.ratio {ratio} leaves none of the {num_patches} patches visible")
    if keep == num_patches:
        raise UserError(f"mask.ratio {ratio} hides none of the {num_patches} patches")
    return keep


def mask_from_noise(noise: np.ndarray, keep: int) -> TokenMask:
    """MAE's rule: the `keep` patches with the smallest noise stay, in ascending order of it. noise [B, L]."""
    ids_shuffle = np.argsort(noise, axis=1, kind="stable").astype(np.int32)
    return mask_from_shuffle(ids_shuffle, keep)


def mask_from_shuffle(ids_shuffle: np.ndarray, keep: int) -> TokenMask:
    """Masks from a permutation of the patches [B, L] whose first `keep` stay."""
    ids_restore = np.argsort(ids_shuffle, axis=1).astype(np.int32)
    ids_shuffle = ids_shuffle.astype(np.int32)
    return TokenMask(ids_shuffle[:, :keep].copy(), ids_shuffle[:, keep:].copy(), ids_restore)


def philox(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The random numbers of a sample's mask."""
    key = np.random.SeedSequence((seed, epoch, sample)).generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


class RandomMasking:
    """Hides a share of the patches of each image at random (MAE, LocalMIM).

    Args:
        num_patches: Patches L of an image.
        ratio: Share that is hidden.
        seed: The run's seed.
    """

    by_batch = False

    def __init__(self, num_patches: int, ratio: float, seed: int):
        self.num_patches, self.keep, self.seed = num_patches, num_visible(num_patches, ratio), seed

    def describe(self) -> str:
        return f"{self.keep} of {self.num_patches} patches visible"

    def noise(self, epoch: int, sample: int) -> np.ndarray:
        """U[0, 1) float64 [L], a function of (seed, epoch, sample) alone."""
        return philox(self.seed, epoch, sample).random(self.num_patches)

    def __call__(self, epoch: int, samples: np.ndarray, draw: int | None = None) -> TokenMask:
        """Masks of a batch; `samples` [B] are positions in the data set. Each image has its own, whatever the draw."""
        return mask_from_noise(np.stack([self.noise(epoch, int(s)) for s in samples]), self.keep)
