"""Features of a frozen encoder: its pooled tokens, every patch visible, no norm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import Tensor, nn
from tqdm import tqdm

from localmim.config import DataConfig
from localmim.data.pipeline import eval_batches
from localmim.data.sources import Source
from localmim.errors import UserError
from localmim.evaluation.accuracy import filled_up
from localmim.models.classifier import Classifier


def pooled(encoder: nn.Cell, pool: str = "mean") -> Classifier:
    """Images [B, C, H, W] -> features [B, D], as a Cell to be compiled once.

    Args:
        pool: "mean" of the patch tokens of the top trained block (or stage), or its class "token"; un-normed both.

    Raises:
        UserError: The encoder has no such pooling.
    """
    try:
        return Classifier(encoder, 0, pool)
    except ValueError as error:
        raise UserError(str(error)) from error


def extract_features(
    network: Classifier,
    source: Source,
    config: DataConfig,
    batch_size: int = 64,
    label: str = "features",
    samples: Sequence[int] | None = None,
    bar: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features float32 [N, D], labels int32 [N] and sample numbers int32 [N] of all readable images, in order.

    The graph is compiled for one batch size: the last, shorter batch is filled up with zeros, which are cut off again.

    Args:
        network: What `pooled` gives.
        label: What the progress bar says.
        samples: Numbers of the images wanted; None: all.
        bar: Whether there is a progress bar.

    Raises:
        UserError: None of the images can be read.
    """
    network.set_train(False)
    encoder = network.encoder
    features, labels, ids = [], [], []
    batches = eval_batches(source, config, encoder.image_size, encoder.in_chans, batch_size, samples)
    total = len(source) if samples is None else len(samples)
    with tqdm(total=total, desc=label, unit="img", mininterval=1, disable=not bar) as progress:
        for batch in batches:
            count = len(batch.ids)
            features.append(network(Tensor(filled_up(batch.images, batch_size))).asnumpy()[:count])
            labels.append(batch.labels)
            ids.append(batch.ids)
            progress.update(count)
    if not features:
        raise UserError("none of the images can be read")
    return np.concatenate(features), np.concatenate(labels), np.concatenate(ids)
