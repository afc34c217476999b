"""What a trained model says of images: their classes' probabilities, and their features."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from layermatch_jax import layerwise, steps
from layermatch_jax.data import pipeline
from layermatch_jax.data.images import Images
from layermatch_jax.runs import Run


class Predictions(NamedTuple):
    """Of N images, in their order."""

    features: np.ndarray  # float32 [N, D], what the classifier sees
    probabilities: np.ndarray  # float32 [N, K]


def predict(run: Run, images: Images, ema: bool = True) -> Predictions:
    """Applies a run's model to images, as its evaluation does.

    Args:
      run: of `runs.read`.
      images: of the run's stored side (`run.config.dataset.stored_size`); their labels are not
        read. `data.folder.from_files` makes them of files.
      ema: whether by the averaged parameters, which the results are of, or by the raw ones.
    """
    method = steps.create_method(run.config, run.state.params, run.data.statistics)
    params = run.state.ema_params if ema else run.state.params
    variables = {"params": params["backbone"], "batch_stats": run.state.batch_stats}
    count = len(images.labels)
    size = min(run.config.eval_batch_size, max(count, 1))
    batches = []
    for batch in pipeline.eval_batches(images, size, run.config.dataset.image_size):
        normalized = steps.normalize(batch.images, method)
        answer = _forward(run.state.apply_fn, variables, params["classifier"], normalized)
        batches.append(jax.device_get(answer))
    return Predictions(*(np.concatenate(x)[:count] for x in zip(*batches, strict=True)))


@functools.partial(jax.jit, static_argnums=0)
def _forward(apply_fn, variables, classifier, images):
    features = apply_fn(variables, images, train=False)
    return features, jax.nn.softmax(layerwise.linear(classifier, features))
