"""Windows: the metrics of the steps since the last log line, summed on the device."""

import jax
import jax.numpy as jnp
import numpy as np

from layermatch_jax.errors import NonFiniteLossError

NEVER = np.iinfo(np.int32).max


def empty_window(window) -> dict:
    """Returns the window of no steps, with the shapes and dtypes of `window`."""
    return {
        "sums": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), window["sums"]),
        "nonfinite_step": np.array(NEVER, np.int32),
    }


def window_of(metrics: dict, step: int | jax.Array) -> dict:
    """Returns the window of one step.

    Args:
      metrics: {name: float32 [2] or [2, K]}, [sum, weight] pairs; must contain 'loss'.
      step: int32 [], the step's number, 1-based.

    Returns:
      {'sums': the metrics, 'nonfinite_step': int32 []}. The latter is the step if its loss is NaN
      or infinite, else NEVER.
    """
    finite = jnp.isfinite(metrics["loss"][0])
    return {"sums": metrics, "nonfinite_step": jnp.where(finite, NEVER, step)}


def add_up(windows: dict) -> dict:
    """Adds up windows that are stacked along a new first axis."""
    return {
        "sums": jax.tree.map(lambda x: jnp.sum(x, axis=0), windows["sums"]),
        "nonfinite_step": jnp.min(windows["nonfinite_step"]),
    }


@jax.jit
def join(window: dict, later: dict) -> dict:
    """Adds up two windows; `later` holds the later steps."""
    return add_up(jax.tree.map(lambda *x: jnp.stack(x), window, later))


def check_finite(window: dict, state=None) -> None:
    """Raises NonFiniteLossError, naming the step, if a run has diverged.

    Args:
      window: the window to check.
      state: a TrainState to check as well, or None. A step with a finite loss may make parameters
        that are not finite; such a state must not be saved as a checkpoint.
    """
    step = int(window["nonfinite_step"])
    if step != NEVER:
        raise NonFiniteLossError(f"the loss is not finite at step {step}")
    if state is not None and not _all_finite(state):
        raise NonFiniteLossError(f"the update of step {int(state.step)} is not finite")


@jax.jit
def _all_finite(tree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def means(sums: dict) -> dict[str, float | list[float | None] | None]:
    """Maps {name: [sum, weight]} to {name: sum / weight}; None where the weight is 0.

    A metric by class, [2, K], becomes a list of K numbers; None if every weight is 0.
    """

    def mean(total, weight):
        return float(total) / float(weight) if weight > 0 else None

    def by_class(totals, weights):
        return (
            [mean(*p) for p in zip(totals, weights, strict=True)] if np.any(weights > 0) else None
        )

    return {
        name: mean(*pair) if np.ndim(pair) == 1 else by_class(*pair) for name, pair in sums.items()
    }
