"""FixMatch's policy: a hard pseudo-label where the model is confident."""

import jax
import jax.numpy as jnp
import ml_collections
import optax

from layermatch_jax.method.policies import parts
from layermatch_jax.method.policies.interface import (
    Assignment,
    Inputs,
    Policy,
    Spec,
    make_assignment,
)

SETTINGS = {"threshold": parts.THRESHOLD}


def create(config: ml_collections.ConfigDict) -> Policy:
    """Rule: ŷ = arg max q, w = 1[max q ≥ τ] (Sohn 2020, eq. 4), q the weak view's probabilities.

    Args:
      config: the whole config; reads policy.threshold, τ in [0, 1].

    Returns:
      A policy without state. Diagnostics: class_threshold [K], all τ.
    """
    threshold = config.policy.threshold

    def init(spec: Spec) -> tuple:
        del spec
        return ()

    def assign(state: tuple, inputs: Inputs) -> Assignment:
        confidence, _, one_hot = parts.hard_labels(jax.nn.softmax(inputs.target_logits["weak"]))
        return make_assignment(
            inputs,
            targets=one_hot,
            weights=confidence >= threshold,
            state=state,
            diagnostics={"class_threshold": jnp.full(one_hot.shape[-1], threshold)},
        )

    return Policy(init, assign, parts.unsupervised(optax.softmax_cross_entropy))
