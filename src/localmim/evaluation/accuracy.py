"""Top-1 and top-5 accuracy of a classifier, each image counted once whatever the number of devices."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn
from tqdm import tqdm

from localmim.config import DataConfig
from localmim.data.pipeline import eval_batches
from localmim.data.sources import Source
from localmim.distributed import Ranks
from localmim.errors import UserError


def class_numbers(source: Source, classes: list[str], path: str) -> np.ndarray:
    """The classifier's number of each class of `source`: by name; a list, which has numbers for names, by number.

    Raises:
        UserError: A class that the classifier does not know.
    """
    names = list(source.class_names) or [str(k) for k in range(int(source.labels.max()) + 1)]
    if names == [str(k) for k in range(len(names))] and len(names) <= len(classes):
        return np.arange(len(names))
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise UserError(f"{path} has the class {unknown[0]!r}, which the classifier was not trained on")
    return np.asarray([classes.index(name) for name in names])


def accuracy(
    model: nn.Cell,
    source: Source,
    config: DataConfig,
    batch_size: int = 64,
    numbers: np.ndarray | None = None,
    ranks: Ranks | None = None,
    bar: bool = True,
) -> dict:
    """Evaluates a classifier.

    Each device takes every world-th image; the last, shorter batch is filled up with zeros that are not counted, and
    the counts are added up at the end. Of equal logits the first class wins; an image whose logits are not finite is a
    miss.

    Args:
        model: Images [B, C, H, W] -> logits [B, classes]; has an `encoder`.
        source, config: Labelled images; `data` of the recipe.
        batch_size: Images a forward pass on a device.
        numbers: The model's number of each of the source's classes; None: the same.
        ranks: The devices that share the work; None: one.
        bar: Show a progress bar.

    Returns:
        `top1` and `top5` in percent, `loss` (cross-entropy), `images` counted, `unreadable`.
    """
    ranks = Ranks() if ranks is None else ranks
    encoder = model.encoder
    numbers = np.arange(int(source.labels.max()) + 1) if numbers is None else numbers
    samples = range(ranks.rank, len(source), ranks.world)
    totals = np.zeros(5)  # hits, hits among five, loss, images, those that cannot be read
    batches = eval_batches(source, config, encoder.image_size, encoder.in_chans, batch_size, samples)
    with tqdm(total=len(samples), desc="evaluating", unit="img", disable=not bar or ranks.rank > 0) as progress:
        for batch in batches:
            count = len(batch.ids)
            logits = model(Tensor(filled_up(batch.images, batch_size))).asnumpy()[:count].astype(np.float64)
            totals[:4] += score(logits, numbers[batch.labels])
            progress.update(count)
            if totals[3]:
                progress.set_postfix_str(f"top-1 {100 * totals[0] / totals[3]:.2f} %", refresh=False)
    totals[4] = len(samples) - totals[3]
    hits, hits5, loss, images, unreadable = ranks.total(totals)
    if images == 0:
        raise UserError("none of the images can be read")
    if unreadable > config.max_bad_share * len(source):  # each device has seen its own only
        raise UserError(f"{unreadable:.0f} of {len(source)} images cannot be read, more than data.max_bad_share")
    return {
        "top1": 100 * hits / images,
        "top5": 100 * hits5 / images,
        "loss": loss / images,
        "images": int(images),
        "unreadable": int(unreadable),
    }


def filled_up(images: np.ndarray, count: int) -> np.ndarray:
    """[n, ...] -> [count, ...], zeros at the end: a graph is compiled for one batch size."""
    if len(images) == count:
        return images
    return np.concatenate([images, np.zeros((count - len(images), *images.shape[1:]), images.dtype)])


def score(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Hits, hits among the best five, summed cross-entropy and number of images, for logits [n, K] and labels [n]."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)  # [n, 1]
    before = np.arange(logits.shape[1]) < labels[:, None]
    place = ((logits > own) | ((logits == own) & before)).sum(axis=1)
    good = np.isfinite(logits).all(axis=1)
    top = logits.max(axis=1, keepdims=True)
    loss = np.log(np.exp(logits - top).sum(axis=1)) + (top - own)[:, 0]
    return np.asarray([(good & (place < 1)).sum(), (good & (place < 5)).sum(), loss.sum(), len(labels)], np.float64)
