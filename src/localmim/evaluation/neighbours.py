"""Weighted k-NN of a model's features: nothing is trained, so it tells what the features are worth as they are."""

from __future__ import annotations

from localmim.config import DataConfig
from localmim.data.sources import Source, open_source, spread
from localmim.errors import UserError
from localmim.evaluation.features import extract_features
from localmim.evaluation.knn import weighted_knn
from localmim.models.classifier import Classifier


def open_pair(train_dir: str, val_dir: str, in_chans: int, format: str = "auto") -> tuple[Source, Source]:
    """Labelled images that answer, and those that ask.

    Args:
        train_dir, val_dir: As `data.dir`; of a CIFAR folder that is both, the two parts.
        format: As `data.format`.

    Raises:
        UserError: No labelled images, or other classes in one than in the other.
    """
    sources = [open_source(path, format, in_chans, evaluation=path == val_dir) for path in (train_dir, val_dir)]
    for source, path in zip(sources, (train_dir, val_dir)):
        if not source.class_names or (source.labels < 0).any():
            raise UserError(f"{path}: expected class folders, or a list with labels")
    if list(sources[0].class_names) != list(sources[1].class_names):
        raise UserError(f"{train_dir} and {val_dir} have different classes")
    return sources[0], sources[1]


def neighbours(
    network: Classifier,
    train: Source,
    val: Source,
    data: DataConfig,
    k: int = 20,
    temperature: float = 0.07,
    batch_size: int = 64,
    label: str = "features",
    most: tuple[int, int] | None = None,
    bar: bool = True,
) -> dict:
    """Weighted k-NN: images of `val` ask those of `train`.

    Features are standardised with the mean and deviation of those of `train`, as a batch norm without affine part does
    before a linear probe.

    Args:
        network: Images to features (features.pooled).
        train, val: What `open_pair` gives.
        data: How images are normalised; `data` of the recipe.
        k, temperature: As in `weighted_knn`.
        batch_size: Images a forward pass.
        label: What the progress bars say.
        most: At most so many images of each, evenly spread; None: all.
        bar: Whether there are progress bars.

    Returns:
        What `weighted_knn` returns.
    """
    found = []
    for part, source, limit in zip(("train", "val"), (train, val), most or (len(train), len(val))):
        samples = spread(len(source), limit)
        found += extract_features(network, source, data, batch_size, f"{label}, {part}", samples, bar)[:2]
    bank, bank_labels, queries, query_labels = found
    mean, deviation = bank.mean(axis=0), bank.std(axis=0) + 1e-6
    bank, queries = (bank - mean) / deviation, (queries - mean) / deviation
    return weighted_knn(bank, bank_labels, queries, query_labels, k, temperature)
