"""LoMaR's masks: a few random windows of each image, most patches of each hidden (Chen et al., arXiv 2206.00790).

By default each image draws its own windows, so a mask depends on the image alone. In the authors' code a batch shares
one draw, and images and windows are paired so that an image need not see every window (docs/quirks.md, L1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from localmim.errors import UserError
from localmim.mim.masking import philox


@dataclass(frozen=True)
class WindowMask:
    """A batch's windows and what is hidden in them: V windows an image, side by side, of K x K = N patches.

    Attributes:
        ids: [B, V*N] int32, the patches of each window, row-major inside it.
        hidden: [B*V, N] float32, 1 = replaced by a mask token.
        rows: [B*V, M] int32, places of the hidden ones in their window, ascending.
        ids_mask: [B*V, M] int32, the patches that they are.
        patches: Patches of an image.
    """

    ids: np.ndarray
    hidden: np.ndarray
    rows: np.ndarray
    ids_mask: np.ndarray
    patches: int

    @property
    def views(self) -> int:
        """Windows of an image."""
        return len(self.hidden) // len(self.ids)

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What enters the graph, in this order: ids, hidden, rows, ids_mask."""
        return self.ids, self.hidden, self.rows, self.ids_mask

    def tap(self, k: int) -> WindowMask:
        """The mask at the grid of tap k: there is one tap."""
        return self

    def mask(self) -> np.ndarray:
        """[B, L] float32, 1 = hidden in a window that it lies in."""
        mask = np.zeros((len(self.ids), self.patches), np.float32)
        np.put_along_axis(mask, self.ids_mask.reshape(len(mask), -1).astype(np.int64), 1.0, axis=1)
        return mask


class WindowMasking:
    """Draws windows and what is hidden in them.

    In an image no two windows have the same top row or left column.

    Args:
        grid: Patches (h, w) of an image.
        window: Patches K a side.
        views: Windows V of an image.
        quirks: Draw and pair as the authors' code does.
        ratio: Share of a window that is hidden: int(K*K * ratio) patches.
        seed: The run's seed.

    Raises:
        UserError: More windows than places for them, or a ratio that hides nothing.
    """

    def __init__(self, grid: tuple[int, int], window: int, views: int, quirks: bool, ratio: float, seed: int):
        self.grid, self.window, self.views, self.by_batch, self.seed = grid, window, views, quirks, seed
        self.places = (grid[0] - window + 1, grid[1] - window + 1)
        if not 1 <= views <= min(self.places):
            raise UserError(
                f"mask.views is {views}, expected 1 to {min(self.places)}: windows of {window}x{window} on "
                f"{grid[0]}x{grid[1]} patches, no two with the same row or column"
            )
        self.count = int(window * window * ratio)
        if not 0 < self.count < window * window:
            raise UserError(f"mask.ratio {ratio} hides {self.count} of the {window * window} patches of a window")

    def describe(self) -> str:
        K = self.window
        hidden = f"in each {self.count} of {K * K} hidden by a mask token"
        return f"{self.views} windows of {K}x{K} patches an image, {hidden}"

    def __call__(self, epoch: int, samples: np.ndarray, draw: int | None = None) -> WindowMask:
        """Masks of a batch; `samples` [B] are positions in the data set. `draw` counts with `quirks` alone."""
        generators = [philox(self.seed, epoch, int(s)) for s in samples]
        if self.by_batch:
            shared = philox(self.seed, epoch, int(samples[0]) if draw is None else draw)
            top, left = self._corners(shared)
            noise = np.stack([g.random((self.views, self.window**2)) for g in generators])
            return self.of_draws(*authors_pairing(top, left, noise))
        corners = [self._corners(g) for g in generators]
        noise = np.stack([g.random((self.views, self.window**2)) for g in generators])
        return self.of_draws(np.stack([c[0] for c in corners]), np.stack([c[1] for c in corners]), noise)

    def _corners(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Top rows and left columns, [V] each."""
        top, left = (generator.permutation(count)[: self.views] for count in self.places)
        return top, left

    def of_draws(self, top: np.ndarray, left: np.ndarray, noise: np.ndarray) -> WindowMask:
        """Masks from top rows and left columns [B, V] and noise [B, V, N], whose smallest values are hidden."""
        B, V, N = noise.shape
        i, j = np.divmod(np.arange(N), self.window)
        ids = (top[..., None] + i) * self.grid[1] + left[..., None] + j  # [B, V, N]
        rows = np.sort(np.argsort(noise, axis=2, kind="stable")[..., : self.count], axis=2)  # [B, V, M]
        hidden = np.zeros((B, V, N), np.float32)
        np.put_along_axis(hidden, rows, 1.0, axis=2)
        chosen = np.take_along_axis(ids, rows, axis=2)
        return WindowMask(
            ids.reshape(B, V * N).astype(np.int32),
            hidden.reshape(B * V, N),
            rows.reshape(B * V, -1).astype(np.int32),
            chosen.reshape(B * V, -1).astype(np.int32),
            self.grid[0] * self.grid[1],
        )


def authors_pairing(top: np.ndarray, left: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, ...]:
    """Which windows and noise each image gets in the authors' code.

    Row r of their batch is image r mod B, seen in window r mod V with noise (r div V, r mod V): an image sees
    V / gcd(B, V) different windows.

    Args:
        top, left: [V], shared by the batch.
        noise: [B, V, N].

    Returns:
        top, left and noise of each image: [B, V], [B, V], [B, V, N].
    """
    B, V, _ = noise.shape
    rows = np.arange(B)[:, None] + np.arange(V) * B  # [B, V]: their rows of each image
    return top[rows % V], left[rows % V], noise[rows // V, rows % V]
