"""A masked-image-modelling method: masking (on the host), an encoder with taps, a decoder a tap, a target, a loss."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn, ops

from localmim.mim.cells import coarse_weights, target_rows


class MaskedImageModel(nn.Cell):
    """Composes the parts; see docs/architecture.md.

    Args:
        encoder: Images and ids_keep -> a list of latents, one a tap.
        decoders: One a tap: latent and mask arrays -> predictions as rows (see mim/cells.py).
        target: Images -> a grid of values a scale.
    """

    def __init__(self, encoder: nn.Cell, decoders: list[nn.Cell], target: nn.Cell):
        super().__init__()
        self.encoder = encoder
        self.decoders = nn.CellList(decoders)
        self.target = target

    def predict(self, images: Tensor, ids_keep: Tensor, ids_mask: Tensor, ids_restore: Tensor) -> list[Tensor]:
        """Predictions as rows, one a scale."""
        latents = self.encoder(images, ids_keep)
        predictions = []
        for k in range(len(latents)):
            predictions.append(self.decoders[k](latents[k], ids_keep, ids_mask, ids_restore))
        return predictions

    def activations(self, images: Tensor, ids_keep: Tensor, ids_mask: Tensor, ids_restore: Tensor):
        """Names and values of what is computed on the way to the loss, in order: for finding errors, not in a graph."""
        yield "encoder.embed", self.encoder.embed(images, ids_keep)
        for i, x in enumerate(self.encoder.block_outputs(images, ids_keep)):
            yield f"encoder.blocks.{i}", x
        for k, prediction in enumerate(self.predict(images, ids_keep, ids_mask, ids_restore)):
            yield f"decoders.{k}", prediction
        for k, grid in enumerate(self.target(images)):
            yield f"target at scale {self.decoders[k].scale:g}", grid

    def loss(self, k: int, prediction: Tensor, target: Tensor, ids_keep, ids_mask, ids_restore) -> Tensor:
        """Mean squared error of the hidden cells at scale k, in float32; at scale 1/2 weighted by the hidden share."""
        scale = self.decoders[k].scale
        difference = prediction.astype(ms.float32) - target_rows(target, scale, ids_mask)
        if scale >= 1:
            return mean_square(difference)
        weights = coarse_weights(ids_restore, ids_keep.shape[1], self.decoders[k].grid)  # [B, L/4]
        error = ops.square(difference).mean(axis=-1)
        return (error * weights).sum() / weights.sum()

    def construct(self, images: Tensor, ids_keep: Tensor, ids_mask: Tensor, ids_restore: Tensor):
        """images [B, C, H, W], mask arrays of mim/masking.py -> (loss, losses [scales]); loss is their plain sum."""
        predictions = self.predict(images, ids_keep, ids_mask, ids_restore)
        targets = self.target(images)
        losses = []
        for k in range(len(predictions)):
            losses.append(self.loss(k, predictions[k], targets[k], ids_keep, ids_mask, ids_restore))
        losses = ops.stack(losses)
        return losses.sum(), losses


def mean_square(x: Tensor) -> Tensor:
    """Mean of x^2 over everything, summed row by row as a product (a CPU reduces on one thread only)."""
    rows = x.reshape(-1, x.shape[-1])
    ones = ops.ones((x.shape[-1], 1), x.dtype)
    return ops.matmul(rows * rows, ones).mean() / x.shape[-1]
