"""FreeMatch: thresholds that follow the model's confidence, and a class-fairness loss."""

import jax
import jax.numpy as jnp
import ml_collections
import optax

from layermatch_jax.method.policies import parts
from layermatch_jax.method.policies.interface import (
    Assignment,
    Inputs,
    Outputs,
    Policy,
    Spec,
    make_assignment,
)
from layermatch_jax.setting import Setting, decay


def fairness(strong_logits: jax.Array, accepted: jax.Array, expected: jax.Array) -> jax.Array:
    """Computes Σ_c A_c · log B_c with B = norm(p̄ / h̄) (Zhang 2023, eqs. 10-12).

    p̄ is the mean prediction on the accepted strong rows, h̄ the histogram of their predicted
    classes. A class with h̄ = 0 is left out of B and of the sum. (In USB's code such a class adds a
    constant, which has no gradient.)

    Args:
      strong_logits: [μB, K].
      accepted: [μB], 0 or 1.
      expected: A [K], sums to 1.

    Returns:
      [], 0 if no row is accepted.
    """
    probabilities = jax.nn.softmax(strong_logits)
    # Sums instead of means: the number of rows cancels in the ratio.
    _, _, one_hot = parts.hard_labels(probabilities)
    total = jnp.sum(accepted[:, None] * probabilities, axis=0)
    counts = jnp.sum(accepted[:, None] * one_hot, axis=0)
    present = counts > 0
    quotient = jnp.where(present, total / jnp.where(present, counts, 1.0), 0.0)
    # log(1) for absent classes: with log(0) the gradient would be 0 · inf = NaN.
    share = quotient / jnp.where(jnp.any(present), jnp.sum(quotient), 1.0)
    return jnp.sum(jnp.where(present, expected * jnp.log(jnp.where(present, share, 1.0)), 0.0))


SETTINGS = {
    "momentum": decay("the averaged predictions"),
    "fairness_weight": Setting(
        0.001, "Weight of the fairness term (w_f). The paper takes 0.01 for very few labels.", low=0
    ),
}


def create(config: ml_collections.ConfigDict) -> Policy:
    """Rule: w = 1[max q ≥ τ_t · p̃_c / max p̃], c = arg max q (Zhang 2023, eqs. 5-8).

    τ_t, p̃ and h̃ are moving averages of the mean of max q, of the mean of q and of the histogram of
    arg max q; each step updates them before it uses them. The loss has a second term,
    w_f · `fairness` with A = norm(p̃ / h̃).

    Args:
      config: the whole config; reads policy.{momentum, fairness_weight}.

    Returns:
      A policy. Its state holds `threshold` [], `prediction` [K] and `histogram` [K], all initially
      1/K. Diagnostics: class_threshold [K]; global_threshold, τ_t.
    """
    momentum = config.policy.momentum

    def init(spec: Spec) -> dict:
        return {
            "threshold": jnp.float32(1 / spec.num_classes),
            "prediction": jnp.full(spec.num_classes, 1 / spec.num_classes, jnp.float32),
            "histogram": jnp.full(spec.num_classes, 1 / spec.num_classes, jnp.float32),
        }

    def assign(state: dict, inputs: Inputs) -> Assignment:
        probabilities = jax.nn.softmax(inputs.target_logits["weak"])
        confidence, classes, one_hot = parts.hard_labels(probabilities)
        batch = {
            "threshold": jnp.mean(confidence),
            "prediction": jnp.mean(probabilities, axis=0),
            "histogram": jnp.mean(one_hot, axis=0),
        }
        state = optax.incremental_update(batch, state, 1 - momentum)
        thresholds = state["threshold"] * state["prediction"] / jnp.max(state["prediction"])
        weights = (confidence >= thresholds[classes]).astype(jnp.float32)

        return make_assignment(
            inputs,
            targets=one_hot,
            weights=weights,
            extra={
                "accepted": weights,
                "expected": parts.ratio(state["prediction"], state["histogram"]),
            },
            state=state,
            diagnostics={
                "class_threshold": thresholds,
                "global_threshold": state["threshold"],
            },
        )

    unsupervised = parts.unsupervised(optax.softmax_cross_entropy)

    def loss(outputs: Outputs, assignment: Assignment) -> dict[str, jax.Array]:
        regularizer = fairness(outputs.logits["strong"], **assignment.extra)
        weight = config.policy.fairness_weight
        return unsupervised(outputs, assignment) | {"fairness": weight * regularizer}

    return Policy(init, assign, loss)
