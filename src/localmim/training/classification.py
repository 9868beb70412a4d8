"""The tasks of training a classifier: fine-tuning all of it, or probing a frozen encoder.

The recipe is that of the authors' fine-tuning (BEiT's and MAE's): layer-wise rates, stochastic depth, mixup and cutmix,
label smoothing inside the targets. The loss is mindcv's cross-entropy on soft targets.
"""

from __future__ import annotations

import dataclasses

import mindspore as ms
import numpy as np
from mindcv.loss import create_loss
from mindspore import Tensor, nn

from localmim.config import Config
from localmim.data.mix import Mix
from localmim.data.pipeline import Batch
from localmim.data.sources import Source, open_source
from localmim.distributed import Ranks
from localmim.errors import UserError
from localmim.evaluation.accuracy import accuracy, class_numbers
from localmim.models.classifier import Classifier
from localmim.training.build import build_model
from localmim.training.drop_path import drop_path_factors
from localmim.training.initial import set_initial_weights
from localmim.training.layer_decay import layer_decay_groups
from localmim.training.optimizer import Group
from localmim.training.task import Task, is_due


class ClassificationLoss(nn.Cell):
    """Cross-entropy of logits and soft targets, mean over the batch, in float32."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.model = model
        self.cross_entropy = create_loss("CE")

    def construct(self, images: Tensor, targets: Tensor, drop: Tensor | None = None):
        """images [B, C, H, W], targets [B, classes], drop [depth, 2, B] -> (loss, losses [1])."""
        loss = self.cross_entropy(self.model(images, drop).astype(ms.float32), targets)
        return loss, loss.reshape(1)

    def activations(self, images: Tensor, targets: Tensor, drop: Tensor | None = None):
        """Names and values of what is computed on the way, in order: for finding errors, not in a graph."""
        for name, x in self.model.encoder.named_outputs(images):
            yield f"encoder.{name}", x
        yield "features", self.model.features(images)
        yield "logits", self.model(images)


class Classification(Task):
    """Fine-tuning or linear probing.

    Args:
        ranks: The devices that share the work.

    Raises:
        UserError: Something in the config does not fit, or the images have no labels.
    """

    def __init__(self, config: Config, ranks: Ranks):
        self.ranks = ranks
        in_chans = config.model.in_chans or 3
        self.source = open_source(config.data.dir, config.data.format, in_chans)
        self.classes = labelled(self.source, "data.dir", config.data.dir)
        if len(self.classes) < 2:
            raise UserError(
                f"data.dir: {config.data.dir} has one class only, {self.classes[0]!r}: expected two or more"
            )
        given = config.model.num_classes
        if given is None:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=len(self.classes)))
        elif given < len(self.classes):
            raise UserError(f"model.num_classes is {given}, but {config.data.dir} has {len(self.classes)} classes")
        self.config = config
        self.model = build_model(config)
        self.network = ClassificationLoss(self.model)
        self.drops = any(self.model.drop_rates)
        self.mix = self.mixing(config)
        self.pairs = self.mix.mixup is not None
        if self.pairs and not config.shared_draws:
            self.by_batch = "mixup and cutmix"
        if config.task == "linear_probe":
            self.by_batch = "the statistics"
            self.model.norm.share(ranks.world)
        self.val = None
        if config.data.val_dir:
            self.val = open_source(
                config.data.val_dir, config.data.format, in_chans, evaluation=True, called="data.val_dir"
            )
            labelled(self.val, "data.val_dir", config.data.val_dir)
            self.val_numbers = class_numbers(self.val, self.classes, config.data.val_dir)

    @property
    def shown(self) -> Source:
        return self.source if self.val is None else self.val

    def mixing(self, config: Config) -> Mix:
        """What makes soft targets of labels, and mixes images where the recipe says so."""
        options = config.classification
        return Mix(
            config.model.num_classes,
            options.mixup,
            options.cutmix,
            options.mix_prob,
            options.switch_prob,
            options.label_smoothing,
            config.seed,
            0 if config.shared_draws else self.ranks.rank,
        )

    def inputs(self, part: Batch, epoch: int, draw: int) -> tuple[np.ndarray, ...]:
        """Images, soft targets, and factors of stochastic depth if there are any."""
        images, targets = self.mix(part.images, part.labels, epoch, draw)
        if not self.drops:
            return images, targets
        return images, targets, drop_path_factors(self.model.drop_rates, self.config.seed, epoch, part.ids)

    def groups(self) -> dict[str, Group]:
        """Layer-wise rates; on a linear probe the head alone is trained."""
        return layer_decay_groups(self.model, self.config.optimizer.layer_decay)

    def begin(self) -> list[str]:
        return set_initial_weights(self.model, self.config, self.classes)

    def introduction(self) -> list[str]:
        names = ", ".join(self.classes[:5]) + (", …" if len(self.classes) > 5 else "")
        frozen = "; the encoder is frozen" if self.config.task == "linear_probe" else ""
        val = f"{len(self.val)} images to evaluate on" if self.val is not None else "no data.val_dir: not evaluated"
        return [f"{len(self.classes)} classes ({names}); pooling {self.model.pool}{frozen}; {val}"]

    def fingerprints(self) -> dict[str, str]:
        return {} if self.val is None else {"the images in data.val_dir": self.val.fingerprint()}

    def compute_alone(self) -> None:
        if self.config.task == "linear_probe":
            self.model.norm.share(1)

    def evaluation_is_due(self, step: int, steps_per_epoch: int, last: bool) -> bool:
        if self.val is None:
            return False
        return is_due(self.config.classification.eval_every, step, steps_per_epoch, last)

    def evaluate(self) -> dict[str, float]:
        """Top-1 and top-5 on data.val_dir, percent."""
        self.model.set_train(False)
        numbers, ranks = self.val_numbers, self.ranks
        result = accuracy(self.model, self.val, self.config.data, numbers=numbers, ranks=ranks, bar=False)
        self.model.set_train(True)
        return {"val_top1": result["top1"], "val_top5": result["top5"], "val_loss": result["loss"]}


def labelled(source: Source, key: str, path: str) -> list[str]:
    """The names of a source's classes.

    Raises:
        UserError: Its images have no labels.
    """
    if len(source.labels) == 0 or (source.labels < 0).any():
        raise UserError(f"{key}: {path} has images without a class; expected class folders, or a list with labels")
    return list(source.class_names) or [str(k) for k in range(int(source.labels.max()) + 1)]
