"""The classifier that a run from pretrained weights starts with (config.model.head_init)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import ml_collections
import numpy as np

from layermatch_jax.data.splits import Partition
from layermatch_jax.frozen import features
from layermatch_jax.method.state import TrainState
from layermatch_jax.runtime import hosts

if TYPE_CHECKING:
    from layermatch_jax.frozen import probe


class Head(NamedTuple):
    """A linear classifier, and how it was found, for the user."""

    kernel: np.ndarray  # float32 [D, K]
    bias: np.ndarray  # float32 [K]
    notes: tuple[str, ...]


def fit(
    name: str,
    state: TrainState,
    statistics: tuple,
    partition: Partition,
    config: ml_collections.ConfigDict,
) -> Head:
    """Fits a classifier on the features of the backbone in `state`.

    In a run of several processes, all call this function, and the first one computes.

    Args:
      name: 'probe' or 'self_training'.
      state: before the first step; its backbone has the pretrained weights.
      statistics: (means, deviations) of the channels, for normalization.
      partition: the images of the run.
      config: the whole config, resolved.

    Raises:
      InputError: an image cannot be read; the message names its file.
    """
    from layermatch_jax.frozen import probe, self_training  # scikit-learn, only where it is used

    shape = state.params["classifier"]["kernel"].shape
    fitted = probe.Probe(np.zeros(shape, np.float32), np.zeros(shape[1], np.float32), 0.0, False)
    with hosts.all_or_none():
        if hosts.is_first():
            labels = partition.labeled.labels
            labeled = features.of_images(state, statistics, partition.labeled, config)
            if name == "probe":
                fitted = probe.fit(labeled, labels, shape[1], config.seed)
            else:
                unlabeled = features.of_images(state, statistics, partition.unlabeled, config)
                fitted = self_training.fit(labeled, labels, unlabeled, shape[1], config.seed)
    kernel, bias = hosts.from_first((fitted.kernel, fitted.bias))
    return Head(np.asarray(kernel), np.asarray(bias), _told(name, fitted, partition))


def _told(name: str, fitted: probe.Probe, partition: Partition) -> tuple[str, ...]:
    on = f"{len(partition.labeled.labels)} labeled"
    if name == "self_training":
        on += f" and {len(partition.unlabeled.labels)} unlabeled"
    how = "chosen by cross-validation" if fitted.C_chosen else "not chosen: no class has two labels"
    return (
        f"The classifier starts from logistic regression on the features of the {on} images "
        f"(model.head_init={name}; C={fitted.C:.2g}, {how})",
    )
