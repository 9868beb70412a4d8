"""The task of pre-training: images with masks, the targets that are data, and factors of stochastic depth."""

from __future__ import annotations

import json
import logging

import numpy as np
from mindspore import Tensor, nn

from localmim.config import Config
from localmim.data.pipeline import Batch
from localmim.data.sources import Source, open_source
from localmim.distributed import Ranks
from localmim.errors import RunError, UserError
from localmim.evaluation.features import pooled
from localmim.evaluation.neighbours import require_pair, shared_neighbours
from localmim.mim.model import MaskedImageModel
from localmim.mim.tokenizers import StoredIds, fingerprint, require_fixed_crops
from localmim.models.layers import linear_rates
from localmim.training.build import build_masking, build_model, build_tokenizer
from localmim.training.drop_path import drop_path_factors
from localmim.training.initial import go_on_pretraining
from localmim.training.optimizer import Group, pretraining_groups
from localmim.training.task import Task, is_due

KNN_MOST = (5_000, 1_000)  # images of data.dir and of data.val_dir that k-NN takes at most


log = logging.getLogger("localmim.training")


class DroppedLoss(nn.Cell):
    """A model's loss under stochastic depth, whose factors are the last input."""

    def __init__(self, model: MaskedImageModel):
        super().__init__()
        self.model = model

    def construct(self, images: Tensor, *arrays: Tensor):
        """images [B, C, H, W], mask arrays, target arrays, drop [depth, 2, rows] -> (loss, losses [scales])."""
        return self.model.forward(images, arrays[:-1], arrays[-1])

    def activations(self, images: Tensor, *arrays: Tensor):
        """As the model's, without stochastic depth."""
        yield from self.model.activations(images, *arrays[:-1])


class Pretraining(Task):
    """Masked image modelling.

    Args:
        ranks: The devices that share the work.

    Raises:
        UserError: Something in the config does not fit.
    """

    def __init__(self, config: Config, ranks: Ranks):
        self.config = config
        self.model = self.network = build_model(config)
        self.drops = self.model.drop_path > 0
        if self.drops:
            self.network = DroppedLoss(self.model)
        self.loss_parts = len(self.model.decoders)
        self.masking = build_masking(config, self.model)
        if self.masking.by_batch and not config.shared_draws:
            self.by_batch = "the mask"
        encoder = self.model.encoder
        self.source = open_source(config.data.dir, config.data.format, encoder.in_chans)
        self.tokenizer = build_tokenizer(config, self.model)
        if isinstance(self.tokenizer, StoredIds):
            require_fixed_crops(config.data, encoder.image_size)
            self.tokenizer.check(self.source)
        self.ranks, self.val, self.labelled, self.features, self.without = ranks, None, None, None, ""
        if config.data.val_dir and config.report_every is not None:
            data = config.data
            self.val = open_source(data.val_dir, data.format, encoder.in_chans, evaluation=True, called="data.val_dir")
            try:
                require_pair(self.source, self.val, data.dir, data.val_dir)
                self.labelled = self.source, self.val
            except UserError as error:
                self.without = str(error)
        target = config.target
        files = {"codebook": target.codebook if target.kind == "codebook" else [], "features": target.features}
        self.digests = {key: fingerprint(names) if names else None for key, names in files.items()}

    def inputs(self, part: Batch, epoch: int, draw: int) -> tuple[np.ndarray, ...]:
        """Images, mask arrays, then what there is of codebook ids, features and factors of stochastic depth."""
        given = () if self.tokenizer is None else self.tokenizer(part.images, part.ids)
        mask = self.masking(epoch, part.ids, draw if self.config.shared_draws else None)
        drop = (self.factors(epoch, part.ids, mask.views),) if self.drops else ()
        return (part.images, *mask.arrays(), *given, *drop)

    def factors(self, epoch: int, samples: np.ndarray, views: int) -> np.ndarray:
        """Of stochastic depth, [depth, 2, B*views]."""
        encoder = self.model.encoder
        rates = linear_rates(self.model.drop_path, encoder.depth)
        return drop_path_factors(rates, self.config.seed, epoch, samples, views, encoder.shared_blocks)

    def groups(self) -> dict[str, Group]:
        """The full rate for all; the encoder says what does not decay."""
        trainable = {n: p for n, p in self.model.parameters_and_names() if p.requires_grad}
        return pretraining_groups(trainable, self.model.encoder.no_decay)

    def begin(self) -> list[str]:
        return go_on_pretraining(self.model, self.config)

    def introduction(self) -> list[str]:
        encoder = self.model.encoder
        lines = [self.masking.describe()]
        if encoder.idle():
            lines.append(f"{encoder.idle()} lie above the last tap and are not trained")
        if self.labelled is not None:
            lines.append(f"k-NN at each report, of at most {KNN_MOST[0]} and {KNN_MOST[1]} images")
        elif self.without:
            lines.append(f"no k-NN at the reports: {self.without}")
        if self.drops:
            lines.append(f"stochastic depth: a rate of {self.model.drop_path:g} in the last block, 0 in the first")
        return lines

    @property
    def shown(self) -> Source:
        return self.source if self.val is None else self.val

    def evaluation_is_due(self, step: int, steps_per_epoch: int, last: bool) -> bool:
        return self.labelled is not None and is_due(self.config.report_every, step, steps_per_epoch, last)

    def evaluate(self) -> dict[str, float]:
        """Top-1 of weighted k-NN on data.val_dir, percent. It is beside the run: where it fails, that is told."""
        if self.features is None:
            self.features = pooled(self.model.encoder)
        try:
            found = shared_neighbours(self.features, *self.labelled, self.config.data, self.ranks, KNN_MOST)
        except RunError as error:
            log.warning("no k-NN: %s", error)
            return {}
        finally:
            self.model.set_train(True)
        return {"knn_top1": found["top1"]}

    def fingerprints(self) -> dict[str, str]:
        files = {f"target.{key}": json.dumps(digest) for key, digest in self.digests.items() if digest}
        return {**files, "whether data.dir and data.val_dir allow k-NN": str(self.labelled is not None)}

    def state(self) -> dict:
        return self.digests

    def check_state(self, state: dict) -> None:
        for key, digest in self.digests.items():
            if state.get(key) != digest:
                raise UserError(f"target.{key} is not the one that the run in {self.config.output_dir} began with")
