"""Pseudo-Label: a confident prediction becomes the label of the same view of the image."""

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

SETTINGS = {"threshold": parts.THRESHOLD, "ramp": parts.RAMP}


def create(config: ml_collections.ConfigDict) -> Policy:
    """Rule: ŷ = arg max q, w = 1[max q ≥ τ], the loss on the weak view, ramped up (Lee 2013).

    As in TorchSSL, with a threshold and a linear ramp over the first 40 % of the steps. The paper
    uses every row, and a ramp between two epochs.

    Args:
      config: the whole config; reads policy.{threshold, ramp} and train_steps.

    Returns:
      A policy. Its state counts steps. Diagnostics: class_threshold [K]; ramp in [0, 1].
    """
    threshold, length = config.policy.threshold, config.policy.ramp * config.train_steps

    def init(spec: Spec) -> dict:
        del spec
        return {"step": jnp.int32(0)}

    def assign(state: dict, inputs: Inputs) -> Assignment:
        confidence, _, one_hot = parts.hard_labels(jax.nn.softmax(inputs.target_logits["weak"]))
        scale = parts.ramp(state["step"], length)
        return make_assignment(
            inputs,
            targets=one_hot,
            weights=confidence >= threshold,
            scale=scale,
            state={"step": state["step"] + 1},
            diagnostics={
                "class_threshold": jnp.full(one_hot.shape[-1], threshold),
                "ramp": scale,
            },
        )

    return Policy(init, assign, parts.unsupervised(optax.softmax_cross_entropy, "weak"))
