"""The loss that optax does not have, one number per example. Reductions are the caller's.

It computes in the dtype of the logits, which the heads give in float32. The cross-entropy is
`optax.softmax_cross_entropy`.
"""

import jax
import jax.numpy as jnp
import optax


def squared_error(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Squared error of probabilities, mean_k (softmax(logits)_k − targets_k)² (Tarvainen 2017).

    Args:
      logits: [..., K].
      targets: [..., K], probabilities.

    Returns:
      [...], dimensionless.
    """
    return jnp.mean(optax.squared_error(jax.nn.softmax(logits), targets), axis=-1)
