"""Learning rates against those that the authors' code gave."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from localmim.config import OptimizerConfig
from localmim.errors import UserError
from localmim.training.schedule import WarmupCosine, build_schedule, scaled_lr

MISC = Path(__file__).parents[1] / "golden" / "localmim_misc.npz"
RECIPES = ["vitb_pretrain", "vitl_pretrain", "swinb_pretrain", "vitb_finetune", "swinb_finetune"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("steps_per_epoch", [1, 625])
def test_equals_the_authors(recipe, steps_per_epoch):
    """A published result stands on its schedule: float64, 31 fractional epochs a recipe."""
    golden = np.load(MISC)
    settings = json.loads(str(golden["config"]))["lr_recipes"][recipe]
    schedule = WarmupCosine(**settings, steps_per_epoch=steps_per_epoch)
    got = [schedule.at(epoch * steps_per_epoch) for epoch in golden[f"lr/{recipe}/epoch"]]
    np.testing.assert_allclose(got, golden[f"lr/{recipe}/lr"], rtol=1e-12, atol=0)


def test_landmarks():
    """Starts at 0, peaks where the warm-up ends, is halfway between at half the cosine, and ends at the floor."""
    schedule = WarmupCosine(lr=1.0, min_lr=0.2, warmup_epochs=2, epochs=10, steps_per_epoch=5)
    assert [schedule.at(step) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert schedule.at(30) == pytest.approx(0.6, rel=1e-15)
    assert [schedule.at(step) for step in (50, 51, 10_000)] == [0.2, 0.2, 0.2]  # the cosine would rise again
    assert schedule.at(49) > 0.2


@pytest.mark.parametrize(("warmup", "first"), [(0, 1.0), (4, 0.0)])
def test_warmup_of_nothing_and_of_everything(warmup, first):
    """Both ends of the range that is allowed divide by zero if handled carelessly."""
    schedule = WarmupCosine(lr=1.0, min_lr=0.0, warmup_epochs=warmup, epochs=4, steps_per_epoch=3)
    assert schedule.at(0) == first
    assert schedule.at(12) == 0.0


def test_scaled_lr():
    """The spec's recipes: 2e-4 at 2048 images, 1.5e-4 at 4096."""
    assert scaled_lr(2e-4, 2048) == pytest.approx(1.6e-3, rel=1e-15)
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3, rel=1e-15)


def test_steps():
    """SimMIM's long recipe: the full rate between warm-up and epoch 700, then a tenth of it to the end."""
    options = OptimizerConfig(schedule="step", decay_epochs=[700, 750], warmup_epochs=10)
    schedule = build_schedule(options, 1.0, 800, 2)
    assert [schedule.at(2 * epoch) for epoch in (0, 5, 10, 699.5)] == [0.0, 0.5, 1.0, 1.0]
    assert [schedule.at(2 * epoch) for epoch in (700, 749.5, 750, 799.5, 800)] == pytest.approx([0.1] * 2 + [0.01] * 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schedule": "step"}, r"decay_epochs is \[\]"),
        ({"schedule": "step", "decay_epochs": [5, 3]}, r"decay_epochs is \[5, 3\]"),
        ({"schedule": "step", "decay_epochs": [10]}, "to below 10"),
        ({"schedule": "step", "decay_epochs": [1]}, "from the 2 of the warm-up"),
        ({"decay_epochs": [5]}, "for optimizer.schedule step"),
    ],
)
def test_refuses_steps_that_are_none(options, said):
    """A rate that would never fall, or keys that the schedule would not read, are mistakes of the recipe."""
    with pytest.raises(UserError, match=said):
        build_schedule(OptimizerConfig(warmup_epochs=2, **options), 1.0, 10, 5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"warmup_epochs": 11}, "optimizer.warmup_epochs is 11"),
        ({"warmup_epochs": -1}, "optimizer.warmup_epochs is -1"),
        ({"warmup_epochs": float("nan")}, "optimizer.warmup_epochs is nan"),
        ({"epochs": 0, "warmup_epochs": 0}, "epochs is 0"),
        ({"lr": -1e-3}, "optimizer.lr is -0.001"),
        ({"min_lr": float("inf")}, "optimizer.min_lr is inf"),
        ({"steps_per_epoch": 0}, "0 optimizer steps"),
    ],
)
def test_refuses(change, named):
    """A wrong recipe is one line that names the key, before anything runs."""
    settings = {"lr": 1e-3, "min_lr": 1e-6, "warmup_epochs": 1, "epochs": 10, "steps_per_epoch": 5}
    with pytest.raises(UserError, match=named) as caught:
        WarmupCosine(**{**settings, **change})
    assert "\n" not in str(caught.value)


def test_refuses_steps_before_the_first():
    """A negative step is a mistake in the loop, not a rate below zero."""
    with pytest.raises(ValueError, match="-1"):
        WarmupCosine(1e-3, 0, 1, 10, 5).at(-1)
