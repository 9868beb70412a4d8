"""How the images of an optimizer step are spread over devices and forward passes.

The effective batch of a run, devices x batch_size x accumulate, is fixed when it begins. When it goes on with another
number of devices, forward passes are added or taken away so that it stays. Where no whole numbers do that, a step takes
a few images less; steps, schedule and learning rate stay those of the run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from localmim.config import Config
from localmim.errors import UserError


class Layout(NamedTuple):
    """Of one optimizer step.

    Attributes:
        world: Devices.
        batch_size: Images a device and a forward pass.
        accumulate: Forward passes.
        effective_batch: Images that the run's schedule counts for a step; `images` are at most as many.
    """

    world: int
    batch_size: int
    accumulate: int
    effective_batch: int

    @property
    def images(self) -> int:
        """Images that a step really takes, on all devices."""
        return self.world * self.share

    @property
    def share(self) -> int:
        """Images of a step on one device."""
        return self.batch_size * self.accumulate

    def __str__(self) -> str:
        return f"{self.world} x {self.batch_size} x {self.accumulate} = {self.images}"


def begin_layout(config: Config, world: int) -> Layout:
    """That of a new run: as the recipe says."""
    return Layout(world, config.batch_size, config.accumulate, world * config.batch_size * config.accumulate)


def resumed_layout(config: Config, world: int, effective: int, before: Config, pairs: bool = False) -> Layout:
    """That of a run that goes on and takes `effective` images a step.

    Args:
        config, before: The recipe now, and that of the checkpoint.
        world: Devices now.
        pairs: Images are mixed in pairs, so batches must stay even.

    Raises:
        UserError: batch_size or accumulate were changed to something that gives another effective batch; or there are
            more devices than images in a step.
    """
    asked = begin_layout(config, world)
    if asked.effective_batch == effective:
        return asked
    if (config.batch_size, config.accumulate) != (before.batch_size, before.accumulate):
        raise UserError(
            f"{config.output_dir} holds a run of {effective} images a step, and devices x batch_size x accumulate is "
            f"{asked} now: change them together, or leave batch_size and accumulate as they were, or name another "
            "output_dir"
        )
    unit = 2 if pairs else 1
    share = effective // world // unit * unit  # images of a step on one device
    if share == 0:
        raise UserError(f"{config.output_dir} holds a run of {effective} images a step, too few for {world} devices")
    passes = math.ceil(share / config.batch_size)
    if share * world == effective:
        for accumulate in range(passes, min(4 * passes, share) + 1):  # smaller batches that leave nothing over
            if share % (accumulate * unit) == 0:
                return Layout(world, share // accumulate, accumulate, effective)
    return Layout(world, share // passes // unit * unit, passes, effective)


def changes(before: Layout, now: Layout) -> list[str]:
    """What is different from the layout before, in lines."""
    if before == now:
        return []
    lines = [f"devices x batch x forward passes: {before} images a step before, {now} now"]
    if now.images < now.effective_batch:
        lines.append(
            f"{now.images} of the {now.effective_batch} images of a step are used from here on: they cannot be spread "
            f"evenly over {now.world} devices; steps, schedule and learning rate stay"
        )
    return lines
