"""Features of images by a backbone with fixed weights, against the network called by hand."""

import jax
import numpy as np

from layermatch_jax import automatic, config, presets
from layermatch_jax.data import images as images_lib
from layermatch_jax.frozen import features
from layermatch_jax.method import state


def test_features_are_those_of_the_averaged_backbone_on_center_crops():
    settings = presets.apply_method(config.base(), "fixmatch")
    settings.model.name, settings.model.width = "conv4", 4
    settings.dataset.stored_size, settings.dataset.image_size = 12, 8
    settings.eval_batch_size = 8
    settings = automatic.resolve(settings)
    start = state.create(
        settings, num_classes=3, num_unlabeled=5, labels=np.arange(3, dtype=np.int32)
    )
    doubled = jax.tree.map(lambda x: 2 * x, start.params)
    start = start.replace(ema_params=doubled)
    pixels = np.random.RandomState(0).randint(0, 256, (11, 12, 12, 3)).astype(np.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)

    found = features.of_images(start, (mean, std), images_lib.from_array(pixels, None), settings)

    centers = pixels[:, 2:10, 2:10]
    normalized = ((centers / 255 - np.array(mean)) / np.array(std)).astype(np.float32)
    variables = {"params": doubled["backbone"], "batch_stats": start.batch_stats}
    expected = start.apply_fn(variables, normalized, train=False)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
