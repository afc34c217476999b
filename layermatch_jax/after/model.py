"""A trained model by itself: what prediction needs of a run, and the pure function that it is."""

import hashlib
import json
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from flax import traverse_util

from layermatch_jax import config as config_lib
from layermatch_jax import models
from layermatch_jax.method import backprop, linear_head


class Model(NamedTuple):
    """A model that needs neither its run nor the run's data."""

    class_names: tuple[str, ...]  # K of them
    mean: tuple[float, ...]  # of the training images' channels, white is 1
    std: tuple[float, ...]
    stored_size: int  # side to which an image's central square is resized, pixels
    image_size: int  # side of the middle of that, which the network sees
    alpha: str  # of decoding.decode
    backbone: dict[str, Any]  # the settings config.model
    batch_size: int  # of the run's evaluations
    about: dict[str, Any]  # where it comes from, for people: see `trained.of_run`
    # {'backbone': parameters, 'batch_stats': …, 'classifier': {'kernel' [D, K], 'bias' [K]}}, of
    # float32 NumPy arrays
    variables: dict[str, Any]


class Outputs(NamedTuple):
    """Of n images, in their order."""

    features: jax.Array  # float32 [n, D], what the classifier sees
    probabilities: jax.Array  # float32 [n, K]


class Predictor(NamedTuple):
    """A pure function, equal to another one where the two compute the same."""

    backbone: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, variables: dict[str, Any], images: jax.Array) -> Outputs:
        """Applies the model as the evaluation of its run does.

        Args:
          variables: as `Model.variables`.
          images: uint8 [n, S, S, 3], S = `Model.image_size`.

        Returns:
          Outputs of all n images; each depends on its own image alone.
        """
        normalized = backprop.normalize(images, self.mean, self.std)
        of_backbone = {
            "params": variables["backbone"],
            "batch_stats": variables.get("batch_stats", {}),
        }
        features = self.backbone.apply(of_backbone, normalized, train=False)
        logits = linear_head.linear(variables["classifier"], features)
        return Outputs(features, jax.nn.softmax(logits))


def predictor(model: Model) -> Predictor:
    """The function (variables, uint8 images) -> Outputs of a model.

    Raises:
      InputError: this version has no such backbone.
    """
    settings = config_lib.base().model.to_dict() | model.backbone
    backbone = models.create_model(ml_collections.ConfigDict(settings))
    return Predictor(backbone, model.mean, model.std)


def card(model: Model) -> dict[str, Any]:
    """All of a model but its arrays, for JSON."""
    return {name: value for name, value in model._asdict().items() if name != "variables"}


def flat(variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays by their paths, such as 'classifier/kernel', in the order of these."""
    arrays = traverse_util.flatten_dict(variables, sep="/")
    return {path: np.ascontiguousarray(arrays[path]) for path in sorted(arrays)}


def fingerprint(model: Model) -> str:
    """SHA-256 in hex of all that a prediction depends on."""
    computed_with = card(model)
    for name in ("batch_size", "about"):
        computed_with.pop(name)
    found = hashlib.sha256(json.dumps(computed_with, sort_keys=True).encode())
    for path, array in flat(model.variables).items():
        found.update(f"{path} {array.dtype} {array.shape}\n".encode())
        found.update(array)
    return found.hexdigest()
