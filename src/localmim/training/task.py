"""What a run trains: the part of it that differs from task to task. The loop (training/loop.py) does the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from mindspore import nn

from localmim.config import Config
from localmim.data.pipeline import Batch
from localmim.data.sources import Source
from localmim.training.optimizer import Group


def is_due(every: float, step: int, steps_per_epoch: int, last: bool) -> bool:
    """Whether what comes every so many epochs, and at the end, comes after a step; 0: only at the end."""
    return last or (every > 0 and step % max(round(every * steps_per_epoch), 1) == 0)


class Task(ABC):
    """A model with its data.

    Attributes:
        config: The resolved recipe.
        model: What a checkpoint holds; it has an `encoder`.
        network: Inputs -> (loss, losses), what is differentiated.
        source: Training images.
        loss_parts: How many of `losses` are written down beside the loss.
        classes: Names of the classes; empty: none.
        pairs: Whether images are mixed in pairs, so that batches must be even.
        by_batch: What depends on the batch that an image is in, in words; empty: nothing.
    """

    config: Config
    model: nn.Cell
    network: nn.Cell
    source: Source
    loss_parts: int = 0
    classes: Sequence[str] = ()
    pairs: bool = False
    by_batch: str = ""

    @property
    def shown(self) -> Source:
        """Where the images of a report come from."""
        return self.source

    @abstractmethod
    def inputs(self, part: Batch, epoch: int, draw: int) -> tuple[np.ndarray, ...]:
        """The network's inputs for a forward pass.

        Args:
            part: Images of it.
            draw: Number of the forward pass in the run, or with `shared_draws` of the step.
        """

    @abstractmethod
    def groups(self) -> dict[str, Group]:
        """How each trainable parameter is trained, by name."""

    @abstractmethod
    def introduction(self) -> list[str]:
        """What is special about this task, in lines."""

    def begin(self) -> list[str]:
        """Weights of a new run, which a run that goes on does not need; returns what was done, in lines."""
        return []

    def state(self) -> dict:
        """What a checkpoint keeps, ready for JSON."""
        return {}

    def check_state(self, state: dict) -> None:
        """UserError when a checkpoint's `state` is that of other files than this run's."""
        return

    def fingerprints(self) -> dict[str, str]:
        """Of the files that all devices must share besides the training images, by what they are."""
        return {}

    def compute_alone(self) -> None:
        """From here on the network computes without other devices: for finding errors."""
        return

    def evaluation_is_due(self, step: int, steps_per_epoch: int, last: bool) -> bool:
        """Whether `evaluate` is wanted after a step."""
        return False

    def evaluate(self) -> dict[str, float]:
        """Measures the model as it is."""
        return {}
