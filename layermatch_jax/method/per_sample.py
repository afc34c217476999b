"""State that is kept for every unlabeled sample, replicated and updated alike on every device.

A batch may hold a sample more than once, and a scatter with repeated indices has no defined order.
"""

import jax
import jax.numpy as jnp

from layermatch_jax.arrays import Array


def last_of_each(indices: Array, among: jax.Array | None = None) -> jax.Array:
    """Which rows are the last ones of their sample, in global row order; n² comparisons.

    Args:
      indices: [n] int32, the rows' samples.
      among: [n] bool, the rows that count at all; None = all.

    Returns:
      [n] bool; at most one row of each sample.
    """
    among = jnp.ones(indices.shape, bool) if among is None else among
    row = jnp.arange(indices.shape[0])
    same_and_later = (indices[None, :] == indices[:, None]) & (row[None, :] > row[:, None])
    return among & ~jnp.any(same_and_later & among[None, :], axis=1)


def write(values: jax.Array, indices: Array, rows: jax.Array, writes: jax.Array) -> jax.Array:
    """Puts rows into their samples' places.

    Args:
      values: [N_u, ...].
      indices: [n] int32.
      rows: [n, ...].
      writes: [n] bool of `last_of_each`; the other rows change nothing.

    Returns:
      The new values.
    """
    nowhere = values.shape[0]
    target = jnp.where(writes, indices, nowhere)
    return values.at[target].set(rows.astype(values.dtype), mode="drop")
