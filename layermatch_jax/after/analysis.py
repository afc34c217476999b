"""The numbers behind the pictures of runs, in NumPy."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn import decomposition, metrics


class Curve(NamedTuple):
    """A quantity over training. Nothing in it is NaN: what is not known has no step."""

    steps: np.ndarray  # int [T], ascending
    values: np.ndarray  # float [T], or [T, K] by class (there, NaN is a class that is not known)


def curve(lines: Sequence[dict[str, Any]], split: str, name: str) -> Curve:
    """What metrics.jsonl has of a quantity.

    Args:
      lines: of metrics.read.
      split: 'train', 'test' or 'validation'.
      name: of the metric. A quantity by class makes values of [T, K].

    Returns:
      Its Curve, without the lines in which it is not known; empty if it never is.
    """
    known = [
        (line["step"], line[name])
        for line in lines
        if line["split"] == split and line.get(name) is not None
    ]
    steps, values = zip(*known, strict=True) if known else ((), ())
    return Curve(np.array(steps, int), np.array(values, float))


def thinned(whole: Curve, limit: int) -> Curve:
    """A Curve of at most `limit` steps: means of neighbors, at the step of the last of them.

    A mean by class is over those neighbors in which the class is known.
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
    """Several runs' curve of one quantity, where all of them know it."""

    steps: np.ndarray  # int [T]
    mean: np.ndarray  # float [T]
    deviation: np.ndarray | None  # float [T], the sample's (n − 1); None of a single run
    count: int  # runs


def band(curves: Sequence[Curve]) -> Band:
    """The mean and the standard deviation over runs, at the steps that all of them have.

    A run that has no step at all is left out.
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
    """How many images of class i (row) were taken for class j (column): int [K, K].

    Args:
      truths: integers [N]; −1, where the class is not known, counts nowhere.
      predicted: integers [N] in 0..K−1.
      num_classes: K.
    """
    known = truths >= 0
    if not known.any():  # scikit-learn refuses classes without an image
        return np.zeros((num_classes, num_classes), int)
    return metrics.confusion_matrix(truths[known], predicted[known], labels=range(num_classes))


def most_confused(matrix: np.ndarray, count: int) -> list[tuple[int, int, int]]:
    """The largest entries off the diagonal: at most `count` (truth, prediction, images > 0)."""
    off = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    largest = np.argsort(-off, axis=None, kind="stable")[:count]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(largest, off.shape), strict=True)]
    return [(i, j, int(off[i, j])) for i, j in pairs if off[i, j]]


def confident_mistakes(probabilities: np.ndarray, truths: np.ndarray, count: int) -> np.ndarray:
    """Positions of the wrong predictions with the highest probability, that one first.

    Args:
      probabilities: float [N, K].
      truths: integers [N]; −1, where the class is not known, is no mistake.
      count: at most so many.

    Returns:
      int [n].
    """
    wrong = np.flatnonzero((truths >= 0) & (probabilities.argmax(axis=1) != truths))
    return wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")[:count]]


class Plane(NamedTuple):
    """The two directions in which points vary most."""

    mean: np.ndarray  # float [D]
    axes: np.ndarray  # float [D, 2], orthonormal; their largest components are positive
    shares: np.ndarray  # float [2], of the variance

    def project(self, points: np.ndarray) -> np.ndarray:
        """[n, D] -> [n, 2]."""
        return (points - self.mean) @ self.axes


def principal_plane(features: np.ndarray) -> Plane:
    """Principal component analysis to two dimensions, of features [N, D] with N and D ≥ 2."""
    with np.errstate(invalid="ignore"):  # the shares of features that do not vary, as 0 / 0
        fitted = decomposition.PCA(2, svd_solver="full").fit(np.float64(features))
    total = max(np.float64(features).var(axis=0, ddof=1).sum(), np.finfo(float).tiny)
    return Plane(fitted.mean_, fitted.components_.T, fitted.explained_variance_ / total)
