"""How a step is spread over devices when a run goes on elsewhere."""

from __future__ import annotations

import pytest

from localmim.config import Config
from localmim.errors import UserError
from localmim.training.layout import Layout, begin_layout, changes, resumed_layout


def recipe(batch_size: int, accumulate: int = 1) -> Config:
    return Config(batch_size=batch_size, accumulate=accumulate)


@pytest.mark.parametrize(
    ("before", "world", "expected"),
    [
        ((8, 256, 1), 8, (8, 256, 1)),
        ((8, 256, 1), 4, (4, 256, 2)),
        ((8, 256, 1), 16, (16, 128, 1)),
        ((2, 4, 1), 1, (1, 4, 2)),
        ((1, 64, 4), 8, (8, 32, 1)),
        ((4, 128, 2), 6, (6, 85, 2)),  # 1024 / 6 = 170.67: 1020 images
        ((8, 256, 1), 3, (3, 227, 3)),  # 682 a device are not whole passes: 681
        ((10, 30, 1), 6, (6, 25, 2)),  # passes of 30 would leave over 20 of 50
        ((8, 256, 1), 7, (7, 146, 2)),  # 292 a device: 2044
    ],
)
def test_spread(before, world, expected):
    """The effective batch stays where whole numbers allow it, and loses less than a pass a device where they do not."""
    begun = Layout(*before, before[0] * before[1] * before[2])
    config = recipe(before[1], before[2])
    now = resumed_layout(config, world, begun.effective_batch, config)
    assert now[:3] == expected
    assert now.effective_batch == begun.effective_batch >= now.images
    lines = changes(begun, now)
    assert (not lines) == (world == before[0])
    if now.images < now.effective_batch:
        assert f"{now.images} of the {now.effective_batch} images of a step are used from here on" in lines[1]
    else:
        assert len(lines) < 2


@pytest.mark.parametrize("world", range(1, 40))
def test_pairs_and_bounds(world):
    """For every number of devices: batches are even where images are mixed in pairs, none is larger than asked for."""
    config = recipe(48, 3)
    for pairs in (False, True):
        now = resumed_layout(config, world, 2 * 48 * 3, config, pairs)
        assert now.batch_size <= 48 and now.images <= 288
        assert now.images > 288 - 2 * world * now.accumulate
        assert not pairs or now.batch_size % 2 == 0


def test_by_hand():
    """Other keys are fine if they give the same effective batch, and refused in one line if not."""
    before = recipe(256)
    assert resumed_layout(recipe(128, 2), 8, 2048, before) == begin_layout(recipe(128, 2), 8)
    with pytest.raises(UserError, match=r"a run of 2048 images a step, .* is 8 x 128 x 1 = 1024 now"):
        resumed_layout(recipe(128), 8, 2048, before)
    with pytest.raises(UserError, match="a run of 8 images a step, too few for 9 devices"):
        resumed_layout(recipe(4), 9, 8, recipe(4))
