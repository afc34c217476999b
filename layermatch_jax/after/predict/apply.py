"""Applies a model to images on all local devices."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr

from layermatch_jax.after import model as model_lib
from layermatch_jax.after.model import Model, Outputs, Predictor
from layermatch_jax.data import reading_ahead
from layermatch_jax.data.augment import crop
from layermatch_jax.data.images import Images
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import parallel


class Summary(NamedTuple):
    """Predictions for n images, in their order."""

    classes: jax.Array  # int32 [n, k], the most probable first
    probabilities: jax.Array  # float32 [n, k], of these classes
    entropy: jax.Array  # float32 [n], of all K probabilities, nats
    features: jax.Array | tuple  # float32 [n, D]; () if not requested


def predict(model: Model, images: Images) -> Outputs:
    """Applies a model to images, as the evaluation of its run does.

    Batches have `model.batch_size` images, rounded up to a multiple of the number of devices, and
    the last batch is padded. So the model is compiled once for any number of images.

    Args:
      model: from `trained.read` or `trained.of_run`.
      images: uint8 images of the model's stored side; their labels are not read. For image files,
        use `folder.from_files`.

    Returns:
      Outputs of NumPy arrays; arrays with 0 rows for no images.

    Raises:
      InputError: the images have another size or type, or a file cannot be read (the message names
        it).
    """
    _check_form(images, model)
    # Begins with 0 rows, so that the arrays have the right shape for no images, too.
    parts = [Outputs(*(np.zeros((0, n), np.float32) for n in _sizes(model)))]
    forward = on_all_devices(_outputs, model)
    size = reading_ahead.batch_size(model.batch_size)

    def read(part: range) -> tuple[np.ndarray, None]:
        return crop.center_crop(images.read(np.array(part)), model.image_size), None

    for _, _, outputs in reading_ahead.in_batches(forward, read, range(len(images.labels)), size):
        parts.append(outputs)
    return Outputs(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def summarize(model: Model, top: int, with_features: bool) -> Callable[[np.ndarray], Summary]:
    """Makes a function from uint8 [n, S, S, 3], n a multiple of the devices, to a Summary."""
    return on_all_devices(functools.partial(_summary, top, with_features), model)


def on_all_devices(function: Callable, model: Model) -> Callable:
    """Turns `function(predictor, variables, images)` into a function of images on all devices."""
    variables = parallel.replicate(model.variables, "jit")
    predictor = model_lib.predictor(model)
    return lambda images: function(predictor, variables, parallel.place_batch(images, "jit"))


# As a static argument, a predictor is compared by value, so equal models are compiled once.
@functools.partial(jax.jit, static_argnums=0)
def _outputs(predictor: Predictor, variables, images) -> Outputs:
    return predictor(variables, images)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _summary(top: int, with_features: bool, predictor: Predictor, variables, images) -> Summary:
    features, probabilities = predictor(variables, images)
    highest, classes = jax.lax.top_k(probabilities, top)
    entropy = jnp.sum(entr(probabilities), axis=-1)
    return Summary(classes, highest, entropy, features if with_features else ())


def _sizes(model: Model) -> tuple[int, int]:
    """Returns (D, K)."""
    return model.variables["classifier"]["kernel"].shape


def _check_form(images: Images, model: Model) -> None:
    side, none = model.stored_size, images.read(np.arange(0))
    if none.dtype != np.uint8 or none.shape[1:] != (side, side, 3):
        raise InputError(
            f"The images are {none.dtype} [N, {', '.join(map(str, none.shape[1:]))}], but the model"
            f" needs uint8 (0..255) [N, {side}, {side}, 3], as in its training"
            f" (dataset.stored_size={side}). For image files, use"
            f" data.sources.folder.from_files(paths, {side}); resize an array with"
            f" data.images.resize(pixels, {side})."
        )
