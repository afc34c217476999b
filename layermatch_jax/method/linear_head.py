"""The linear classifier on top of the backbone's features."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Float

from layermatch_jax.arrays import Array


def linear(
    classifier: Mapping[str, Array], features: Float[Array, "n D"]
) -> Float[jax.Array, "n K"]:
    """The linear classifier g_φ(z) = z·W + b: the logits, in float32 at full precision.

    Args:
      classifier: {'kernel': [D, K], 'bias': [K]} float32.
      features: float32.
    """
    kernel, bias = classifier["kernel"], classifier["bias"]
    return jnp.dot(features, kernel, precision=jax.lax.Precision.HIGHEST) + bias[None, :]
