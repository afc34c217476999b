"""Features of images by a backbone with fixed weights."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from layermatch_jax.data import reading_ahead
from layermatch_jax.data.augment import crop
from layermatch_jax.data.images import Images
from layermatch_jax.method import backprop
from layermatch_jax.method.state import TrainState
from layermatch_jax.runtime import parallel


def of_images(
    state: TrainState, statistics: tuple, images: Images, config: ml_collections.ConfigDict
) -> np.ndarray:
    """Computes the features of the center crops of images, as an evaluation does.

    Each process computes alone, with all of its devices.

    Args:
      state: its averaged (EMA) backbone and BatchNorm's running statistics are used.
      statistics: (means, deviations) of the channels, for normalization.
      images: N images; their labels are not read.
      config: reads eval_batch_size and dataset.image_size.

    Returns:
      float32 [N, D].

    Raises:
      InputError: an image cannot be read; the message names its file.
    """
    variables = parallel.replicate(
        jax.device_get({"params": state.ema_params["backbone"], "batch_stats": state.batch_stats}),
        "pmap",  # the copies of this process
    )
    mean, std = map(tuple, statistics)

    def forward(pixels: np.ndarray) -> jax.Array:
        rows = jax.device_put(pixels, parallel.by_rows("pmap"))
        return _features(state.apply_fn, mean, std, variables, rows)

    def read(part: range) -> tuple[np.ndarray, None]:
        return crop.center_crop(images.read(np.array(part)), config.dataset.image_size), None

    total = len(images.labels)
    size = reading_ahead.batch_size(config.eval_batch_size, total)
    batches = reading_ahead.in_batches(forward, read, range(total), size)
    return np.concatenate([features for _, _, features in batches])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _features(apply: Callable, mean: tuple, std: tuple, variables: Any, pixels) -> jax.Array:
    return apply(variables, backprop.normalize(pixels, mean, std), train=False)
