"""The one loss that optax does not have. It returns a number per example; the caller reduces them.

The loss is computed in the dtype of the logits; the heads return float32. For the cross-entropy,
use `optax.softmax_cross_entropy`.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from layermatch_jax.arrays import Array


def squared_error(
    logits: Float[Array, "*rows K"], targets: Float[Array, "*rows K"]
) -> Float[jax.Array, "*rows"]:
    """Computes the squared error of probabilities, mean_k (softmax(logits)_k − targets_k)².

    Targets are probabilities; the error is dimensionless. Source: Tarvainen 2017.
    """
    return jnp.mean(optax.squared_error(jax.nn.softmax(logits), targets), axis=-1)
