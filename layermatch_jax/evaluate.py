"""The scores of a state: accuracy, loss, and the numbers of each class."""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from layermatch_jax.data import pipeline
from layermatch_jax.data.images import Images
from layermatch_jax.data.splits import Partition
from layermatch_jax.frozen import cross_validation
from layermatch_jax.method import windows
from layermatch_jax.method.state import TrainState
from layermatch_jax.runtime import parallel


def is_due(config: ml_collections.ConfigDict, step: int) -> bool:
    """Tells whether a run evaluates after `step` steps; cross-validation only at both ends."""
    last = step == config.train_steps
    if config.dataset.evaluate_on == "none":
        return False
    if step == 0 or last or config.dataset.evaluate_on == "cross_validation":
        return last or (step == 0 and bool(config.model.pretrained))
    return step % config.eval_every == 0


def scores(
    eval_step: Callable,
    state: TrainState,
    statistics: tuple,
    partition: Partition,
    config: ml_collections.ConfigDict,
) -> dict[str, Any]:
    """Evaluates as config.dataset.evaluate_on says; not for 'none'.

    Args:
      eval_step: steps.eval_step, compiled by `parallel.compile_step`.
      state: on the devices.
      statistics: (means, deviations) of the channels, for normalization.
      partition: the images of the run.
      config: the whole config, resolved.

    Returns:
      {name: value} from `evaluate` or `cross_validation.evaluate`.
    """
    if config.dataset.evaluate_on == "cross_validation":
        found = cross_validation.evaluate(state, statistics, partition, config)
        return found | class_scores(found.pop("confusion"))
    return evaluate(eval_step, state, partition.evaluation, config)


def evaluate(
    eval_step: Callable, state: TrainState, images: Images, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    """Evaluates the raw and the EMA parameters on a whole split, every image counted once.

    Args:
      eval_step: steps.eval_step, compiled by `parallel.compile_step`.
      state: on the devices.
      images: the split.
      config: reads eval_batch_size, dataset.image_size and parallelism.

    Returns:
      {'accuracy', 'loss', 'accuracy_ema', 'loss_ema'}; accuracies in [0, 1], losses in nats; with
      the numbers of each class from `class_scores`, of the EMA parameters.
    """
    sums = None
    size = min(config.eval_batch_size, _rounded_up(len(images.labels), jax.device_count()))
    rows = parallel.host_rows(size)
    for batch in pipeline.eval_batches(images, size, config.dataset.image_size, rows):
        metrics = eval_step(state, parallel.place_batch(batch, config.parallelism))
        sums = metrics if sums is None else jax.tree.map(lambda a, b: a + b, sums, metrics)
    # Of images there are some: `sums` is a dictionary.
    sums = dict(jax.device_get(sums))  # pyright: ignore[reportCallIssue, reportArgumentType]
    confusion = sums.pop("confusion_ema")
    return windows.means(sums) | class_scores(confusion)


def class_scores(confusion: np.ndarray) -> dict[str, Any]:
    """Computes the scores of each class, and the macro-averaged F1.

    Args:
      confusion: counts [K, K]; rows are true classes, columns predicted ones.

    Returns:
      {'class_precision_ema', 'class_recall_ema': [K] floats in [0, 1], NaN where the class was
      never predicted or has no image; 'macro_f1_ema': mean of F1 = 2PR / (P + R) over the classes
      with images, 0 for one that was never predicted rightly; NaN without images}.
    """
    right, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        precision, recall = right / predicted, right / true
        f1 = 2 * right / (true + predicted)
    return {
        "class_precision_ema": precision.tolist(),
        "class_recall_ema": recall.tolist(),
        "macro_f1_ema": float(f1[true > 0].mean()) if true.any() else float("nan"),
    }


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
