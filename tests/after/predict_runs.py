"""Untrained models, folders of images and their predictions, for tests."""

import csv
import json
import shutil

import jax
import numpy as np
from PIL import Image

from layermatch_jax import config as config_lib
from layermatch_jax.after import bundle, model
from layermatch_jax.models import create_model

CLASSES = ("cat", "dog, small", "eel")


def make_model(backbone="linear", **changed):
    """A model with random weights: 8 pixels stored, 6 seen, 4 features if linear, 3 classes."""
    settings = config_lib.base().model
    settings.update({"name": backbone, "width": 4, "bn_decay": 0.9, "bn_epsilon": 1e-3})
    side = changed.get("image_size", 6)
    network, seen = create_model(settings), np.zeros((1, side, side, 3), np.float32)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), seen, train=False))
    dim = jax.eval_shape(lambda v: network.apply(v, seen, train=False), shapes).shape[-1]
    rng = np.random.default_rng(0)
    variables = {  # variances are positive
        "params": _random(lambda size: rng.normal(scale=0.1, size=size), shapes["params"]),
        "batch_stats": _random(
            lambda size: rng.uniform(0.5, 2, size), shapes.get("batch_stats", {})
        ),
    }
    of_model = {
        "class_names": CLASSES,
        "mean": (0.5, 0.25, 0.75),
        "std": (0.25, 0.5, 0.125),
        "stored_size": 8,
        "image_size": 6,
        "alpha": "white",
        "backbone": settings.to_dict(),
        "batch_size": 16,
        "about": {"step": 3, "train_steps": 8, "method": "fixmatch", "data_set": "folder"},
        "variables": {
            "backbone": variables["params"],
            "batch_stats": variables["batch_stats"],
            "classifier": {
                "kernel": rng.normal(size=(dim, 3)).astype(np.float32),
                "bias": rng.normal(size=3).astype(np.float32),
            },
        },
    }
    return model.Model(**of_model | changed)


def _random(draw, shapes):
    return jax.tree.map(lambda leaf: draw(leaf.shape).astype(np.float32), shapes)


def make_bundle(folder, **changed):
    """Writes a bundle of `make_model`; returns its path."""
    path = folder / "model.layermatch"
    bundle.write(make_model(**changed), str(path))
    return path


def expected(model, pixels):
    """(features, probabilities) of a linear model in NumPy, float64."""
    seen = pixels[:, 1:7, 1:7] / 255  # the middle 6 of 8
    seen = (seen - np.array(model.mean)) / np.array(model.std)
    features = seen.reshape(len(seen), -1) @ model.variables["backbone"]["stem"]["kernel"]
    of_classes = model.variables["classifier"]
    likely = np.exp(features @ of_classes["kernel"] + of_classes["bias"])
    return features, likely / likely.sum(axis=1, keepdims=True)


def make_images(folder, count, suffix="png"):
    """Noise of 8 pixels: uint8 [count, 8, 8, 3], and as files 000.png, ... in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(1).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    for n, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{n:03}.{suffix}")
    return pixels


def rows(path):
    """The lines of a table, each as a dictionary of strings (CSV) or values (JSON)."""
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def cut(path, keep, to):
    """A copy of a file's first `keep` bytes."""
    shutil.copyfile(path, to)
    with open(to, "r+b") as file:
        file.truncate(keep)
    return to
