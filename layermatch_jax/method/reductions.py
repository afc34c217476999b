"""Communication between devices in a step: gathering rows, selecting local rows, sums.

`axis_name` names the device axis. With None the step sees the global batch, and these functions
return their input.
"""

import jax


def num_shards(axis_name: str | None) -> int:
    """Returns the number of devices that share the global batch; called inside a step."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def gather_rows(tree, axis_name: str | None):
    """Gathers the rows [n, ...] of all devices in global order, [n · devices, ...]."""
    if axis_name is None:
        return tree

    def gather(x):  # XLA rejects empty arrays (supervised training has no unlabeled rows)
        return jax.lax.all_gather(x, axis_name, tiled=True) if x.size else x

    return jax.tree.map(gather, tree)


def local_rows(tree, axis_name: str | None):
    """Selects this device's rows of global ones; the inverse of `gather_rows`."""
    if axis_name is None:
        return tree
    shards, index = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)

    def cut(x):
        rows = x.shape[0] // shards
        return jax.lax.dynamic_slice_in_dim(x, index * rows, rows)

    return jax.tree.map(cut, tree)


def total(tree, axis_name: str | None):
    """Sums every leaf over the devices."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)
