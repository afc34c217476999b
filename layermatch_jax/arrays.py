"""The array type for signatures.

Shapes are written with jaxtyping: `Float[Array, "n K"]`. All axes with the same name in a signature
or a record have the same length; `*rows` is any number of axes, and "" is none. docs/extending.md
lists the names.
"""

import jax
import numpy as np

Array = jax.Array | np.ndarray  # NumPy's on the host, JAX's inside a compiled program
