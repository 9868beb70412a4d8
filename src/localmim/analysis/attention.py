"""What an encoder's queries attend to: each block's attention on whole images, between patches.

Attention is read off the same blocks that train, without a mask, and put back on the grid of patches, so that a Swin's
shifted windows and a ViT's whole image are the same kind of thing: windows of patches. What is no patch is left out, a
class token or what fills a grid up, and what the rest of a row gets sums to 1 again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from mindspore import Tensor, nn

from localmim.evaluation.accuracy import filled_up
from localmim.models.layers import Attended

MOST_BYTES = 2**29  # of the attention of all layers in a forward pass


class Window(NamedTuple):
    """Patches that attend to one another.

    Attributes:
        patches: int32 [n], row-major on the layer's grid.
        weights: float32 [B, nh, n, n], query first; rows sum to 1.
    """

    patches: np.ndarray
    weights: np.ndarray


class Layer(NamedTuple):
    """A block's attention on B images.

    Attributes:
        name: The block in words.
        grid: (h, w) in patches.
        patch: Height and width of a patch in pixels of the encoder's images.
        windows: Each patch of the grid is in one of them.
    """

    name: str
    grid: tuple[int, int]
    patch: tuple[float, float]
    windows: list[Window]

    def map_of(self, image: int, patch: int) -> np.ndarray:
        """What one patch of an image attends to: float32 [nh, h, w], NaN outside of its window."""
        window = next(window for window in self.windows if patch in window.patches)
        rows = window.weights[image, :, window.patches.tolist().index(patch)]  # [nh, n]
        found = np.full((len(rows), self.grid[0] * self.grid[1]), np.nan, np.float32)
        found[:, window.patches] = rows
        return found.reshape(-1, *self.grid)

    def mean_distance(self) -> np.ndarray:
        """Mean over queries of the distance to what they attend to, pixels of the encoder's images, float64 [B, nh].

        The distance is that between the centres of two patches, and each key counts with its weight.
        """
        total = 0.0
        for patches, weights in self.windows:
            places = np.stack(np.divmod(patches, self.grid[1]), axis=1) * self.patch  # [n, 2]
            distances = np.linalg.norm(places[:, None] - places, axis=2)  # [n, n]
            total = total + np.einsum("bhqk,qk->bh", weights, distances, dtype=np.float64)
        return total / (self.grid[0] * self.grid[1])


class _Weights(nn.Cell):
    """The encoder's attention as a graph."""

    def __init__(self, encoder: nn.Cell):
        super().__init__(auto_prefix=False)  # the encoder's parameters keep their names
        self.encoder = encoder

    def construct(self, images: Tensor) -> list[Tensor]:
        return self.encoder.attention(images)


class AttentionReader:
    """Reads the attention of an encoder as it is, which may be in training: nothing of it or of its run is changed.

    Args:
        encoder: Has `attention`, `attended` and `image_size`.
        batch_size: Images a forward pass; the graph is compiled for it, once, and short batches are filled up. It is
            smaller where the weights of so many images would not fit into MOST_BYTES.
    """

    def __init__(self, encoder: nn.Cell, batch_size: int = 4):
        self.encoder = encoder
        self.attended: list[Attended] = encoder.attended()
        heads = max(encoder.embed_dim // 64, 1)  # about: fewer in a Swin's lower stages, where windows are many
        image = 4 * heads * sum(a.tokens.size * a.tokens.shape[1] for a in self.attended)  # bytes
        self.batch_size = min(batch_size, max(MOST_BYTES // image, 1))
        self.slots = [_slots(attended) for attended in self.attended]
        self.network = _Weights(encoder)

    @property
    def names(self) -> list[str]:
        """Of the layers."""
        return [attended.name for attended in self.attended]

    def __call__(self, inputs: np.ndarray) -> list[Layer]:
        """Normalised images, float32 [B, C, H, W] -> every layer's attention on them."""
        parts = []
        for first in range(0, len(inputs), self.batch_size):
            part = inputs[first : first + self.batch_size]
            weights = self.network(Tensor(filled_up(part, self.batch_size)))
            parts.append([tensor.asnumpy()[: len(part)] for tensor in weights])
        return [self._layer(k, np.concatenate(of_parts)) for k, of_parts in enumerate(zip(*parts))]

    def _layer(self, k: int, weights: np.ndarray) -> Layer:
        """Layer k from its weights [B, G, nh, S, S]."""
        (H, W), (h, w) = self.encoder.image_size, self.attended[k].grid
        windows = [
            Window(self.attended[k].tokens[group, slots], _between(weights[:, group], slots))
            for group, slots in self.slots[k]
        ]
        return Layer(self.attended[k].name, (h, w), (H / h, W / w), windows)


def _slots(attended: Attended) -> list[tuple[int, np.ndarray]]:
    """The group of each window, and the slots in it that hold a patch."""
    found = []
    for group, (tokens, labels) in enumerate(zip(attended.tokens, attended.windows)):
        slots = np.flatnonzero(tokens >= 0)
        found += [(group, slots[labels[slots] == label]) for label in np.unique(labels[slots])]
    return found


def _between(weights: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Weights [B, nh, S, S] among the patches in these slots, whose rows sum to 1 again: [B, nh, n, n].

    A query that gives patches less than float32 can tell from nothing is taken to be even among them.
    """
    weights = weights[:, :, slots[:, None], slots]
    sums = weights.sum(axis=-1, keepdims=True)
    return np.where(sums > 0, weights / np.where(sums > 0, sums, 1), np.float32(1 / len(slots)))
