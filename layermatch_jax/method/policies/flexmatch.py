"""FlexMatch: classes that are learned later get lower thresholds."""

import jax
import jax.numpy as jnp
import ml_collections
import optax

from layermatch_jax.method import per_sample
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
    """Rule: w = 1[max q ≥ τ·M(β_c)], M(β) = β / (2 − β), c = arg max q (Zhang 2021, eqs. 5-11).

    β_c = σ_c / max(max σ, number of samples never selected). σ_c counts the samples for which the
    last confident (≥ τ) prediction was c. A step uses the counts from before it. Until the first
    sample is selected, the thresholds are 0 and every pseudo-label is used.

    Args:
      config: the whole config; reads policy.threshold, τ.

    Returns:
      A policy. Its state holds the last confident class of each sample (`classes` int32 [N_u], −1 =
      never selected) and the number of samples by class (`counts` int32 [K + 1]; the last one
      counts those never selected). The state keeps the counts, although they follow from the
      classes, so that a step need not read all samples. Diagnostics: class_threshold [K];
      never_selected, the share of the samples that were never selected.
    """
    threshold = config.policy.threshold

    def init(spec: Spec) -> dict:
        return {
            "classes": jnp.full(spec.num_unlabeled, -1, jnp.int32),
            "counts": jnp.zeros(spec.num_classes + 1, jnp.int32).at[-1].set(spec.num_unlabeled),
        }

    def assign(state: dict, inputs: Inputs) -> Assignment:
        probabilities = jax.nn.softmax(inputs.target_logits["weak"])
        confidence, classes, one_hot = parts.hard_labels(probabilities)
        selected, never = state["counts"][:-1], state["counts"][-1]
        beta = selected / jnp.maximum(jnp.max(selected), never)
        thresholds = threshold * beta / (2 - beta)

        # Samples that are confident in this step count from the next step on.
        indices = inputs.unlabeled_indices
        writes = per_sample.last_of_each(indices, confidence >= threshold)
        before = state["classes"][indices]  # −1 also indexes `never`, the last of the counts
        moved = writes.astype(jnp.int32)
        return make_assignment(
            inputs,
            targets=one_hot,
            weights=confidence >= thresholds[classes],
            state={
                "classes": per_sample.write(state["classes"], indices, classes, writes),
                "counts": state["counts"].at[before].add(-moved).at[classes].add(moved),
            },
            diagnostics={
                "class_threshold": thresholds,
                "never_selected": never / state["classes"].size,
            },
        )

    return Policy(init, assign, parts.unsupervised(optax.softmax_cross_entropy))
