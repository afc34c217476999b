"""The linear classifier on top of the backbone's features."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Float

from layermatch_jax.arrays import Array


def linear(
    classifier: Mapping[str, Array], features: Float[Array, "n D"]
) -> Float[jax.Array, "n K"]:
    """Computes the logits of the linear classifier, g_φ(z) = z·W + b, at full float32 precision.

    Args:
      classifier: {'kernel': [D, K], 'bias': [K]} float32.
      features: float32.
    """
    kernel, bias = classifier["kernel"], classifier["bias"]
    return jnp.dot(features, kernel, precision=jax.lax.Precision.HIGHEST) + bias[None, :]
