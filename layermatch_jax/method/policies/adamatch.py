"""AdaMatch: predictions aligned to those of labeled images, and a relative threshold."""

import functools

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
from layermatch_jax.setting import Setting, decay

SETTINGS = {
    "relative_threshold": Setting(
        0.9, "Threshold relative to the mean confidence of the labeled images.", low=0
    ),
    "momentum": decay("the averaged predictions"),
}


def create(config: ml_collections.ConfigDict) -> Policy:
    """Rule: q̃ = norm(q · p_l / p_u), ŷ = arg max q̃, w = 1[max q̃ ≥ 0.9 · mean max p].

    p are the probabilities of the labeled rows; p_l and p_u are moving averages of the mean
    prediction on labeled and on unlabeled rows (Berthelot 2021, "distribution alignment" and
    "relative confidence threshold", without logit interpolation and without a second labeled view,
    as in the published semi-supervised tables). The paper uses the means of the current batch; USB
    adds 1e-6 to the averages and starts p_u at the mean of the first batch.

    Args:
      config: the whole config; reads policy.{relative_threshold, momentum}.

    Returns:
      A policy. Its state holds the two averages [K], initially 1/K; each step updates them before
      it uses them. Diagnostics: class_threshold [K], the threshold of this step.
    """
    momentum = config.policy.momentum

    def init(spec: Spec) -> dict:
        uniform = functools.partial(jnp.full, spec.num_classes, 1 / spec.num_classes, jnp.float32)
        return {"labeled": uniform(), "unlabeled": uniform()}  # donated: one buffer each

    def assign(state: dict, inputs: Inputs) -> Assignment:
        labeled = jax.nn.softmax(inputs.labeled_logits["weak"])
        unlabeled = jax.nn.softmax(inputs.target_logits["weak"])
        mean = {"labeled": jnp.mean(labeled, axis=0), "unlabeled": jnp.mean(unlabeled, axis=0)}
        state = optax.incremental_update(mean, state, 1 - momentum)

        aligned = parts.ratio(unlabeled * state["labeled"][None, :], state["unlabeled"][None, :])
        threshold = config.policy.relative_threshold * jnp.mean(jnp.max(labeled, axis=-1))
        confidence, _, one_hot = parts.hard_labels(aligned)
        return make_assignment(
            inputs,
            targets=one_hot,
            weights=confidence >= threshold,
            state=state,
            diagnostics={"class_threshold": jnp.full(one_hot.shape[-1], threshold)},
        )

    return Policy(init, assign, parts.unsupervised(optax.softmax_cross_entropy))
