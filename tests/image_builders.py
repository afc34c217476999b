"""Images, settings and files for the tests of the data sources."""

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from layermatch_jax import setup
from layermatch_jax.data import sources, splits

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
            "cache_dir": "",
            "drop_test_duplicates": False,
            "num_classes": 10,
            **changed,
        }
    )


def fake_run(config, **fields):
    """Makes a small run on fake images: config (changed in place), source, partition, sampler."""
    config.update_from_flattened_dict(
        {
            "dataset.name": "fake",
            "dataset.num_labels": 20,
            "dataset.stored_size": 12,
            "dataset.image_size": 8,
            "dataset.padding": 1,
            "batch_size": 4,
            "unlabeled_ratio": 2,
        }
        | fields
    )
    source = sources.load(config.dataset)
    partition = splits.partition(source, config.dataset)
    return config, source, partition, setup.create_sampler(config, partition)


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
