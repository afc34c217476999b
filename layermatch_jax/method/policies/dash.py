"""Dash: a threshold on the loss of a pseudo-label, which falls over training."""

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
from layermatch_jax.setting import Setting

# C, γ and the smallest bound in nats (Xu 2021).
C, GAMMA, FLOOR = 1.0001, 1.27, 0.05


SETTINGS = {
    "temperature": Setting(0.5, "Temperature of soft pseudo-labels.", above=0),
    "warm_up": Setting(
        lambda train_steps: min(1.0, max(2048 / 2**20, 20 / train_steps)),
        "Length of the warm-up, in which every pseudo-label is used, as a share of train_steps. "
        "Automatic: 2048 / 2^20, but at least 20 steps.",
        low=0,
        high=1,
        kind=float,
    ),
    "period": Setting(
        10240 / 2**20,
        "Length of a period as a share of train_steps; the bound falls after each period.",
        low=0,
        high=1,
    ),
}


def create(config: ml_collections.ConfigDict) -> Policy:
    """Rule: w = 1[CE(weak logits, ŷ) ≤ ρ_t], ρ_t = max(C·γ^−t·ρ̂, 0.05) (Xu 2021, Algorithm 1).

    ρ̂ is the mean labeled loss of the warm-up, in which every pseudo-label is used; t counts the
    periods after the warm-up. ŷ = softmax(logits / 0.5) until ρ_t reaches 0.05, then arg max. In
    the paper's first stage and in USB's warm-up, only labeled images are used; USB sets ρ̂ to the
    loss on the test set.

    Args:
      config: the whole config; reads policy.{temperature, warm_up, period}, the latter two as
        fractions of train_steps.

    Returns:
      A policy. Its state holds the step and the sum of the losses of the warm-up. Diagnostics:
      loss_threshold, ρ_t in nats (infinite in the warm-up; the log then has null); class_threshold
      [K], exp(−ρ_t), the confidence at which a hard pseudo-label has the loss ρ_t.
    """
    settings, train_steps = config.policy, config.train_steps
    temperature = settings.temperature
    warm_up = max(1, round(settings.warm_up * train_steps))
    period = max(1, round(settings.period * train_steps))

    def init(spec: Spec) -> dict:
        del spec
        return {"step": jnp.int32(0), "loss_sum": jnp.float32(0.0)}

    def assign(state: dict, inputs: Inputs) -> Assignment:
        step, weak_logits = state["step"], inputs.target_logits["weak"]
        num_classes = weak_logits.shape[-1]
        warming = step < warm_up
        labels = jax.nn.one_hot(inputs.labels, num_classes)
        loss = jnp.mean(optax.softmax_cross_entropy(inputs.labeled_logits["weak"], labels))
        loss_sum = state["loss_sum"] + jnp.where(warming, loss, 0.0)

        t = jnp.maximum(step - warm_up, 0) // period
        bound = C * GAMMA ** -t.astype(jnp.float32) * loss_sum / warm_up
        hard = ~warming & (bound <= FLOOR)
        bound = jnp.where(warming, jnp.inf, jnp.maximum(bound, FLOOR))

        _, _, one_hot = parts.hard_labels(weak_logits)
        targets = jnp.where(hard, one_hot, jax.nn.softmax(weak_logits / temperature))
        return make_assignment(
            inputs,
            targets=targets,
            weights=optax.softmax_cross_entropy(weak_logits, targets) <= bound,
            state={"step": step + 1, "loss_sum": loss_sum},
            diagnostics={
                "loss_threshold": bound,
                "class_threshold": jnp.full(num_classes, jnp.exp(-bound)),
            },
        )

    return Policy(init, assign, parts.unsupervised(optax.softmax_cross_entropy))
