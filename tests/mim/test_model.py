"""The whole model: the loss is what the paper says, every weight learns, and config alone changes sizes and scales."""

from __future__ import annotations

from contextlib import contextmanager

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

import localmim
import plain
from localmim.mim.cells import rows_to_grid
from localmim.mim.masking import RandomMasking

TINY = {"patch_size": 8, "embed_dim": 16, "depth": 7, "num_heads": 2, "decoder_dim": 16, "decoder_heads": 2}


@contextmanager
def eagerly():
    """PyNative mode: quicker than compiling what runs once."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        yield
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)


class Case:
    """A tiny model, a batch and a mask: run as a graph with gradients, or eagerly with what the loss is made of."""

    def __init__(self, image_size: tuple[int, int], chans: int, **kwargs):
        ms.set_seed(0)
        self.model = localmim.create_model(
            "localmim_vit_tiny_patch16_224", image_size=image_size, in_chans=chans, **{**TINY, **kwargs}
        )
        self.grid = self.model.encoder.grid
        self.images = np.random.default_rng(1).normal(size=(3, chans, *image_size)).astype(np.float32)
        self.mask = RandomMasking(self.grid[0] * self.grid[1], 0.6, 2)(0, np.arange(3))
        self.trainable = {n: p for n, p in self.model.parameters_and_names() if p.requires_grad}
        self.differentiate = plain.Gradients(self.model, None, ms.ParameterTuple(self.trainable.values()))

    def inputs(self, images: np.ndarray | None = None) -> list[Tensor]:
        return [Tensor(a) for a in (self.images if images is None else images, *self.mask.arrays())]

    def graph(self) -> tuple[float, np.ndarray, dict[str, np.ndarray]]:
        """Loss, losses a scale, gradients by name."""
        (loss, losses), gradients = self.differentiate(*self.inputs())
        return float(loss.asnumpy()), losses.asnumpy(), dict(zip(self.trainable, (g.asnumpy() for g in gradients)))

    def eager(self, images: np.ndarray | None = None):
        """Loss, losses, predictions as rows, targets on the grid of cells."""
        with eagerly():
            inputs = self.inputs(images)
            loss, losses = self.model(*inputs)
            predictions = [p.asnumpy() for p in self.model.predict(*inputs)]
            targets = [t.asnumpy() for t in self.model.target(inputs[0])]
            return float(loss.asnumpy()), losses.asnumpy(), predictions, targets

    def expected_losses(self, predictions, targets) -> list[float]:
        """Masked mean squared errors from the formula, over the whole image grid, float64."""
        h, w = self.grid
        mask = self.mask.mask().reshape(-1, h, w)
        losses = []
        for k, (rows, target) in enumerate(zip(predictions, targets)):
            s = self.model.decoders[k].scale
            grid = rows_to_grid(rows, s, self.mask.ids_mask, self.grid).astype(np.float64)
            if s >= 1:
                M = mask.repeat(int(s), 1).repeat(int(s), 2)
            else:
                M = mask.reshape(-1, h // 2, 2, w // 2, 2).mean((2, 4))
            error = np.where(M > 0, ((grid - target) ** 2).mean(-1), 0)
            losses.append((M * error).sum() / M.sum())
        return losses


def without_gradient(gradients: dict[str, np.ndarray]) -> list[str]:
    """Names whose gradient is zero or not finite."""
    return [n for n, g in gradients.items() if not 0 < np.abs(g).max() < np.inf]


@pytest.fixture(scope="module")
def default():
    """All four scales, HOG, a rectangular image, with what both kinds of run give."""
    case = Case((32, 64), 3)
    return case, case.graph(), case.eager()


def test_loss_is_the_plain_sum_of_masked_errors(default):
    """Four masked mean squared errors by the formula; at scale 1/2 weighted by the hidden share. No weights between."""
    case, (loss, losses, _), (_, _, predictions, targets) = default
    np.testing.assert_allclose(losses, case.expected_losses(predictions, targets), rtol=5e-6)
    assert losses.shape == (4,) and loss == pytest.approx(float(losses.sum()), rel=1e-6)


def test_graph_equals_pynative(default):
    """A non-finite loss is searched for in PyNative mode, so it must be the same there."""
    _, (loss, losses, _), (eager, eager_losses, _, _) = default
    assert eager == pytest.approx(loss, rel=5e-6)
    np.testing.assert_allclose(eager_losses, losses, rtol=5e-6)


def test_every_trainable_weight_learns(default):
    """A part that is cut off from the loss, a mask token or a tap's norm, would train on without a sign."""
    case, (_, _, gradients), _ = default
    assert without_gradient(gradients) == []
    frozen = {n for n, p in case.model.parameters_and_names() if not p.requires_grad}
    assert frozen == {"encoder.pos_embed", *(f"decoders.{k}.pos_embed" for k in range(4))}


