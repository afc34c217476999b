"""What a pseudo-label policy is: a pure function of the global batch and its own state.

A policy knows nothing of devices, layers or data.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Inputs(NamedTuple):
    """What a policy sees: the global batch, in global row order, without gradient.

    B labelled rows, μB unlabelled ones, K classes; logits are float32.
    """

    weak_logits: jax.Array  # [μB, K], of the target head
    strong_logits: jax.Array  # [μB, K], of the head that features see the loss through
    labeled_logits: jax.Array  # [B, K], of the classifier
    labels: jax.Array  # [B] int32
    indices: jax.Array  # [μB] int32, positions in the unlabelled set


class Assignment(NamedTuple):
    """What a policy answers, for the same rows.

    The unsupervised loss is scale · (1/μB · Σ_j weights_j · loss(logits_j, targets_j) + R), where
    the regulariser R enters by its gradient alone.
    """

    targets: jax.Array  # [μB, K] float32, probabilities
    weights: jax.Array  # [μB] float32, 0 for a rejected row
    labeled_weights: jax.Array  # [B] float32, of the supervised loss
    scale: jax.Array  # [] float32, multiplies λ_u (ramps)
    regulariser: jax.Array  # [μB, K] float32, its derivative by the logits of the policy's view
    state: Any  # the next state
    diagnostics: dict[str, jax.Array]  # scalars, for the log


class Policy(NamedTuple):
    """A policy: two functions and two static properties."""

    init: Callable[[int, int], Any]  # (num_classes, num_unlabeled) -> state
    assign: Callable[[Any, Inputs], Assignment]  # (state, inputs)
    loss: Callable[[jax.Array, jax.Array], jax.Array]  # per example, from losses.py
    view: str  # 'strong' | 'weak': the view that the loss is taken on
