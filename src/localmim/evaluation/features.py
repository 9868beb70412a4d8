"""Features of a frozen encoder: the mean of the top trained block's patch tokens, every patch visible."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn
from tqdm import tqdm

from localmim.config import DataConfig
from localmim.data.pipeline import eval_batches
from localmim.data.sources import Source


class _Features(nn.Cell):
    def __init__(self, encoder: nn.Cell):
        super().__init__()
        self.encoder = encoder

    def construct(self, images: Tensor) -> Tensor:
        return self.encoder.features(images)


def extract_features(
    encoder: nn.Cell, source: Source, config: DataConfig, batch_size: int = 64, label: str = "features"
) -> tuple[np.ndarray, np.ndarray]:
    """Features float32 [N, D] and labels int32 [N] of all readable images, in order.

    The graph is compiled for one batch shape: the last, shorter batch is filled up with zeros, which are cut off again.
    """
    network = _Features(encoder)
    network.set_train(False)
    features, labels = [], []
    batches = eval_batches(source, config, encoder.image_size, encoder.in_chans, batch_size)
    with tqdm(total=len(source), desc=label, unit="img", mininterval=1) as bar:
        for batch in batches:
            n = len(batch.ids)
            images = batch.images
            if n < batch_size:
                images = np.concatenate([images, np.zeros((batch_size - n, *images.shape[1:]), np.float32)])
            features.append(network(Tensor(images)).asnumpy()[:n])
            labels.append(batch.labels)
            bar.update(n)
    return np.concatenate(features), np.concatenate(labels)
