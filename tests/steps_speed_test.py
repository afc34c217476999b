"""What LayerMatch costs over FixMatch. Slow, and meaningful on a quiet machine only."""

import functools
import operator
import os
import statistics
import time

import jax
import numpy as np
import pytest

from layermatch_jax import config as config_lib
from layermatch_jax import parallel, state, steps
from layermatch_jax.batch import TrainBatch

TURNS = 150
LIMIT = 1.03
MODELS = {
    "conv4": {"model.name": "conv4", "model.width": 16, "dataset.image_size": 16},
    "wide_resnet": {"model.depth": 10, "model.widen_factor": 1, "model.first_stride": 2},
}


def prepare(method_name, fields):
    """A compiled step with its state and batch: batch size 32 and μ = 3, as in the demo."""
    config = config_lib.apply_method(config_lib.base(), method_name)
    config.update_from_flattened_dict(fields)
    initial = state.create(config, 10, 1000, "batch")
    method = steps.create_method(config, initial.params, ((0.5,) * 3, (0.3,) * 3))
    step = parallel.compile_step(functools.partial(steps.train_step, method=method), "pmap")
    rng, side = np.random.RandomState(0), config.dataset.image_size
    batch = TrainBatch(
        images=rng.randint(0, 256, (32, 7, side, side, 3)).astype(np.uint8),
        labels=rng.randint(0, 10, 32).astype(np.int32),
        indices=rng.randint(0, 1000, (32, 3)).astype(np.int32),
        true_labels=rng.randint(0, 10, (32, 3)).astype(np.int32),
    )
    return step, parallel.replicate(initial), parallel.place_batch(batch, "pmap")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_layermatch_costs_what_fixmatch_costs(name):
    if jax.device_count() > 1 or os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1":
        pytest.skip("needs one device and full optimisation: run this file with "
                    "XLA_FLAGS= JAX_DISABLE_MOST_OPTIMIZATIONS=0")  # fmt: skip
    # The second FixMatch shows what this machine's noise makes of a ratio that is 1.
    runs = {
        "fixmatch": prepare("fixmatch", MODELS[name]),
        "fixmatch again": prepare("fixmatch", MODELS[name]),
        "layermatch": prepare("layermatch", MODELS[name]),
    }
    seconds = {run: [] for run in runs}
    for turn in range(5 + TURNS):
        for run in sorted(runs, reverse=turn % 2 == 1):  # who goes first alternates too
            step, current, batch = runs[run]
            start = time.perf_counter()
            current, metrics = step(current, batch)
            jax.block_until_ready((current.params, metrics))
            seconds[run].append(time.perf_counter() - start)
            runs[run] = step, current, batch
    seconds = {run: values[5:] for run, values in seconds.items()}
    ratio = {
        run: statistics.median(map(operator.truediv, values, seconds["fixmatch"]))
        for run, values in seconds.items()
    }
    print(
        f"\n{name}: LayerMatch / FixMatch = {ratio['layermatch']:.3f}, FixMatch / FixMatch = "
        f"{ratio['fixmatch again']:.3f}, medians of {TURNS} pairs; FixMatch "
        f"{1e3 * statistics.median(seconds['fixmatch']):.1f} ms"
    )
    assert ratio["layermatch"] <= LIMIT
