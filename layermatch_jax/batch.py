"""What travels from the data wing to the steps."""

from typing import NamedTuple

import numpy as np


class TrainBatch(NamedTuple):
    """Rows of a training batch: each labelled image beside its μ unlabelled companions.

    A slice of rows is a complete share of the batch, so devices exchange no images.
    """

    images: np.ndarray  # [B, 1 + 2μ, H, W, 3] uint8: labelled; weak, strong views of unlabelled
    labels: np.ndarray  # [B] int32
    indices: np.ndarray  # [B, μ] int32, positions in the unlabelled set
    true_labels: np.ndarray  # [B, μ] int32, for diagnostics only; -1 = unknown, or a labelled image


class EvalBatch(NamedTuple):
    """Rows of an evaluation batch."""

    images: np.ndarray  # [n, H, W, 3] uint8
    labels: np.ndarray  # [n] int32
    mask: np.ndarray  # [n] float32, 0 for padding
