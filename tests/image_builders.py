"""Images, settings and files that the tests of the data sources share."""

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

RNG = np.random.default_rng(0)


def settings(name, data_dir="", stored_size=8, **changed):
    return ConfigDict(
        {
            "name": name,
            "data_dir": str(data_dir),
            "stored_size": stored_size,
            "class_list": "",
            "evaluate_on": "test",
            "on_broken": "error",
            "alpha": "white",
            "drop_test_duplicates": False,
            "num_classes": 10,
            **changed,
        }
    )


def all_of(images):
    return images.read(np.arange(len(images.labels)))


def noise(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def npz_arrays(**changed):
    made = {
        "train_images": noise(12, 8, 8, 3),
        "train_labels": np.arange(12) % 3,
        "test_images": noise(5, 8, 8, 3),
        "test_labels": np.array([2, 1, 0, 0, 1], np.uint8),
        **changed,
    }
    return {key: value for key, value in made.items() if value is not None}
