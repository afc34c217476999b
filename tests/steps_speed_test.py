"""What LayerMatch costs over FixMatch. Slow, and meaningful on a quiet machine only."""

import functools
import os
import statistics
import time

import jax
import numpy as np
import pytest

from layermatch_jax import config as config_lib
from layermatch_jax import parallel, state, steps
from layermatch_jax.batch import TrainBatch

PAIRS = 150
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
    runs = {m: list(prepare(m, MODELS[name])) for m in ("fixmatch", "layermatch")}
    seconds = {m: [] for m in runs}
    for pair in range(PAIRS + 5):
        for m in sorted(runs, reverse=pair % 2 == 1):  # who goes first alternates too
            step, current, batch = runs[m]
            start = time.perf_counter()
            runs[m][1], metrics = step(current, batch)
            jax.block_until_ready((runs[m][1].params, metrics))
            if pair >= 5:
                seconds[m].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["layermatch"], seconds["fixmatch"], strict=True)]
    medians = {m: 1e3 * statistics.median(s) for m, s in seconds.items()}
    ratio = statistics.median(ratios)
    print(f"\n{name}: LayerMatch / FixMatch = {ratio:.3f}, median of {PAIRS} pairs; ms: {medians}")
    assert ratio <= LIMIT
