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
    the masking makes), then those of a target that is data: codebook ids, or features of frozen networks.

    Args:
        encoder: Images and mask arrays -> a list of latents, one a tap; `tap_mask` gives each tap its own arrays.
        decoders: One a tap: latent and mask arrays -> predictions as rows (see mim/cells.py), and `expected`, which
            lays a target out alike.
        target: Images and its own arrays -> a grid of values a scale.
        masking: (ratio, seed) -> what draws the masks of a batch (mim/masking.py).
        error: Rows of predictions and of targets -> an error a row, in float32 (mim/losses.py).
        drop_path: Rate of stochastic depth in the encoder's last block while it is trained; it grows linearly from 0 in
            the first.

    Raises:
        ValueError: A rate outside its range.
    """

    def __init__(
        self,
        encoder: nn.Cell,
        decoders: list[nn.Cell],
        target: nn.Cell,
        masking: Callable[[float, int], Masking],
        error: Callable = squared_error,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path is {drop_path}, expected 0 to below 1")
        self.masking, self.drop_path = masking, drop_path
        self.encoder = encoder
        self.decoders = nn.CellList(decoders)
        self.target = target
        self.error = error

    def cell_sides(self) -> list[int]:
        """Side of a cell at each scale, in pixels."""
        sides = [self.encoder.image_size[0] // d.grid[0] for d in self.decoders]
        return [cell_pixels(side, d.scale) for side, d in zip(sides, self.decoders)]

    def loss_names(self) -> list[str]:
        """What each part of the loss is, in words."""
        sides = self.cell_sides()
        return [f"{self.encoder.tap_name(k)}, {side} px cells" for k, side in enumerate(sides)]

    def predict(self, images: Tensor, *arrays: Tensor) -> list[Tensor]:
        """Predictions as rows, one a scale."""
        mask = arrays[: self.encoder.mask_inputs]
        return self.decode(self.encoder(images, *mask), mask)

    def decode(self, latents: list[Tensor], mask: tuple[Tensor, ...]) -> list[Tensor]:
        """Latents, one a tap -> predictions as rows, one a scale."""
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
        return self.forward(images, arrays)

    def forward(self, images: Tensor, arrays: tuple[Tensor, ...], drop: Tensor | None = None):
        """(loss, losses [scales]) of images, mask arrays and target arrays.

        Args:
            drop: [depth, 2, rows of the encoder], factors of stochastic depth (training/drop_path.py).
        """
        mask = arrays[: self.encoder.mask_inputs]
        predictions = self.decode(self.encoder.latents(images, mask, drop), mask)
        targets = self.targets(images, *arrays)
        losses = []
        for k in range(len(predictions)):
            losses.append(self.loss(k, predictions[k], targets[k], *mask))
        losses = ops.stack(losses)
        return losses.sum(), losses
