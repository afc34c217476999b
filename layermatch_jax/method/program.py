"""The train program: makes batches and runs one or several train steps in one compiled call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from layermatch_jax.batches import TrainBatch
from layermatch_jax.method import assembly, steps, windows
from layermatch_jax.method.state import TrainState


def train_steps(
    state: TrainState,
    resident: Any,
    chunk: Any,
    *,
    batch: Callable[[Any, Any], TrainBatch],
    method: assembly.Method,
    axis_name: str | None = None,
) -> tuple[TrainState, dict]:
    """Runs the train steps of a chunk. Pure.

    Args:
      state: the same on every device.
      resident: the data that the feed keeps on every device.
      chunk: this device's rows of the input of S steps, arrays [rows, S, ...].
      batch: the feed's function (resident, rows of one step) -> TrainBatch.
      method: the parts of a step.
      axis_name: the device axis to reduce over; None when `chunk` holds global batches.

    Returns:
      The next state and the window of these steps (see windows.py), the same on every device.
    """

    def one_step(state, rows):
        state, step_metrics = steps.train_step(
            state, batch(resident, rows), method=method, axis_name=axis_name
        )
        return state, windows.window_of(step_metrics, state.step)

    by_step = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), chunk)
    if len(jax.tree.leaves(by_step)[0]) == 1:  # no loop around a single step
        return one_step(state, jax.tree.map(lambda x: x[0], by_step))
    state, of_steps = jax.lax.scan(one_step, state, by_step)
    return state, windows.add_up(of_steps)
