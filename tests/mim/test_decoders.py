"""The decoder with its short cuts against the authors' plain one: equal values and equal gradients."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import plain
from localmim.mim.cells import rows_to_grid, target_rows
from localmim.mim.decoders import Decoder
from localmim.mim.masking import RandomMasking

WIDTH, DIM, HEADS, OUT = 12, 16, 2, 5


class Ours(nn.Cell):
    """sum(prediction * weight) of the package's decoder; predictions beside it."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder

    def construct(self, latent, weight, ids_keep, ids_mask, ids_restore):
        rows = self.decoder(latent, ids_keep, ids_mask, ids_restore)
        return (rows * target_rows(weight, self.decoder.scale, ids_mask)).sum(), rows


CASES = [(scale, depth, (2, 4)) for scale in (4.0, 2.0, 1.0, 0.5) for depth in (1, 2)] + [
    (4.0, 1, (3, 3)),
    (0.5, 3, (4, 2)),
]


@pytest.mark.parametrize(("scale", "depth", "grid"), CASES)
def test_equals_the_plain_decoder(scale, depth, grid):
    """Order of tokens, one table of hidden tokens, skipped rows and multiplied weights: all of it must cancel out."""
    rng = np.random.default_rng(0)
    h, w = grid
    decoder = Decoder(WIDTH, grid, scale, OUT, DIM, depth, HEADS)
    for p in decoder.trainable_params():
        p.set_data(Tensor(rng.normal(0, 0.4, p.shape).astype(np.float32)))
    mask = RandomMasking(h * w, 0.6, 1)(0, np.arange(2))
    keep = mask.ids_keep.shape[1]
    latent = rng.normal(size=(2, 1 + keep, WIDTH)).astype(np.float32)
    weight = rng.normal(size=(2, int(h * scale), int(w * scale), OUT)).astype(np.float32)
    if scale >= 1:  # cells that the loss reads
        read = mask.mask().reshape(2, h, w).repeat(int(scale), 1).repeat(int(scale), 2)
    else:
        read = np.ones((2, h // 2, w // 2))
    names = [n for n, p in decoder.parameters_and_names() if p.requires_grad]
    weights = ms.ParameterTuple([p for _, p in decoder.parameters_and_names() if p.requires_grad])

    run = plain.Gradients(Ours(decoder), 0, weights)
    (_, rows), (d_latent, d_weights) = run(*map(Tensor, (latent, weight, *mask.arrays())))

    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        reference = plain.PlainDecoder(decoder, HEADS)

        def loss(x):
            full = reference(x, mask.ids_restore)
            return (full * Tensor((weight * read[..., None]).astype(np.float32))).sum(), full

        (_, full), (d_latent_plain, d_weights_plain) = ms.value_and_grad(loss, 0, weights, has_aux=True)(Tensor(latent))
        full = full.asnumpy()
    finally:
        ms.set_context(mode=ms.GRAPH_MODE)

    grid_of_rows = rows_to_grid(rows.asnumpy(), scale, mask.ids_mask, grid)
    np.testing.assert_array_equal(np.isnan(grid_of_rows[..., 0]), read == 0)
    np.testing.assert_allclose(grid_of_rows[read == 1], full[read == 1], atol=1e-5 * np.abs(full).max(), rtol=0)
    assert len(names) == len(d_weights) == len(d_weights_plain)
    for name, got, expected in [
        ("latent", d_latent, d_latent_plain),
        *zip(names, d_weights, d_weights_plain),
    ]:
        got, expected = got.asnumpy(), expected.asnumpy()
        size = np.abs(expected).max()
        assert size > 1e-3, name
        np.testing.assert_allclose(got, expected, atol=2e-5 * size, rtol=0, err_msg=name)


def test_initial_bounds_are_pytorchs():
    """A transposed convolution's fan-in is taken from its output side there: 1 / sqrt(128 * 4) at 256 wide."""
    ms.set_seed(0)
    head = Decoder(8, (2, 2), 4.0, 27, 256, 1, 8).pred
    for conv, bound in ((head.up1, 512**-0.5), (head.up2, 256**-0.5), (head.out, 64**-0.5)):
        for values in (conv.weight.asnumpy(), conv.bias.asnumpy()):
            assert 0.8 * bound < np.abs(values).max() <= bound
