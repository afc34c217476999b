"""Settings and functions that several policies share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from layermatch_jax.arrays import Array
from layermatch_jax.method.policies.interface import (
    Assignment,
    Inputs,
    Outputs,
    Spec,
    make_assignment,
)
from layermatch_jax.setting import Setting

# Settings that several policies read.
THRESHOLD = Setting(0.95, "Confidence that a pseudo-label needs to be used (τ).", low=0, high=1)
RAMP = Setting(0.4, "Share of train_steps over which the weight λ_u rises from 0.", low=0, high=1)

# Smallest denominator: over a million steps, an average of probabilities may fall to 0.
_SMALL = 1e-30


def hard_labels(
    probabilities: Float[Array, "n K"],
) -> tuple[Float[jax.Array, " n"], Int[jax.Array, " n"], Float[jax.Array, "n K"]]:
    """Returns max q (the confidence), arg max q (the first in a tie) and the one-hot class."""
    classes = jnp.argmax(probabilities, axis=-1)
    one_hot = jax.nn.one_hot(classes, probabilities.shape[-1])
    return jnp.max(probabilities, axis=-1), classes, one_hot


def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """Divides, then scales the quotient to sum 1 over the last axis. [..., K] float32."""
    quotient = numerator / jnp.maximum(denominator, _SMALL)
    return quotient / jnp.sum(quotient, axis=-1, keepdims=True)


def ramp(step: jax.Array, length: float) -> jax.Array:
    """Computes min(step / length, 1); 1 from the start if length is 0."""
    return jnp.minimum(step / length, 1.0) if length > 0 else jnp.float32(1.0)


def ramped(
    length: float, targets: Callable[[Inputs], jax.Array]
) -> tuple[Callable[[Spec], dict], Callable[[dict, Inputs], Assignment]]:
    """Makes `init` and `assign` of a policy that uses every image and raises λ_u from 0.

    Args:
      length: length of the ramp in steps.
      targets: inputs -> [μB, K] float32.

    Returns:
      (init, assign) for `Policy`. The state counts steps; diagnostics: ramp in [0, 1].
    """

    def init(spec: Spec) -> dict:
        del spec
        return {"step": jnp.int32(0)}

    def assign(state: dict, inputs: Inputs) -> Assignment:
        scale = ramp(state["step"], length)
        return make_assignment(
            inputs,
            targets=targets(inputs),
            weights=jnp.ones(inputs.unlabeled_indices.shape),
            scale=scale,
            state={"step": state["step"] + 1},
            diagnostics={"ramp": scale},
        )

    return init, assign


def unsupervised(
    loss: Callable[[jax.Array, jax.Array], jax.Array], view: str = "strong"
) -> Callable[[Outputs, Assignment], dict[str, jax.Array]]:
    """Makes the loss of most policies: (1/μB) Σ_j weights_j · loss(logits_j, targets_j).

    Args:
      loss: (logits [n, K], targets [n, K]) -> [n], from optax or losses.py.
      view: the unlabeled view whose logits the loss takes.

    Returns:
      A function for `Policy.loss` with one term, "unsupervised"; it is 0 if there are no rows.
    """

    def terms(outputs: Outputs, assignment: Assignment) -> dict[str, jax.Array]:
        weighted = assignment.weights * loss(outputs.logits[view], assignment.targets)
        return {"unsupervised": jnp.sum(weighted) / max(assignment.weights.size, 1)}

    return terms
