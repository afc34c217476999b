"""The array type of signatures.

Shapes are jaxtyping's: `Float[Array, "n K"]`. An axis has the same length wherever a signature or a
record names it; `*rows` is any number of axes, and "" none. Axes are named as in docs/extending.md.
"""

import jax
import numpy as np

Array = jax.Array | np.ndarray  # NumPy's on the host, JAX's inside a compiled program
