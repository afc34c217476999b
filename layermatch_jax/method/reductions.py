"""What a step does across devices: rows are gathered and cut again, sums are taken.

`axis_name` names the device axis; None means that the step sees the global batch, and nothing is to
be done.
"""

import jax


def num_shards(axis_name: str | None) -> int:
    """How many devices share the global batch, as seen from inside a step."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def gather_rows(tree, axis_name: str | None):
    """Every device's rows [n, ...] in global order, [n · devices, ...]."""
    if axis_name is None:
        return tree

    def gather(x):  # no rows, as of unlabeled images in supervised training, are refused by XLA
        return jax.lax.all_gather(x, axis_name, tiled=True) if x.size else x

    return jax.tree.map(gather, tree)


def local_rows(tree, axis_name: str | None):
    """The inverse of `gather_rows`: this device's rows of global ones."""
    if axis_name is None:
        return tree
    shards, index = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)

    def cut(x):
        rows = x.shape[0] // shards
        return jax.lax.dynamic_slice_in_dim(x, index * rows, rows)

    return jax.tree.map(cut, tree)


def total(tree, axis_name: str | None):
    """The sum over devices of every leaf."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)
