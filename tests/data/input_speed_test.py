"""Times the batched input against a plain per-image tf.data map.

TFDS_DATA_DIR=... python -m pytest -m slow -n 0 -s tests/data/input_speed_test.py
"""

import os
import time

import numpy as np
import pytest

from layermatch_jax import config as config_lib
from layermatch_jax import setup
from layermatch_jax.data import pipeline, sources, splits
from layermatch_jax.errors import InputError

pytest.importorskip("tensorflow")

from layermatch_jax.data import per_image

ROWS = 448  # unlabeled images in a batch
ROUNDS = 5
BATCHES = {"per image": 4, "batched": 20}  # timed in a round, about as long as each other
WARM_UP = 6  # of them made before, while the other was timed
FACTOR = 2.5


@pytest.fixture(scope="module")
def inputs():
    config = config_lib.base()
    try:
        source = sources.load(config.dataset)
    except InputError:
        pytest.skip("set TFDS_DATA_DIR to a folder where tfds has prepared cifar10")
    partition = splits.partition(source, config.dataset)
    sampler = setup.create_sampler(config, partition)
    padding = config.dataset.padding
    return {
        "per image": per_image.view_batches(partition.unlabeled, sampler, padding),
        "batched": pipeline.train_batches(
            partition, sampler, padding=padding, steps=range(100_000)
        ),
    }


def rate(iterator, batches):
    """Unlabeled images a second; of each a weak and a strong view is made."""
    for _ in range(WARM_UP):
        next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    return batches * ROWS / (time.perf_counter() - start)


@pytest.mark.slow
def test_batched_augmentation_is_several_times_as_fast(inputs):
    weak, strong = next(inputs["per image"])
    images = next(inputs["batched"]).images
    views = [images[:, v].reshape(weak.shape) for v in (slice(1, 8), slice(8, None))]
    np.testing.assert_array_equal(weak, views[0])
    # The same work: only nearest neighbors on the border between two pixels may differ.
    assert (strong != views[1]).mean() < 0.005

    rates = {name: [] for name in inputs}
    for _ in range(ROUNDS):
        for name, iterator in inputs.items():
            rates[name].append(rate(iterator, BATCHES[name]))
    print(f"\nCIFAR-10, weak and strong view of each image, 3 operations, {os.cpu_count()} CPUs")
    for name, values in rates.items():
        values = np.sort(values)
        print(
            f"{name:>10}: {np.median(values):7,.0f} images/s "
            f"(median of {ROUNDS}; {values[0]:,.0f} to {values[-1]:,.0f})"
        )
    factor = np.median(rates["batched"]) / np.median(rates["per image"])
    print(f"     ratio: {factor:.1f}")
    assert factor >= FACTOR
