"""SoftMatch: every pseudo-label is used; less confident ones have smaller weights."""

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
from layermatch_jax.setting import decay

SETTINGS = {"momentum": decay("the averaged predictions")}


def create(config: ml_collections.ConfigDict) -> Policy:
    """Rule: w = exp(−min(max q̃ − μ_t, 0)² / (2σ_t²/4)), ŷ = arg max q (Chen 2023, eqs. 6-9).

    q̃ = norm(q · (1/K) / p_u) is q aligned to the uniform distribution; only the weight uses it. μ_t
    and σ_t² are moving averages of the mean and the unbiased variance of max q̃; p_u is a moving
    average of the mean prediction. Each step updates all three before it uses them. (USB starts
    p_u at the mean of the first batch and adds 1e-6 to it.)

    Args:
      config: the whole config; reads policy.momentum.

    Returns:
      A policy. Its state holds `mean` (initially 1/K), `variance` (initially 1) and `prediction`
      [K] (initially 1/K). Diagnostics: confidence_mean, μ_t; confidence_deviation, σ_t.
    """
    momentum = config.policy.momentum

    def init(spec: Spec) -> dict:
        return {
            "mean": jnp.float32(1 / spec.num_classes),
            "variance": jnp.float32(1.0),
            "prediction": jnp.full(spec.num_classes, 1 / spec.num_classes, jnp.float32),
        }

    def assign(state: dict, inputs: Inputs) -> Assignment:
        probabilities = jax.nn.softmax(inputs.target_logits["weak"])
        prediction = optax.incremental_update(
            jnp.mean(probabilities, axis=0), state["prediction"], 1 - momentum
        )
        confidence = jnp.max(parts.ratio(probabilities, prediction[None, :]), axis=-1)
        batch_mean = jnp.mean(confidence)
        squares = jnp.sum((confidence - batch_mean) ** 2)
        mean, variance = optax.incremental_update(
            (batch_mean, squares / max(confidence.size - 1, 1)),
            (state["mean"], state["variance"]),
            1 - momentum,
        )
        below = jnp.minimum(confidence - mean, 0.0)
        _, _, one_hot = parts.hard_labels(probabilities)
        return make_assignment(
            inputs,
            targets=one_hot,
            weights=jnp.exp(-(below**2) / jnp.maximum(variance / 2, jnp.finfo(jnp.float32).tiny)),
            state={"mean": mean, "variance": variance, "prediction": prediction},
            diagnostics={
                "confidence_mean": mean,
                "confidence_deviation": jnp.sqrt(variance),
            },
        )

    return Policy(init, assign, parts.unsupervised(optax.softmax_cross_entropy))
