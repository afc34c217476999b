"""What an exported file computes, and what it tells about itself."""

from collections.abc import Callable
from typing import Any

import jax

from layermatch_jax.after import model as model_lib
from layermatch_jax.after.model import Model

FORMAT = 1  # of `told`, to be raised when earlier readers would misread it
ENTRY = "layermatch"  # the name of `told` in a file
INPUT, OUTPUT = "images", "probabilities"


def of_images(model: Model) -> Callable[[jax.Array], jax.Array]:
    """The function that is exported: uint8 images [n, S, S, 3] -> probabilities float32 [n, K].

    Normalization and softmax are those of `model.Predictor`. A temperature, once there is one,
    belongs there as well; then exported files have it.

    Raises:
      InputError: this version has no such backbone.
    """
    predictor = model_lib.predictor(model)

    def probabilities(images: jax.Array) -> jax.Array:
        return predictor(model.variables, images).probabilities

    return probabilities


def preprocessing(model: Model) -> str:
    """The line of Python that makes the input of a Pillow image: a Pillow image of S pixels.

    It computes what `data.images.square` and `data.augment.crop.center_crop` do, the same bytes but
    for images whose shorter side is `stored_size` already and whose longer side is larger by an odd
    number: their central square lies half a pixel aside.
    """
    stored, seen = model.stored_size, model.image_size
    start = (stored - seen) // 2
    box = (start, start, start + seen, start + seen)
    return (
        f'ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), ({stored}, {stored}), '
        f"Image.Resampling.BILINEAR).crop({box})"
    )


def told(model: Model) -> dict[str, Any]:
    """What a file tells about the model, for JSON."""
    size = model.image_size
    return {
        "format": FORMAT,
        "input": {"name": INPUT, "dtype": "uint8", "shape": ["n", size, size, 3]},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["n", len(model.class_names)]},
        "class_names": list(model.class_names),
        "preprocessing": preprocessing(model),
        "stored_size": model.stored_size,
        "image_size": model.image_size,
        "about": model.about,
        "sha256": model_lib.fingerprint(model),
    }
