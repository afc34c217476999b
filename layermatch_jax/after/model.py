"""A trained model without its run: all data that prediction needs, and the pure function."""

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
    """A trained model; predictions with it need neither the run nor the training data."""

    class_names: tuple[str, ...]  # K of them
    mean: tuple[float, ...]  # of the channels of the training images; white is 1
    std: tuple[float, ...]
    stored_size: int  # side to which an image's central square is resized, pixels
    image_size: int  # side of the center crop that the network gets, pixels
    alpha: str  # see decoding.decode
    backbone: dict[str, Any]  # the settings config.model
    batch_size: int  # of the run's evaluations
    about: dict[str, Any]  # its origin, for people: see `trained.of_run`
    # {'backbone': parameters, 'batch_stats': …, 'classifier': {'kernel' [D, K], 'bias' [K]}}:
    # float32 NumPy arrays
    variables: dict[str, Any]


class Outputs(NamedTuple):
    """Features and probabilities of n images, in their order."""

    features: jax.Array  # float32 [n, D], the input of the classifier
    probabilities: jax.Array  # float32 [n, K]


class Predictor(NamedTuple):
    """The pure function of a model; two of them are equal if they compute the same function."""

    backbone: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, variables: dict[str, Any], images: jax.Array) -> Outputs:
        """Applies the model as the evaluation of its run does.

        Args:
          variables: see `Model.variables`.
          images: uint8 [n, S, S, 3], S = `Model.image_size`.

        Returns:
          Outputs of all n images; each row depends only on its own image.
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
    """Creates a model's function (variables, uint8 images) -> Outputs.

    Raises:
      InputError: this version does not have the model's backbone.
    """
    settings = config_lib.base().model.to_dict() | model.backbone
    backbone = models.create_model(ml_collections.ConfigDict(settings))
    return Predictor(backbone, model.mean, model.std)


def card(model: Model) -> dict[str, Any]:
    """Returns all fields of a model except its arrays, for JSON."""
    return {name: value for name, value in model._asdict().items() if name != "variables"}


def flat(variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays by path, such as 'classifier/kernel', sorted by path."""
    arrays = traverse_util.flatten_dict(variables, sep="/")
    return {path: np.ascontiguousarray(arrays[path]) for path in sorted(arrays)}


def fingerprint(model: Model) -> str:
    """Computes the SHA-256, in hex, of everything that a prediction depends on."""
    computed_with = card(model)
    for name in ("batch_size", "about"):
        computed_with.pop(name)
    found = hashlib.sha256(json.dumps(computed_with, sort_keys=True).encode())
    for path, array in flat(model.variables).items():
        found.update(f"{path} {array.dtype} {array.shape}\n".encode())
        found.update(array)
    return found.hexdigest()
