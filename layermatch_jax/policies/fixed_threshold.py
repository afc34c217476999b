"""FixMatch's policy: a hard pseudo-label where the model is confident."""

import jax
import jax.numpy as jnp
import ml_collections

from layermatch_jax import losses
from layermatch_jax.policies.interface import Assignment, Inputs, Policy


def create(config: ml_collections.ConfigDict) -> Policy:
    """ŷ = arg max q, w = 1[max q ≥ τ] (Sohn 2020, eq. 4), q the weak view's probabilities.

    Args:
      config: reads `threshold`, τ in [0, 1].

    Returns:
      A policy without state. Diagnostics: none of its own.
    """

    def init(num_classes: int, num_unlabeled: int) -> tuple:
        del num_classes, num_unlabeled
        return ()

    def assign(state: tuple, inputs: Inputs) -> Assignment:
        probabilities = jax.nn.softmax(inputs.weak_logits)
        num_classes = probabilities.shape[-1]
        return Assignment(
            targets=jax.nn.one_hot(jnp.argmax(probabilities, axis=-1), num_classes),
            weights=(jnp.max(probabilities, axis=-1) >= config.threshold).astype(jnp.float32),
            labeled_weights=jnp.ones(inputs.labels.shape, jnp.float32),
            scale=jnp.float32(1.0),
            regulariser=jnp.zeros_like(inputs.weak_logits),
            state=state,
            diagnostics={},
        )

    return Policy(init, assign, losses.cross_entropy, view="strong")
