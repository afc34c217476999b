"""Losses, one number per example. Reductions are the caller's: who divides by what matters here.

They compute in the dtype of the logits, which the heads give in float32.
"""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Softmax cross-entropy, −Σ_k targets_k · log softmax(logits)_k.

    Args:
      logits: [..., K].
      targets: [..., K], probabilities: one-hot for hard labels.

    Returns:
      [...], in nats.
    """
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def squared_error(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Squared error of probabilities, mean_k (softmax(logits)_k − targets_k)² (Tarvainen 2017).

    Args:
      logits: [..., K].
      targets: [..., K], probabilities.

    Returns:
      [...], dimensionless.
    """
    return jnp.mean((jax.nn.softmax(logits) - targets) ** 2, axis=-1)
