"""The linear probe: logistic regression on frozen features, and its cross-validation."""

from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax, softmax
from sklearn import linear_model

FOLDS = 5
# Candidates for C. Features are scaled to a mean square of 1, so that C does not depend on the
# backbone.
_C = tuple(float(10.0**exponent) for exponent in np.arange(-4, 1.5, 0.5))
_C_UNKNOWN = 0.1  # if no class has two labels
_STEPS = 1000  # of L-BFGS, at most
_ABSENT = -20.0  # bias of a class without labels, below the lowest of the others


class Probe(NamedTuple):
    """A linear classifier: features @ kernel + bias are the logits."""

    kernel: np.ndarray  # float32 [D, K]
    bias: np.ndarray  # float32 [K]
    C: float  # the inverse strength of the L2 penalty
    C_chosen: bool  # by cross-validation; False = no class had two labels, so C is a default

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Returns the probabilities, float32 [n, K], of features [n, D]."""
        return softmax(features @ self.kernel + self.bias, axis=1)


class CrossValidation(NamedTuple):
    """Predictions for labeled images by probes that did not see these images' labels."""

    held_out: np.ndarray  # int [m]: positions of the images, ascending
    probabilities: np.ndarray  # float32 [m, K]


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    seed: int,
    weights: np.ndarray | None = None,
    C: float | None = None,
) -> Probe:
    """Fits multinomial logistic regression with an L2 penalty.

    It minimizes ‖W‖² / 2 + C · Σ_i w_i · (−log p(y_i | x_i)), where one number scales all
    features to a mean square of 1. A class without labels gets a probability near 0.

    Args:
      features: float32 [n, D].
      labels: integers [n] in 0..K−1.
      num_classes: K.
      seed: of the folds that choose C.
      weights: w, [n] ≥ 0; None = 1 for each.
      C: None = chosen by cross-validation on the log-loss (`folds`).

    Returns:
      The probe, for features that are not scaled.
    """
    scale = 1 / max(np.sqrt(np.mean(np.square(features, dtype=np.float64))), 1e-12)
    scaled, basis = _in_span(features * np.float32(scale))
    chosen = C is None
    if C is None:
        of_folds = folds(labels, seed)
        chosen = bool((of_folds >= 0).any())
        C = _chosen(scaled, labels, num_classes, of_folds) if chosen else _C_UNKNOWN
    kernel, bias = _regression(scaled, labels, num_classes, weights, C)
    return Probe(
        kernel=(scale * (basis @ kernel)).astype(np.float32),
        bias=bias.astype(np.float32),
        C=C,
        C_chosen=chosen,
    )


def cross_validated(
    features: np.ndarray, labels: np.ndarray, num_classes: int, seed: int
) -> CrossValidation:
    """Predicts each labeled image by a probe on the other folds, which chooses its own C.

    An image whose class has no other label is never held out.

    Args:
      features: float32 [n, D].
      labels: integers [n] in 0..K−1.
      num_classes: K.
      seed: of the folds.
    """
    of_folds = folds(labels, seed)
    probabilities = np.zeros((len(labels), num_classes), np.float32)
    for fold in range(of_folds.max() + 1):
        out = of_folds == fold
        probe = fit(features[~out], labels[~out], num_classes, seed)
        probabilities[out] = probe.probabilities(features[out])
    held_out = np.flatnonzero(of_folds >= 0)
    return CrossValidation(held_out, probabilities[held_out])


def folds(labels: np.ndarray, seed: int) -> np.ndarray:
    """Deals the images of each class to the folds in turn, in a random order.

    Args:
      labels: integers [n].
      seed: of the order.

    Returns:
      The fold of each image, int [n] in 0..FOLDS−1; −1 for the only image of a class, which every
      fold's training needs.
    """
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(labels))
    of_folds, dealt = np.full(len(labels), -1), 0
    for label in np.unique(labels):
        members = order[labels[order] == label]
        if len(members) > 1:
            of_folds[members] = (dealt + np.arange(len(members))) % FOLDS
            dealt += len(members)  # so that small classes do not all begin at the first fold
    # Folds without images are left out of the numbering.
    used = np.unique(of_folds[of_folds >= 0])
    return np.where(of_folds >= 0, np.searchsorted(used, of_folds), -1)


def _chosen(scaled, labels, num_classes, of_folds) -> float:
    """Returns the lowest C whose log-loss on held-out images is within one standard error.

    That is: of the lowest mean loss (Breiman et al. 1984, Classification and Regression Trees,
    section 3.4.3). With few labels the minimum itself is mostly noise, and a strong penalty is the
    safer mistake.
    """
    held_out = of_folds >= 0

    def losses(C: float) -> np.ndarray:
        log_p = np.zeros(len(labels))
        for fold in range(of_folds.max() + 1):
            out = of_folds == fold
            kernel, bias = _regression(scaled[~out], labels[~out], num_classes, None, C)
            of_fold = log_softmax(scaled[out] @ kernel + bias, axis=1)
            log_p[out] = of_fold[np.arange(len(of_fold)), labels[out]]
        return -log_p[held_out]

    by_C = {C: losses(C) for C in _C}
    best = min(by_C.values(), key=np.mean)
    bound = best.mean() + best.std(ddof=1) / np.sqrt(len(best))
    return min(C for C, loss in by_C.items() if loss.mean() <= bound)


def _in_span(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotates features [n, D] into the space that they span: ([n, r], basis [D, r]), r ≤ n.

    The penalty keeps the kernel in this space, so the solution is the same, and fewer images than
    features make it much faster to find.
    """
    if len(x) >= x.shape[1]:
        return x, np.eye(x.shape[1], dtype=np.float32)
    u, s, basis = np.linalg.svd(x, full_matrices=False)
    return u * s, basis.T


def _regression(x, labels, num_classes, weights, C) -> tuple[np.ndarray, np.ndarray]:
    """Returns (kernel [d, K], bias [K]) of the logistic regression."""
    present, rows = np.unique(labels, return_inverse=True)
    kernel, bias = np.zeros((x.shape[1], num_classes)), np.zeros(num_classes)
    if len(present) > 1:
        # For two classes, scikit-learn fits the difference w of the two logits and penalizes
        # ‖w‖² / 2. For all others it penalizes both columns: ‖−w / 2‖² / 2 + ‖w / 2‖² / 2.
        two = len(present) == 2
        model = linear_model.LogisticRegression(C=2 * C if two else C, max_iter=_STEPS)
        model.fit(x, rows, weights)
        coefficients, intercept = model.coef_, model.intercept_
        if two:
            coefficients = np.concatenate([-coefficients, coefficients]) / 2
            intercept = np.concatenate([-intercept, intercept]) / 2
        kernel[:, present], bias[present] = coefficients.T, intercept
    absent = np.setdiff1d(np.arange(num_classes), present)
    bias[absent] = bias[present].min() + _ABSENT
    return kernel, bias
