"""State for every unlabeled sample; every device holds a copy and updates it in the same way.

A batch may hold a sample more than once, and the order of a scatter with repeated indices is
undefined. So only the last row of each sample is written.
"""

import jax
import jax.numpy as jnp

from layermatch_jax.arrays import Array


def last_of_each(indices: Array, among: jax.Array | None = None) -> jax.Array:
    """Marks the last row of each sample, in global row order; n² comparisons.

    Args:
      indices: [n] int32, the sample of each row.
      among: [n] bool, the rows to look at; None = all.

    Returns:
      [n] bool; at most one row of each sample.
    """
    among = jnp.ones(indices.shape, bool) if among is None else among
    row = jnp.arange(indices.shape[0])
    same_and_later = (indices[None, :] == indices[:, None]) & (row[None, :] > row[:, None])
    return among & ~jnp.any(same_and_later & among[None, :], axis=1)


def write(values: jax.Array, indices: Array, rows: jax.Array, writes: jax.Array) -> jax.Array:
    """Writes rows to the places of their samples.

    Args:
      values: [N_u, ...], the state of all samples.
      indices: [n] int32, the sample of each row.
      rows: [n, ...].
      writes: [n] bool from `last_of_each`; rows with False are not written.

    Returns:
      The new values.
    """
    nowhere = values.shape[0]
    target = jnp.where(writes, indices, nowhere)
    return values.at[target].set(rows.astype(values.dtype), mode="drop")
