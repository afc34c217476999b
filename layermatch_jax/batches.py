"""The batches that the data pipeline passes to the train and evaluation steps."""

from typing import Any, NamedTuple

from jaxtyping import Float, Float32, Int32, UInt8

from layermatch_jax.arrays import Array


class TrainBatch(NamedTuple):
    """Rows of a training batch: the views of a labeled image and of its μ unlabeled companions.

    A slice of rows is a complete share of the batch, so devices exchange no images.
    """

    # The views in the order of views.Layout, or their activations (frozen/cached_views.py)
    images: UInt8[Array, "B V H W 3"] | Float[Array, "B V ..."]
    labels: Int32[Array, " B"]
    labeled_indices: Int32[Array, " B"]  # positions in the labeled set
    unlabeled_indices: Int32[Array, "B μ"]  # positions in the unlabeled set
    # Only for diagnostics; -1 = the true label is unknown, or the image is a labeled one
    true_labels: Int32[Array, "B μ"]
    draws: Any = ()  # the policy's own random draws, a tree of arrays [B, ...]


class EvalBatch(NamedTuple):
    """Rows of an evaluation batch."""

    images: UInt8[Array, "n H W 3"]
    labels: Int32[Array, " n"]
    mask: Float32[Array, " n"]  # 0 for padding
