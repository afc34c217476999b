"""The linear classifier on top of the backbone's features."""

import jax
import jax.numpy as jnp


def linear(classifier, features: jax.Array) -> jax.Array:
    """The linear classifier g_φ(z) = z·W + b, in float32 at full precision.

    Args:
      classifier: {'kernel': [D, K], 'bias': [K]} float32.
      features: [n, D] float32.

    Returns:
      Logits [n, K] float32.
    """
    kernel, bias = classifier["kernel"], classifier["bias"]
    return jnp.dot(features, kernel, precision=jax.lax.Precision.HIGHEST) + bias[None, :]
