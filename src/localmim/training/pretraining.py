"""The task of pre-training: images with masks, and codebook ids where they are the target."""

from __future__ import annotations

import json

import numpy as np

from localmim.config import Config
from localmim.data.pipeline import Batch
from localmim.data.sources import open_source
from localmim.distributed import Ranks
from localmim.errors import UserError
from localmim.mim.tokenizers import StoredIds, fingerprint, require_fixed_crops
from localmim.training.build import build_masking, build_model, build_tokenizer
from localmim.training.initial import go_on_pretraining
from localmim.training.optimizer import Group, pretraining_groups
from localmim.training.task import Task


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
        self.codebook = fingerprint(config.target.codebook) if self.tokenizer is not None else None

    def inputs(self, part: Batch, epoch: int, draw: int) -> tuple[np.ndarray, ...]:
        """Images, mask arrays, codebook ids if any."""
        ids = () if self.tokenizer is None else self.tokenizer(part.images, part.ids)
        mask = self.masking(epoch, part.ids, draw if self.config.shared_draws else None)
        return (part.images, *mask.arrays(), *ids)

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
        return lines

    def fingerprints(self) -> dict[str, str]:
        return {} if self.codebook is None else {"target.codebook": json.dumps(self.codebook)}

    def state(self) -> dict:
        return {"codebook": self.codebook}

    def check_state(self, state: dict) -> None:
        if state.get("codebook") != self.codebook:
            raise UserError(f"target.codebook is not the one that the run in {self.config.output_dir} began with")
