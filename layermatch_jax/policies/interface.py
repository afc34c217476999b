"""What a pseudo-label policy is asked and what it answers: nothing of layers, devices or data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Inputs(NamedTuple):
    """What a policy sees: the global batch, in global row order, without gradient.

    B labelled rows, μB unlabelled ones, K classes; logits are float32.
    """

    weak_logits: jax.Array  # [μB, K], of the target head
    strong_logits: jax.Array  # [μB, K], of the head that features see the loss through
    labeled_logits: jax.Array  # [B, K], of the classifier
    labels: jax.Array  # [B] int32
    indices: jax.Array  # [μB] int32, positions in the unlabelled set
    teacher_logits: jax.Array | None = None  # [μB, K], the EMA model's of the weak view, if needed


class Assignment(NamedTuple):
    """What a policy answers, for the same rows.

    The unsupervised loss is scale · (1/μB · Σ_j weights_j · loss(logits_j, targets_j) + R), where
    the gradient of the regulariser R is the policy's own: `regulariser_gradient`. It is taken once,
    at the logits of the head that features see the loss through, and pulled back through both
    heads; where the two differ and the classifier's gate is open, ∂R/∂φ is that of the former.
    """

    targets: jax.Array  # [μB, K] float32, probabilities
    weights: jax.Array  # [μB] float32, 0 for a rejected row
    labeled_weights: jax.Array  # [B] float32, of the supervised loss
    scale: jax.Array  # [] float32, multiplies λ_u (ramps)
    regulariser: jax.Array  # [] float32, R
    regulariser_gradient: jax.Array  # [μB, K] float32, ∂R by the logits of the policy's view
    state: Any  # the next state
    diagnostics: dict[str, jax.Array]  # [] or [K], for the log


class Policy(NamedTuple):
    """A policy: two functions and three static properties."""

    init: Callable[[int, int], Any]  # (num_classes, num_unlabeled) -> state
    assign: Callable[[Any, Inputs], Assignment]  # (state, inputs)
    loss: Callable[[jax.Array, jax.Array], jax.Array]  # per example, from losses.py
    view: str = "strong"  # 'strong' | 'weak': the view that the loss is taken on
    needs_teacher: bool = False  # whether the EMA model looks at the weak views, too


def assignment(inputs: Inputs, targets: jax.Array, weights: jax.Array, **others) -> Assignment:
    """An Assignment in which what most policies do not use stands at its neutral value.

    Args:
      inputs: what the policy was asked; its shapes are read.
      targets: [μB, K] float32.
      weights: [μB] float32 or bool.
      **others: further fields of Assignment.
    """
    neutral = {
        "labeled_weights": jnp.ones(inputs.labels.shape, jnp.float32),
        "scale": jnp.float32(1.0),
        "regulariser": jnp.float32(0.0),
        "regulariser_gradient": jnp.zeros_like(targets),
        "state": (),
        "diagnostics": {},
    }
    return Assignment(targets=targets, weights=weights.astype(jnp.float32), **(neutral | others))
