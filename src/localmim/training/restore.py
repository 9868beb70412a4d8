"""A checkpoint as a model: it knows its own recipe."""

from __future__ import annotations

import mindspore as ms

from localmim.config import Config, config_from_dict
from localmim.convert.load import load_weights
from localmim.mim.model import MaskedImageModel
from localmim.models.classifier import Classifier
from localmim.training.build import build_model
from localmim.training.checkpoint import Checkpoint, read_checkpoint


def untrained_model(config: Config) -> MaskedImageModel | Classifier:
    """The recipe's model with the weights that its run began with."""
    ms.set_seed(config.seed)
    return build_model(config)


def restore(path: str) -> tuple[Config, MaskedImageModel | Classifier, int]:
    """The recipe, the model with its trained weights and the step of a run, a checkpoint or a weights file.

    Raises:
        UserError: There is none, or it is damaged.
    """
    checkpoint = read_checkpoint(path)
    return *model_of(checkpoint), checkpoint.step


def model_of(checkpoint: Checkpoint) -> tuple[Config, MaskedImageModel | Classifier]:
    """The recipe and the model with its trained weights."""
    config = config_from_dict(checkpoint.config)
    model = build_model(config)
    load_weights(model, checkpoint.weights())
    return config, model
