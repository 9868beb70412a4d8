"""Weighted k-NN of a checkpoint's features: nothing is trained, so it tells what the features are worth as they are."""

from __future__ import annotations

from localmim.config import DataConfig
from localmim.data.sources import open_source
from localmim.errors import UserError
from localmim.evaluation.features import extract_features
from localmim.evaluation.knn import weighted_knn
from localmim.training.restore import restore, untrained_model


def neighbours(
    ckpt: str,
    train_dir: str,
    val_dir: str,
    k: int = 20,
    temperature: float = 0.07,
    pool: str = "mean",
    untrained: bool = False,
) -> dict:
    """Weighted k-NN: images of `val_dir` ask those of `train_dir`.

    Features are standardised with the mean and deviation of `train_dir`, as a batch norm without affine part does
    before a linear probe.

    Args:
        ckpt: A run's folder, one of its checkpoints, or a weights file.
        train_dir, val_dir: Images with labels.
        k, temperature: As in `weighted_knn`.
        pool: As in Classifier: "mean" or "token".
        untrained: The same network with fresh weights.

    Returns:
        What `weighted_knn` returns.

    Raises:
        UserError: No checkpoint, or no labelled images.
    """
    config, model, _ = restore(ckpt)
    if untrained:
        model = untrained_model(config)
    sources = [open_source(path, "auto", model.encoder.in_chans) for path in (train_dir, val_dir)]
    for source, path in zip(sources, (train_dir, val_dir)):
        if not source.class_names or (source.labels < 0).any():
            raise UserError(f"{path}: expected class folders, or a list with labels")
    if list(sources[0].class_names) != list(sources[1].class_names):
        raise UserError(f"{train_dir} and {val_dir} have different classes")
    return knn_of(model.encoder, sources, config.data, k, temperature, pool, "untrained" if untrained else "trained")


def knn_of(encoder, sources, data: DataConfig, k: int, temperature: float, pool: str, label: str) -> dict:
    """Weighted k-NN of an encoder on sources for training and validation."""
    (train, train_labels), (val, val_labels) = [
        extract_features(encoder, source, data, pool=pool, label=f"{label}, {part}")[:2]
        for source, part in zip(sources, ("train", "val"))
    ]
    mean, deviation = train.mean(axis=0), train.std(axis=0) + 1e-6
    train, val = (train - mean) / deviation, (val - mean) / deviation
    return weighted_knn(train, train_labels, val, val_labels, k, temperature)
