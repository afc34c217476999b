"""The loss that optax does not have, one number per example. Reductions are the caller's.

It computes in the dtype of the logits, which the heads give in float32. The cross-entropy is
`optax.softmax_cross_entropy`.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from layermatch_jax.arrays import Array


def squared_error(
    logits: Float[Array, "*rows K"], targets: Float[Array, "*rows K"]
) -> Float[jax.Array, "*rows"]:
    """Squared error of probabilities, mean_k (softmax(logits)_k − targets_k)² (Tarvainen 2017).

    Targets are probabilities; the error is dimensionless.
    """
    return jnp.mean(optax.squared_error(jax.nn.softmax(logits), targets), axis=-1)
