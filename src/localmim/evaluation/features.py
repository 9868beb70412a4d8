"""Features of a frozen encoder: its pooled tokens, every patch visible, no norm."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn
from tqdm import tqdm

from localmim.config import DataConfig
from localmim.data.pipeline import eval_batches
from localmim.data.sources import Source
from localmim.errors import UserError
from localmim.evaluation.accuracy import filled_up
from localmim.models.classifier import Classifier


def extract_features(
    encoder: nn.Cell,
    source: Source,
    config: DataConfig,
    batch_size: int = 64,
    pool: str = "mean",
    label: str = "features",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features float32 [N, D], labels int32 [N] and sample numbers int32 [N] of all readable images, in order.

    The graph is compiled for one batch size: the last, shorter batch is filled up with zeros, which are cut off again.

    Args:
        pool: "mean" of the patch tokens of the top trained block (or stage), or its class "token"; un-normed both.

    Raises:
        UserError: The encoder has no such pooling.
    """
    try:
        network = Classifier(encoder, 0, pool)
    except ValueError as error:
        raise UserError(str(error)) from error
    network.set_train(False)
    features, labels, samples = [], [], []
    batches = eval_batches(source, config, encoder.image_size, encoder.in_chans, batch_size)
    with tqdm(total=len(source), desc=label, unit="img", mininterval=1) as bar:
        for batch in batches:
            count = len(batch.ids)
            features.append(network(Tensor(filled_up(batch.images, batch_size))).asnumpy()[:count])
            labels.append(batch.labels)
            samples.append(batch.ids)
            bar.update(count)
    if not features:
        raise UserError("none of the images can be read")
    return np.concatenate(features), np.concatenate(labels), np.concatenate(samples)
