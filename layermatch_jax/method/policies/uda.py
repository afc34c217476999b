"""UDA: sharpened soft pseudo-labels for images on which the model is confident."""

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

# Training-signal annealing (Xie 2020): α_t, from 0 to 1, at the fraction x of training. It sets the
# threshold above which labeled rows are left out.
SCHEDULES = {
    "linear": lambda x: x,
    "log": lambda x: 1 - jnp.exp(-5 * x),
    "exp": lambda x: jnp.exp(5 * (x - 1)),
}


SETTINGS = {
    "threshold": parts.THRESHOLD._replace(default=0.8),
    "temperature": Setting(0.4, "Temperature of soft pseudo-labels.", above=0),
    "signal_annealing": Setting(
        "none",
        "Training-signal annealing: the schedule by which labeled images that the model already "
        "predicts confidently are left out of the loss.",
        choices=("none", *SCHEDULES),
    ),
}


def create(config: ml_collections.ConfigDict) -> Policy:
    """Rule: ŷ = softmax(logits / T), w = 1[max q ≥ τ] (Xie 2020); T = 0.4, τ = 0.8.

    Training-signal annealing leaves out a labeled row if the probability of its *true class* is
    above η_t = α_t·(1 − 1/K) + 1/K. The supervised loss is the mean over the remaining rows. USB
    never sharpens (it ignores its temperature if it gets probabilities), and its annealing uses the
    largest probability instead of that of the true class.

    Args:
      config: the whole config; reads policy.{threshold, temperature, signal_annealing} and
        train_steps.

    Returns:
      A policy. Its state counts steps. Diagnostics: class_threshold [K]; signal_threshold, η_t
      (1 without annealing).
    """
    settings, train_steps = config.policy, config.train_steps
    temperature = settings.temperature

    def init(spec: Spec) -> dict:
        del spec
        return {"step": jnp.int32(0)}

    def annealed(step: jax.Array, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        """Returns the weights of the labeled rows [B], with mean 1 or all 0, and η_t."""
        if settings.signal_annealing == "none":
            return jnp.ones(inputs.labels.shape, jnp.float32), jnp.float32(1.0)
        num_classes = inputs.labeled_logits["weak"].shape[-1]
        progress = SCHEDULES[settings.signal_annealing](step / train_steps)
        threshold = progress * (1 - 1 / num_classes) + 1 / num_classes
        probabilities = jax.nn.softmax(inputs.labeled_logits["weak"])
        true = jnp.take_along_axis(probabilities, inputs.labels[:, None], axis=1)[:, 0]
        kept = (true <= threshold).astype(jnp.float32)
        return kept * kept.size / jnp.maximum(jnp.sum(kept), 1), threshold

    def assign(state: dict, inputs: Inputs) -> Assignment:
        confidence = jnp.max(jax.nn.softmax(inputs.target_logits["weak"]), axis=-1)
        labeled_weights, signal_threshold = annealed(state["step"], inputs)
        num_classes = inputs.target_logits["weak"].shape[-1]
        return make_assignment(
            inputs,
            targets=jax.nn.softmax(inputs.target_logits["weak"] / temperature),
            weights=confidence >= settings.threshold,
            labeled_weights=labeled_weights,
            state={"step": state["step"] + 1},
            diagnostics={
                "class_threshold": jnp.full(num_classes, settings.threshold),
                "signal_threshold": signal_threshold,
            },
        )

    return Policy(init, assign, parts.unsupervised(optax.softmax_cross_entropy))
