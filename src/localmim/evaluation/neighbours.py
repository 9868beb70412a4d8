"""Weighted k-NN of a model's features: nothing is trained, so it tells what the features are worth as they are."""

from __future__ import annotations

from mindspore import nn

from localmim.config import DataConfig
from localmim.data.sources import open_source
from localmim.errors import UserError
from localmim.evaluation.features import extract_features
from localmim.evaluation.knn import weighted_knn


def neighbours(
    model: nn.Cell,
    train_dir: str,
    val_dir: str,
    data: DataConfig,
    format: str = "auto",
    k: int = 20,
    temperature: float = 0.07,
    pool: str = "mean",
    batch_size: int = 64,
    label: str = "features",
) -> dict:
    """Weighted k-NN: images of `val_dir` ask those of `train_dir`.

    Features are standardised with the mean and deviation of `train_dir`, as a batch norm without affine part does
    before a linear probe.

    Args:
        model: Has an `encoder`.
        train_dir, val_dir: Images with labels.
        data: How images are normalised; `data` of the recipe.
        format: As `data.format`.
        k, temperature: As in `weighted_knn`.
        pool: "mean" of the patch tokens or the class "token".
        batch_size: Images a forward pass.
        label: What the progress bars say.

    Returns:
        What `weighted_knn` returns.

    Raises:
        UserError: No labelled images, or other classes in one folder than in the other.
    """
    channels = model.encoder.in_chans
    sources = [open_source(path, format, channels, evaluation=path == val_dir) for path in (train_dir, val_dir)]
    for source, path in zip(sources, (train_dir, val_dir)):
        if not source.class_names or (source.labels < 0).any():
            raise UserError(f"{path}: expected class folders, or a list with labels")
    if list(sources[0].class_names) != list(sources[1].class_names):
        raise UserError(f"{train_dir} and {val_dir} have different classes")
    (train, train_labels), (val, val_labels) = [
        extract_features(model.encoder, source, data, batch_size, pool, f"{label}, {part}")[:2]
        for source, part in zip(sources, ("train", "val"))
    ]
    mean, deviation = train.mean(axis=0), train.std(axis=0) + 1e-6
    return weighted_knn((train - mean) / deviation, train_labels, (val - mean) / deviation, val_labels, k, temperature)
