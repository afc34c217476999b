"""Losses, one number per example. Reductions are the caller's: who divides by what matters here.

They compute in the dtype of the logits, which the heads give in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from layermatch_jax.arrays import Array


def cross_entropy(
    logits: Float[Array, "*rows K"], targets: Float[Array, "*rows K"]
) -> Float[jax.Array, "*rows"]:
    """Softmax cross-entropy, −Σ_k targets_k · log softmax(logits)_k, in nats.

    Targets are probabilities: one-hot for hard labels.
    """
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def squared_error(
    logits: Float[Array, "*rows K"], targets: Float[Array, "*rows K"]
) -> Float[jax.Array, "*rows"]:
    """Squared error of probabilities, mean_k (softmax(logits)_k − targets_k)² (Tarvainen 2017).

    Targets are probabilities; the error is dimensionless.
    """
    return jnp.mean((jax.nn.softmax(logits) - targets) ** 2, axis=-1)
