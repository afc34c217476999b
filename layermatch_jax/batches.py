"""The batches that the data pipeline passes to the train and evaluation steps."""

from typing import Any, NamedTuple

import numpy as np


class TrainBatch(NamedTuple):
    """Rows of a training batch: the views of a labeled image and of its μ unlabeled companions.

    A slice of rows is a complete share of the batch, so devices exchange no images.
    """

    images: np.ndarray  # [B, V, H, W, 3] uint8, the views in the order of views.Layout
    labels: np.ndarray  # [B] int32
    labeled_indices: np.ndarray  # [B] int32, positions in the labeled set
    unlabeled_indices: np.ndarray  # [B, μ] int32, positions in the unlabeled set
    # [B, μ] int32, for diagnostics alone; -1 = unknown, or the image is one of the labeled ones
    true_labels: np.ndarray
    draws: Any = ()  # the policy's own random draws, a tree of arrays [B, ...]


class EvalBatch(NamedTuple):
    """Rows of an evaluation batch."""

    images: np.ndarray  # [n, H, W, 3] uint8
    labels: np.ndarray  # [n] int32
    mask: np.ndarray  # [n] float32, 0 for padding
