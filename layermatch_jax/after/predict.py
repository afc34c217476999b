"""What a trained model says of images: their classes' probabilities, and their features."""

import functools
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from layermatch_jax.after.runs import Run
from layermatch_jax.data import pipeline
from layermatch_jax.data.images import Images
from layermatch_jax.errors import InputError
from layermatch_jax.method import assembly, backprop, linear_head


class Predictions(NamedTuple):
    """Of N images, in their order."""

    features: np.ndarray  # float32 [N, D], what the classifier sees
    probabilities: np.ndarray  # float32 [N, K]


def predict(run: Run, images: Images, ema: bool = True) -> Predictions:
    """Applies a run's model to images, as its evaluation does.

    The model is compiled once for a run, however many images a call has: they go through it in
    batches of `run.config.eval_batch_size`, of which the last is filled up.

    Args:
      run: of `runs.read`.
      images: of the run's stored side (`run.config.dataset.stored_size`), uint8; their labels are
        not read. `data.folder.from_files` makes them of files.
      ema: whether by the averaged parameters, which the results are of, or by the raw ones.

    Returns:
      Predictions, of no rows for no images.

    Raises:
      InputError: the images are of another size or type, or a file cannot be read; names it.
    """
    _check_form(images, run.config.dataset)
    method = assembly.create_method(run.config, run.state.params, run.data.statistics)
    params = run.state.ema_params if ema else run.state.params
    variables = {"params": params["backbone"], "batch_stats": run.state.batch_stats}
    # No rows to begin with: so no images give arrays of the right form, too.
    batches = [[np.zeros((0, n), np.float32) for n in params["classifier"]["kernel"].shape]]
    size, side = run.config.eval_batch_size, run.config.dataset.image_size
    for batch in pipeline.eval_batches(images, size, side):
        normalized = backprop.normalize(batch.images, method)
        answer = _forward(run.state.apply_fn, variables, params["classifier"], normalized)
        batches.append(jax.device_get(answer))
    count = len(images.labels)
    return Predictions(*(np.concatenate(x)[:count] for x in zip(*batches, strict=True)))


def _check_form(images: Images, dataset: ml_collections.ConfigDict) -> None:
    side, none = dataset.stored_size, images.read(np.arange(0))
    if none.dtype != np.uint8 or none.shape[1:] != (side, side, 3):
        raise InputError(
            f"The images are {none.dtype} [N, {', '.join(map(str, none.shape[1:]))}]. The run's"
            f" model was trained on images stored as uint8 (0..255) [N, {side}, {side}, 3], and"
            f" takes such alone (dataset.stored_size={side}). For image files take"
            f" data.folder.from_files(paths, {side}); for an array, bring it to that size with"
            f" data.images.resize(pixels, {side}) first."
        )


@functools.partial(jax.jit, static_argnums=0)
def _forward(apply_fn, variables, classifier, images):
    features = apply_fn(variables, images, train=False)
    return features, jax.nn.softmax(linear_head.linear(classifier, features))