def test_predictions_do_not_see_hidden_pixels(default):
    """Whatever the hidden patches show, predictions stay and the loss moves: otherwise the task is a copy."""
    case, _, (_, losses, predictions, _) = default
    h, w = case.grid
    hidden = case.mask.mask().reshape(-1, 1, h, w).repeat(8, 2).repeat(8, 3) == 1
    other = np.where(hidden, np.random.default_rng(9).normal(size=case.images.shape), case.images).astype(np.float32)
    _, other_losses, other_predictions, _ = case.eager(other)
    for a, b in zip(predictions, other_predictions):
        np.testing.assert_array_equal(a, b)
    assert (np.abs(losses - other_losses) > 1e-4).all()


def test_one_scale_and_one_channel():
    """The two-line ablation: one tap, one decoder; blocks above it are frozen, as no loss reads them."""
    case = Case((24, 40), 1, scales=[1], taps=[2], target="pixels")  # an odd grid, which only scale 1/2 refuses
    loss, losses, gradients = case.graph()
    _, _, predictions, targets = case.eager()
    assert losses.shape == (1,) and loss == pytest.approx(float(losses[0]), rel=1e-6)
    np.testing.assert_allclose(losses, case.expected_losses(predictions, targets), rtol=5e-6)
    assert without_gradient(gradients) == []
    assert {int(n.split(".")[2]) for n in gradients if n.startswith("encoder.blocks.")} == {0, 1, 2}
    assert "encoder.blocks.3.mlp.fc1.weight" in dict(case.model.parameters_and_names())


def test_pixels_of_four_channels():
    """Two scales, pixels as they are, four channels: from keyword arguments alone."""
    case = Case((32, 48), 4, scales=[4, 0.5], taps=[0, 1], target="pixels", norm_pix=False)
    _, losses = case.model(*case.inputs())
    _, _, predictions, targets = case.eager()
    assert [t.shape for t in targets] == [(3, 16, 24, 2 * 2 * 4), (3, 2, 3, 16 * 16 * 4)]
    np.testing.assert_allclose(losses.asnumpy(), case.expected_losses(predictions, targets), rtol=5e-6)


@pytest.mark.parametrize("scales", [[4, 0.5]])
def test_codebook_ids_at_any_scales(scales):
    """The loss is the cross-entropy of hidden cells' ids by the formula, weighted by the hidden share at scale 1/2."""
    case = Case((32, 48), 3, scales=scales, taps=[0, 1], target="codebook", vocab=5)
    rng = np.random.default_rng(3)
    grids = [tuple(int(side * s) for side in case.grid) for s in scales]
    ids = [rng.integers(0, 5, (3, *grid)).astype(np.int32) for grid in grids]
    tensors = [*case.inputs(), *map(Tensor, ids)]
    (loss, losses), _ = case.differentiate(*tensors)
    assert float(loss.asnumpy()) == pytest.approx(float(losses.asnumpy().sum()), rel=1e-6)
    with eagerly():
        predictions = case.model.predict(*tensors)
    mask = case.mask.mask().reshape(-1, *case.grid)
    for k, (s, rows) in enumerate(zip(scales, predictions)):
        logits = rows_to_grid(rows.asnumpy(), s, case.mask.ids_mask, case.grid).astype(np.float64)
        shares = plain.softmax(np.nan_to_num(logits))
        errors = -np.log(np.take_along_axis(shares, ids[k][..., None].astype(int), -1)[..., 0])
        h, w = case.grid
        M = mask.repeat(int(s), 1).repeat(int(s), 2) if s >= 1 else mask.reshape(-1, h // 2, 2, w // 2, 2).mean((2, 4))
        assert float(losses.asnumpy()[k]) == pytest.approx((M * errors).sum() / M.sum(), rel=1e-5)


def test_default_taps_of_some_scales():
    """An ablation may name scales only: each keeps its published depth."""
    for scales, taps in (([4, 2, 1, 0.5], (1, 3, 4, 6)), ([2, 0.5], (3, 6)), ([4], (1,)), ([1], (4,))):
        model = localmim.create_model("localmim_vit_tiny_patch16_224", image_size=32, scales=scales, **TINY)
        assert model.encoder.taps == taps
        assert [d.scale for d in model.decoders] == scales
