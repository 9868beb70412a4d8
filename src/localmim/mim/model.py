"""A masked-image-modelling method: masking (on the host), an encoder with taps, a decoder a tap, a target, a loss."""

from __future__ import annotations

from collections.abc import Callable

from mindspore import Tensor, nn, ops

from localmim.mim.cells import cell_pixels
from localmim.mim.losses import squared_error, weighted_mean
from localmim.mim.masking import Masking


class MaskedImageModel(nn.Cell):
    """Composes the parts; see docs/architecture.md.

    Inputs are images [B, C, H, W], then the arrays of a mask (`encoder.mask_inputs` of them, from `arrays()` of what
    the masking makes), then those of a target that is data: codebook ids.

    Args:
        encoder: Images and mask arrays -> a list of latents, one a tap; `tap_mask` gives each tap its own arrays.
        decoders: One a tap: latent and mask arrays -> predictions as rows (see mim/cells.py), and `expected`, which
            lays a target out alike.
        target: Images and its own arrays -> a grid of values a scale.
        masking: (ratio, seed) -> what draws the masks of a batch (mim/masking.py).
        error: Rows of predictions and of targets -> an error a row, in float32 (mim/losses.py).
    """

    def __init__(
        self,
        encoder: nn.Cell,
        decoders: list[nn.Cell],
        target: nn.Cell,
        masking: Callable[[float, int], Masking],
        error: Callable = squared_error,
    ):
        super().__init__()
        self.masking = masking
        self.encoder = encoder
        self.decoders = nn.CellList(decoders)
        self.target = target
        self.error = error

    def cell_sides(self) -> list[int]:
        """Side of a cell at each scale, in pixels."""
        sides = [self.encoder.image_size[0] // d.grid[0] for d in self.decoders]
        return [cell_pixels(side, d.scale) for side, d in zip(sides, self.decoders)]

    def predict(self, images: Tensor, *arrays: Tensor) -> list[Tensor]:
        """Predictions as rows, one a scale."""
        mask = arrays[: self.encoder.mask_inputs]
        latents = self.encoder(images, *mask)
        predictions = []
        for k in range(len(latents)):
            predictions.append(self.decoders[k](latents[k], *self.encoder.tap_mask(mask, k)))
        return predictions

    def targets(self, images: Tensor, *arrays: Tensor) -> tuple[Tensor, ...]:
        """Grids of values, one a scale."""
        return self.target(images, *arrays[self.encoder.mask_inputs :])

    def activations(self, images: Tensor, *arrays: Tensor):
        """Names and values of what is computed on the way to the loss, in order: for finding errors, not in a graph."""
        for name, x in self.encoder.named_outputs(images, *arrays[: self.encoder.mask_inputs]):
            yield f"encoder.{name}", x
        for k, prediction in enumerate(self.predict(images, *arrays)):
            yield f"decoders.{k}", prediction
        for k, grid in enumerate(self.targets(images, *arrays)):
            yield f"target at scale {self.decoders[k].scale:g}", grid

    def loss(self, k: int, prediction: Tensor, target: Tensor, *mask: Tensor) -> Tensor:
        """Mean error of the hidden cells that decoder k predicts, in float32."""
        rows, weights = self.decoders[k].expected(target, *self.encoder.tap_mask(mask, k))
        return weighted_mean(self.error(prediction, rows), weights)

    def construct(self, images: Tensor, *arrays: Tensor):
        """Images, mask arrays and target arrays -> (loss, losses [scales]); loss is their plain sum.

        Images alone -> the encoder's features [B, D], every patch visible.
        """
        if not arrays:
            return self.encoder.features(images)
        predictions = self.predict(images, *arrays)
        targets = self.targets(images, *arrays)
        mask = arrays[: self.encoder.mask_inputs]
        losses = []
        for k in range(len(predictions)):
            losses.append(self.loss(k, predictions[k], targets[k], *mask))
        losses = ops.stack(losses)
        return losses.sum(), losses
