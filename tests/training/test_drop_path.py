"""Factors of stochastic depth: the right share, by sample, the same every time."""

from __future__ import annotations

import numpy as np

from localmim.training.drop_path import drop_path_factors


def test_share_and_scale():
    """Each branch of a block is dropped with the block's rate; what stays is divided by the share that stays."""
    rates = [0.0, 0.25, 0.5]
    factors = drop_path_factors(rates, 0, 0, np.arange(4000))
    assert factors.shape == (3, 2, 4000) and factors.dtype == np.float32
    assert (factors[0] == 1).all()
    for block, rate in enumerate(rates):
        values = set(np.unique(factors[block]).tolist())
        assert values <= {0.0, np.float32(1 / (1 - rate)).item()}
        dropped = (factors[block] == 0).mean(axis=1)
        np.testing.assert_allclose(dropped, rate, atol=0.03)
    both = ((factors[2] == 0).all(axis=0)).mean()
    np.testing.assert_allclose(both, 0.25, atol=0.03)  # the branches of a block are independent


def test_a_sample_has_its_own_stream():
    """Whatever the batch; another epoch or seed is another draw."""
    rates = np.full(12, 0.5)
    whole = drop_path_factors(rates, 3, 1, np.arange(8))
    np.testing.assert_array_equal(drop_path_factors(rates, 3, 1, np.asarray([6, 2])), whole[..., [6, 2]])
    assert (drop_path_factors(rates, 3, 2, np.arange(8)) != whole).any()
    assert (drop_path_factors(rates, 4, 1, np.arange(8)) != whole).any()
