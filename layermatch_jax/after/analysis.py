"""Computes the numbers of the figures of runs, in NumPy."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn import decomposition, metrics


class Curve(NamedTuple):
    """A quantity over training, with only the steps at which it is known."""

    steps: np.ndarray  # int [T], ascending
    values: np.ndarray  # float [T], or [T, K] by class (NaN: not known for this class)


def curve(lines: Sequence[dict[str, Any]], split: str, name: str) -> Curve:
    """Collects the curve of a metric from the lines of metrics.jsonl.

    Args:
      lines: lines from metrics.read.
      split: 'train', 'test' or 'validation'.
      name: name of the metric. A metric by class gives values [T, K].

    Returns:
      The Curve without the lines that lack the metric; empty if all lines lack it.
    """
    known = [
        (line["step"], line[name])
        for line in lines
        if line["split"] == split and line.get(name) is not None
    ]
    steps, values = zip(*known, strict=True) if known else ((), ())
    return Curve(np.array(steps, int), np.array(values, float))


def thinned(whole: Curve, limit: int) -> Curve:
    """Reduces a Curve to at most `limit` steps by means over neighbors, at the last one's step.

    Means by class leave out NaN.
    """
    total = len(whole.steps)
    if total <= limit:
        return whole
    starts = np.arange(limit) * total // limit
    known = ~np.isnan(whole.values)
    sums = np.add.reduceat(np.where(known, whole.values, 0.0), starts)
    counts = np.add.reduceat(known.astype(int), starts)
    values = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return Curve(whole.steps[np.append(starts[1:], total) - 1], values)


class Band(NamedTuple):
    """Mean and standard deviation of a quantity over runs, at the steps that all of them have."""

    steps: np.ndarray  # int [T]
    mean: np.ndarray  # float [T]
    deviation: np.ndarray | None  # float [T], with n − 1; None for a single run
    count: int  # runs


def band(curves: Sequence[Curve]) -> Band:
    """Computes mean and standard deviation over runs, at the steps that all of them have.

    Runs without any step are left out.
    """
    curves = [one for one in curves if len(one.steps)]
    if not curves:
        return Band(np.zeros(0, int), np.zeros(0), None, 0)
    steps = curves[0].steps
    for one in curves[1:]:
        steps = np.intersect1d(steps, one.steps)
    values = np.stack([one.values[np.searchsorted(one.steps, steps)] for one in curves])
    deviation = values.std(axis=0, ddof=1) if len(curves) > 1 else None
    return Band(steps, values.mean(axis=0), deviation, len(curves))


def confusion_matrix(truths: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts the images of class i (row) with the predicted class j (column): int [K, K].

    Args:
      truths: integers [N]; images of unknown class, −1, are left out.
      predicted: integers [N] in 0..K−1.
      num_classes: K.
    """
    known = truths >= 0
    if not known.any():  # scikit-learn raises an error for no images
        return np.zeros((num_classes, num_classes), int)
    return metrics.confusion_matrix(truths[known], predicted[known], labels=range(num_classes))


def most_confused(matrix: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """Finds the `count` largest positive entries off the diagonal: (truth, prediction, images)."""
    off = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    largest = np.argsort(-off, axis=None, kind="stable")[:count]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(largest, off.shape), strict=True)]
    return [(i, j, int(off[i, j])) for i, j in pairs if off[i, j]]


def confident_mistakes(probabilities: np.ndarray, truths: np.ndarray, count: int) -> np.ndarray:
    """Finds the wrong predictions with the highest probabilities, the highest first.

    Args:
      probabilities: float [N, K].
      truths: integers [N]; images of unknown class, −1, are left out.
      count: maximum number of positions.

    Returns:
      Positions, int [n].
    """
    wrong = np.flatnonzero((truths >= 0) & (probabilities.argmax(axis=1) != truths))
    return wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")[:count]]


class Plane(NamedTuple):
    """The two directions of largest variance (principal components)."""

    mean: np.ndarray  # float [D]
    axes: np.ndarray  # float [D, 2], orthonormal; their largest components are positive
    shares: np.ndarray  # float [2], of the variance

    def project(self, points: np.ndarray) -> np.ndarray:
        """Projects points [n, D] to the plane: [n, 2]."""
        return (points - self.mean) @ self.axes


def principal_plane(features: np.ndarray) -> Plane:
    """Finds the first two principal components of features [N, D]; N and D are at least 2."""
    with np.errstate(invalid="ignore"):  # constant features give shares 0 / 0
        fitted = decomposition.PCA(2, svd_solver="full").fit(np.float64(features))
    total = max(np.float64(features).var(axis=0, ddof=1).sum(), np.finfo(float).tiny)
    return Plane(fitted.mean_, fitted.components_.T, fitted.explained_variance_ / total)
