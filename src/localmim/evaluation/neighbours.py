"""Weighted k-NN of a model's features: nothing is trained, so it tells what the features are worth as they are."""

from __future__ import annotations

import numpy as np

from localmim.config import DataConfig
from localmim.data.sources import Source, open_source, spread
from localmim.distributed import Ranks
from localmim.errors import RunError, UserError
from localmim.evaluation.features import extract_features
from localmim.evaluation.knn import weighted_knn
from localmim.models.classifier import Classifier


def open_pair(
    train_dir: str, val_dir: str, in_chans: int, format: str = "auto", called: tuple[str, str] = ("data.dir",) * 2
) -> tuple[Source, Source]:
    """Labelled images that answer, and those that ask.

    Args:
        train_dir, val_dir: As `data.dir`; of a CIFAR folder that is both, the two parts.
        format: As `data.format`.
        called: What the user knows them by.

    Raises:
        UserError: No labelled images, other classes in one than in the other, or twice the same images.
    """
    train = open_source(train_dir, format, in_chans, called=called[0])
    val = open_source(val_dir, format, in_chans, evaluation=True, called=called[1])
    require_pair(train, val, train_dir, val_dir)
    return train, val


def require_pair(train: Source, val: Source, train_dir: str, val_dir: str) -> None:
    """UserError where images of `val` cannot ask those of `train`; see `open_pair`."""
    for source, path in ((train, train_dir), (val, val_dir)):
        if not source.class_names or (source.labels < 0).any():
            raise UserError(f"{path}: expected class folders, or a list with labels")
    if list(train.class_names) != list(val.class_names):
        raise UserError(f"{train_dir} and {val_dir} have different classes")
    if len(train) == len(val) and train.fingerprint() == val.fingerprint():
        raise UserError(f"{train_dir} and {val_dir} hold the same images: each would find itself")


def neighbours(
    network: Classifier,
    train: Source,
    val: Source,
    data: DataConfig,
    k: int = 20,
    temperature: float = 0.07,
    batch_size: int = 64,
    label: str = "features",
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

    Returns:
        What `weighted_knn` returns.
    """
    bank, queries = (
        extract_features(network, source, data, batch_size, f"{label}, {part}")[:2]
        for part, source in (("train", train), ("val", val))
    )
    return vote(*bank, *queries, k, temperature)


def shared_neighbours(
    network: Classifier, train: Source, val: Source, data: DataConfig, ranks: Ranks, most: tuple[int, int]
) -> dict:
    """As `neighbours`, of at most so many images of each, evenly spread, which the devices share; all know the result.

    k is 20, or as many as there are images to answer.

    Raises:
        RunError: It cannot be done; on all devices alike.
    """
    sides, error = [], None
    try:
        for source, limit in zip((train, val), most):
            samples = spread(len(source), limit)[ranks.rank :: ranks.world]
            sides.append(extract_features(network, source, data, samples=samples, bar=False)[:2])
    except Exception as failed:  # an operator without memory, files that are gone, ...
        error = failed
    if ranks.gather(float(error is not None)).any():  # before all meet again: none is left waiting
        raise RunError(" ".join(str(error or "another device failed").split()))
    (bank, bank_labels), (queries, query_labels) = (
        (ranks.rows(features), ranks.rows(labels.astype(np.float32)[:, None])[:, 0].astype(np.int32))
        for features, labels in sides
    )
    try:
        return vote(bank, bank_labels, queries, query_labels, min(20, len(bank)), 0.07)
    except UserError as failed:  # the same on all devices
        raise RunError(str(failed)) from failed


def vote(bank, bank_labels, queries, query_labels, k: int, temperature: float) -> dict:
    """`weighted_knn` of features that are standardised by the bank's mean and deviation."""
    mean, deviation = bank.mean(axis=0), bank.std(axis=0) + 1e-6
    bank, queries = (bank - mean) / deviation, (queries - mean) / deviation
    return weighted_knn(bank, bank_labels, queries, query_labels, k, temperature)
