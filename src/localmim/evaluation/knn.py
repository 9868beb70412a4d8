"""Weighted k-nearest-neighbour classification of frozen features: how good they are, with nothing trained on top.

As in instance discrimination (Wu et al., CVPR 2018, arXiv:1805.01978) and DINO (arXiv:2104.14294): features are
L2-normalised, a test image asks its k nearest training images by cosine similarity s, and each votes for its label with
weight exp(s / temperature).
"""

from __future__ import annotations

import numpy as np

from localmim.errors import UserError

CHUNK = 1 << 23  # similarities held at a time


def weighted_knn(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> dict:
    """Accuracy of weighted k-NN.

    Ties are settled by order: of equally similar training images the first ones are taken, of classes with equal votes
    the lower one wins. A class without a vote is never counted as a hit.

    Args:
        train_features: float [N, D], one row a training image, of any scale.
        train_labels: int [N], from 0.
        test_features: float [M, D].
        test_labels: int [M].
        k: neighbours that vote, 1 to N.
        temperature: of the votes, above 0; a small one lets the nearest decide.
        num_classes: number of classes; None: one more than the largest label.

    Returns:
        dict with `top1` and `top5` in percent, and `k`, `temperature`, `n_train`, `n_test`.

    Raises:
        UserError: shapes or labels do not fit, a feature is not finite, or another argument is out of range.
    """
    train, train_labels = _checked("train", train_features, train_labels)
    test, test_labels = _checked("test", test_features, test_labels)
    if train.shape[1] != test.shape[1]:
        raise UserError(f"k-NN: train features are {train.shape[1]} wide and test features {test.shape[1]}")
    if not 1 <= k <= len(train):
        raise UserError(f"k-NN: k is {k}, expected 1 to the number of training images, {len(train)}")
    if not temperature > 0:
        raise UserError(f"k-NN: temperature is {temperature}, expected a number above 0")
    top_label = int(max(train_labels.max(), test_labels.max()))
    if num_classes is None:
        num_classes = top_label + 1
    if top_label >= num_classes:
        raise UserError(f"k-NN: a label is {top_label}, expected labels below num_classes, {num_classes}")

    hits1 = hits5 = 0
    rows = max(1, CHUNK // len(train))
    for start in range(0, len(test), rows):
        labels = test_labels[start : start + rows]  # [R]
        similarity = test[start : start + rows] @ train.T  # [R, N]
        nearest = _top_k(similarity, k)  # [R, k]
        similarity = np.take_along_axis(similarity, nearest, axis=1).astype(np.float64)  # [R, k]
        # relative to the row's best: the winner is the same, and exp cannot overflow
        weight = np.exp((similarity - similarity.max(axis=1, keepdims=True)) / temperature)
        ballot = np.arange(len(labels))[:, None] * num_classes + train_labels[nearest]  # [R, k] index of (row, class)
        votes = np.bincount(ballot.ravel(), weight.ravel(), len(labels) * num_classes).reshape(-1, num_classes)
        ranking = np.argsort(-votes, axis=1, kind="stable")[:, :5]  # [R, 5]
        hit = (ranking == labels[:, None]) & (np.take_along_axis(votes, ranking, axis=1) > 0)
        hits1 += int(hit[:, 0].sum())
        hits5 += int(hit.any(axis=1).sum())
    return {
        "top1": 100.0 * hits1 / len(test),
        "top5": 100.0 * hits5 / len(test),
        "k": k,
        "temperature": temperature,
        "n_train": len(train),
        "n_test": len(test),
    }


def _checked(name: str, features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L2-normalised float32 features [N, D] and int64 labels [N], or a UserError."""
    features = np.asarray(features, np.float32)
    labels = np.asarray(labels)
    if features.ndim != 2 or len(features) == 0:
        raise UserError(f"k-NN: {name} features have shape {features.shape}, expected [images, width], images > 0")
    if labels.shape != features.shape[:1]:
        raise UserError(f"k-NN: {name} labels have shape {labels.shape}, expected one for each of {len(features)} rows")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise UserError(f"k-NN: {name} labels must be whole numbers from 0, got {labels.dtype} from {labels.min()}")
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise UserError(f"k-NN: {name} features of {len(bad)} images are not finite, first at row {bad[0]}")
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norm, 1e-12), labels.astype(np.int64)


def _top_k(similarity: np.ndarray, k: int) -> np.ndarray:
    """Columns [R, k] of the k largest values a row of [R, N]; of equal values the first ones. Ordered by column."""
    n = similarity.shape[1]
    kth = np.partition(similarity, n - k, axis=1)[:, n - k, None]  # [R, 1]
    above = similarity > kth
    level = similarity == kth
    room = k - above.sum(axis=1, keepdims=True)
    taken = above | (level & (np.cumsum(level, axis=1, dtype=np.int32) <= room))  # exactly k a row
    return np.nonzero(taken)[1].reshape(-1, k)
