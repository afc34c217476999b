"""Self-training on frozen features: logistic regression that learns its own pseudo-labels, too."""

import numpy as np

from layermatch_jax.frozen import probe

ROUNDS = 3


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    unlabeled: np.ndarray,
    num_classes: int,
    seed: int,
) -> probe.Probe:
    """Fits a probe to the labels, then three times to the labels and all pseudo-labels.

    Each round labels all unlabeled images by the probe of the round before. The weight of a
    pseudo-label is proportional to its probability (its confidence), and all of them together weigh
    as much as all labels. No pseudo-label is left out.

    Args:
      features: float32 [n, D], of the labeled images.
      labels: integers [n] in 0..K−1.
      unlabeled: float32 [m, D], features of the unlabeled images.
      num_classes: K.
      seed: of the folds that choose C on the labels alone.
    """
    fitted = probe.fit(features, labels, num_classes, seed)
    everything = np.concatenate([features, unlabeled])
    for _ in range(ROUNDS):
        probabilities = fitted.probabilities(unlabeled)
        confidence = probabilities.max(axis=1)
        weights = confidence * len(labels) / confidence.sum()
        fitted = probe.fit(
            everything,
            np.concatenate([labels, probabilities.argmax(axis=1)]),
            num_classes,
            seed,
            weights=np.concatenate([np.ones(len(labels)), weights]),
            C=fitted.C,
        )._replace(C_chosen=fitted.C_chosen)
    return fitted
