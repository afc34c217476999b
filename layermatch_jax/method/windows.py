"""Windows: the metrics of the steps since the last log line, summed on the device."""

import jax
import jax.numpy as jnp
import numpy as np

from layermatch_jax.errors import NonFiniteLossError

NEVER = np.iinfo(np.int32).max


def empty_window(window) -> dict:
    """A window without steps, of the form of another one (or its shapes)."""
    return {
        "sums": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), window["sums"]),
        "nonfinite_step": np.array(NEVER, np.int32),
    }


def window_of(metrics: dict, step: int | jax.Array) -> dict:
    """The window of one step.

    Args:
      metrics: {name: float32 [2] or [2, K]} of [sum, weight] pairs, 'loss' among them.
      step: int32 [], the step's number, 1-based.

    Returns:
      {'sums': the metrics, 'nonfinite_step': int32 [], the step if its loss is NaN or infinite,
      else NEVER}.
    """
    finite = jnp.isfinite(metrics["loss"][0])
    return {"sums": metrics, "nonfinite_step": jnp.where(finite, NEVER, step)}


def add_up(windows: dict) -> dict:
    """The window of all steps, of windows that are stacked along a new first axis."""
    return {
        "sums": jax.tree.map(lambda x: jnp.sum(x, axis=0), windows["sums"]),
        "nonfinite_step": jnp.min(windows["nonfinite_step"]),
    }


@jax.jit
def join(window: dict, later: dict) -> dict:
    """The window of the steps of both."""
    return add_up(jax.tree.map(lambda *x: jnp.stack(x), window, later))


def check_finite(window: dict, state=None) -> None:
    """Raises NonFiniteLossError, naming the step, if a run has diverged.

    Args:
      window: one of its losses may be NaN or infinite.
      state: a TrainState, if that is to be checked as well: the step whose loss is the last finite
        one may have spoilt it, and then it is no good checkpoint.
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
    """{name: [sum, weight]} -> {name: sum / weight}, None where nothing was counted.

    What is counted by class, [2, K], becomes a list of K, or None if it is None for every class.
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
