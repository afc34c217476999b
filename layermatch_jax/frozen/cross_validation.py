"""An estimate of the accuracy where there are no test images."""

from __future__ import annotations

from typing import Any

import ml_collections
import numpy as np
from scipy import stats

from layermatch_jax.data.splits import Partition
from layermatch_jax.errors import NonFiniteLossError
from layermatch_jax.frozen import features
from layermatch_jax.method.state import TrainState
from layermatch_jax.runtime import hosts

_CONFIDENCE = 0.95


def evaluate(
    state: TrainState, statistics: tuple, partition: Partition, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    """Predicts each labeled image by a linear probe that did not see its label.

    The probes are fitted on features of the averaged (EMA) backbone, in five folds. Before the
    first step this is an estimate without bias of the accuracy of such probes. Afterwards the
    backbone has seen the labels of all folds, so the estimate is too high.

    In a run of several processes, all call this function, and the first one computes.

    Args:
      state: on the devices.
      statistics: (means, deviations) of the channels, for normalization.
      partition: the images of the run.
      config: the whole config, resolved.

    Returns:
      {'accuracy_ema', 'loss_ema': over the images that can be held out, those of classes with two
      labels or more, accuracy in [0, 1] and loss in nats; 'interval_ema': [low, high], the 95 %
      interval of the accuracy (Wilson 1927); 'held_out': number of these images; 'confusion':
      counts [K, K] (rows are true classes)}. With no such image, accuracy and loss are NaN.

    Raises:
      NonFiniteLossError: the features are not finite.
      InputError: an image cannot be read.
    """
    from layermatch_jax.frozen import probe  # scikit-learn, only where it is used

    num_classes = len(partition.class_names)
    confusion, loss = np.zeros((num_classes, num_classes)), np.zeros(())
    with hosts.all_or_none():
        if hosts.is_first():
            labels = partition.labeled.labels
            of_images = features.of_images(state, statistics, partition.labeled, config)
            if not np.isfinite(of_images).all():
                raise NonFiniteLossError("the features of the labeled images are not finite")
            found = probe.cross_validated(of_images, labels, num_classes, config.seed)
            true = labels[found.held_out]
            np.add.at(confusion, (true, found.probabilities.argmax(axis=1)), 1)
            of_truth = found.probabilities[np.arange(len(true)), true]
            loss = -np.log(np.maximum(of_truth, 1e-12)).sum()
    confusion, loss = map(np.asarray, hosts.from_first((confusion, np.float64(loss))))
    count, right = int(confusion.sum()), int(np.trace(confusion))
    interval = [0.0, 1.0]
    if count:
        wilson = stats.binomtest(right, count).proportion_ci(_CONFIDENCE, method="wilson")
        interval = [float(wilson.low), float(wilson.high)]
    return {
        "accuracy_ema": right / count if count else float("nan"),
        "loss_ema": float(loss) / count if count else float("nan"),
        "interval_ema": interval,
        "held_out": count,
        "confusion": confusion,
    }
