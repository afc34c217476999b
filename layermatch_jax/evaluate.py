"""Accuracy and loss on a whole split, every image counted once."""

from collections.abc import Callable

import jax
import ml_collections

from layermatch_jax.data import pipeline
from layermatch_jax.data.images import Images
from layermatch_jax.method import windows
from layermatch_jax.method.state import TrainState
from layermatch_jax.runtime import parallel


def evaluate(
    eval_step: Callable, state: TrainState, images: Images, config: ml_collections.ConfigDict
) -> dict[str, float]:
    """Evaluates the raw and the EMA parameters.

    Args:
      eval_step: steps.eval_step, compiled by `parallel.compile_step`.
      state: on the devices.
      images: the split.
      config: reads eval_batch_size, dataset.image_size and parallelism.

    Returns:
      {'accuracy', 'loss', 'accuracy_ema', 'loss_ema'}; accuracies in [0, 1], losses in nats.
    """
    sums = None
    size = min(config.eval_batch_size, _rounded_up(len(images.labels), jax.device_count()))
    rows = parallel.host_rows(size)
    for batch in pipeline.eval_batches(images, size, config.dataset.image_size, rows):
        metrics = eval_step(state, parallel.place_batch(batch, config.parallelism))
        sums = metrics if sums is None else jax.tree.map(lambda a, b: a + b, sums, metrics)
    # Of images there are some, and nothing is by class: all are numbers.
    return windows.means(jax.device_get(sums))  # pyright: ignore[reportReturnType]


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
