"""The learning rate of each optimizer step: a linear warm-up, then half a cosine down to a floor, or steps down.

Formula of the cosine: LocalMIM's pre-training recipe, which is MAE's. The rate follows the fractional epoch, so it
changes at every optimizer step. No deviation from the authors' code. Steps: SimMIM's long recipe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from localmim.config import OptimizerConfig
from localmim.errors import UserError

STEP = 0.1  # what the rate is multiplied with at each of `decay_epochs`


def scaled_lr(blr: float, effective_batch: int) -> float:
    """Learning rate for `effective_batch` images an optimizer step (devices x batch x accumulation).

    `blr` is the rate for 256 images: lr = blr x effective_batch / 256.
    """
    return blr * effective_batch / 256


class WarmupCosine:
    """From 0 to `lr` linearly over `warmup_epochs`, then along half a cosine to `min_lr` at `epochs`, float64.

    `lr`, `min_lr`: rate at the end of the warm-up and at the end of the run. `warmup_epochs`, `epochs`: may be
    fractions. `steps_per_epoch`: optimizer steps an epoch, at least 1.
    Raises UserError for values from which no schedule follows.
    """

    def __init__(self, lr: float, min_lr: float, warmup_epochs: float, epochs: float, steps_per_epoch: int):
        for key, value in (("optimizer.lr", lr), ("optimizer.min_lr", min_lr)):
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{key} is {value}: expected a finite number of at least 0")
        if not (math.isfinite(epochs) and epochs > 0):
            raise UserError(f"epochs is {epochs}: expected more than 0")
        if not 0 <= warmup_epochs <= epochs:
            raise UserError(
                f"optimizer.warmup_epochs is {warmup_epochs}: expected from 0 to the {epochs} epochs of the run"
            )
        if steps_per_epoch < 1:
            raise UserError(f"an epoch has {steps_per_epoch} optimizer steps: expected at least 1")
        self.lr = float(lr)
        self.min_lr = float(min_lr)
        self.warmup_epochs = float(warmup_epochs)
        self.epochs = float(epochs)
        self.steps_per_epoch = steps_per_epoch

    def at(self, step: float) -> float:
        """Rate of optimizer step `step`, counted from 0; `min_lr` from the end of the run on."""
        if step < 0:
            raise ValueError(f"step is {step}: steps are counted from 0")
        epoch = step / self.steps_per_epoch
        if epoch < min(self.warmup_epochs, self.epochs):
            return self.lr * epoch / self.warmup_epochs
        return self.after_warmup(epoch)

    def after_warmup(self, epoch: float) -> float:
        """Rate at a fractional epoch from the end of the warm-up on."""
        if epoch >= self.epochs:
            return self.min_lr
        progress = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


class WarmupSteps(WarmupCosine):
    """From 0 to `lr` linearly over `warmup_epochs`, then a tenth of what it was from each of `decay_epochs` on.

    `decay_epochs`: ascending, after the warm-up and before the end; the rest as in WarmupCosine.
    """

    def __init__(
        self, lr: float, decay_epochs: Sequence[float], warmup_epochs: float, epochs: float, steps_per_epoch: int
    ):
        super().__init__(lr, 0.0, warmup_epochs, epochs, steps_per_epoch)
        self.decay_epochs = [float(e) for e in decay_epochs]
        inside = all(warmup_epochs <= e < epochs for e in self.decay_epochs)
        if not self.decay_epochs or not inside or self.decay_epochs != sorted(set(self.decay_epochs)):
            raise UserError(
                f"optimizer.decay_epochs is {list(decay_epochs)}: expected epochs that ascend, from the "
                f"{warmup_epochs:g} of the warm-up to below {epochs:g}"
            )

    def after_warmup(self, epoch: float) -> float:
        return self.lr * STEP ** sum(epoch >= e for e in self.decay_epochs)


def build_schedule(options: OptimizerConfig, lr: float, epochs: float, steps_per_epoch: int) -> WarmupCosine:
    """The recipe's schedule.

    Raises:
        UserError: Values from which none follows.
    """
    if options.schedule == "step":
        return WarmupSteps(lr, options.decay_epochs, options.warmup_epochs, epochs, steps_per_epoch)
    if options.decay_epochs:
        raise UserError("optimizer.decay_epochs is for optimizer.schedule step, this is cosine")
    return WarmupCosine(lr, options.min_lr, options.warmup_epochs, epochs, steps_per_epoch)
