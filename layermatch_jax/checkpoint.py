"""Orbax checkpoints that do not know how many devices wrote them."""

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization


def open_manager(workdir: epath.Path, kept: int) -> ocp.CheckpointManager:
    """The manager of workdir/checkpoints; its writes go on in the background until `close()`."""
    return ocp.CheckpointManager(
        (workdir / "checkpoints").resolve(),
        options=ocp.CheckpointManagerOptions(max_to_keep=kept, create=True),
    )


def save(manager: ocp.CheckpointManager, step: int, tree) -> None:
    """Saves a tree of arrays as the checkpoint of `step`; the tree may be donated afterwards."""
    manager.save(step, args=ocp.args.StandardSave(serialization.to_state_dict(tree)))


def restore_latest(manager: ocp.CheckpointManager, tree):
    """The newest checkpoint in the form of `tree`, as NumPy arrays on the host, or None.

    Read through a NumPy template to the host: a template of device arrays would tie the checkpoint
    to the devices that wrote it. The caller places it on the devices that are there now.
    """
    step = manager.latest_step()
    if step is None:
        return None
    template = jax.tree.map(np.asarray, serialization.to_state_dict(tree))
    restored = manager.restore(step, args=ocp.args.StandardRestore(template))
    return serialization.from_state_dict(tree, restored)
