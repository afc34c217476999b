"""Measures the cost of methods relative to FixMatch. Slow; needs an otherwise idle machine."""

import functools
import operator
import os
import random
import statistics
import time

import jax
import numpy as np
import pytest

from layermatch_jax import automatic, presets
from layermatch_jax import config as config_lib
from layermatch_jax.batches import TrainBatch
from layermatch_jax.method import assembly, state, steps
from layermatch_jax.runtime import parallel

TURNS = 150
CONV4 = {"model.name": "conv4", "model.width": 16, "dataset.image_size": 16}
WIDE_RESNET = {"model.depth": 10, "model.widen_factor": 1, "model.first_stride": 2}
# The numbers of samples and classes of ImageNet-100, for state by sample.
IMAGENET_100 = CONV4 | {"samples": 126_689, "classes": 100}
POLICIES = [m for m in presets.METHODS if presets.METHODS[m].get("policy.name")]


def prepare(method, fields):
    """Makes a compiled step, its state and a batch with B = 32 and μ = 3, as in the demo."""
    fields = {"samples": 1000, "classes": 10} | fields
    samples, classes = fields.pop("samples"), fields.pop("classes")
    config = presets.apply_method(config_lib.base(), method)
    config.update_from_flattened_dict(fields)
    config = automatic.resolve(config)
    initial = state.create(config, classes, samples, np.zeros(40, np.int32), "batch")
    method = assembly.create_method(config, initial.params, ((0.5,) * 3, (0.3,) * 3))
    step = parallel.compile_step(functools.partial(steps.train_step, method=method), "pmap")
    rng, side = np.random.RandomState(0), config.dataset.image_size
    batch = TrainBatch(
        images=rng.randint(0, 256, (32, 7, side, side, 3)).astype(np.uint8),
        labels=rng.randint(0, classes, 32).astype(np.int32),
        labeled_indices=np.zeros(32, np.int32),
        unlabeled_indices=rng.randint(0, samples, (32, 3)).astype(np.int32),
        true_labels=rng.randint(0, classes, (32, 3)).astype(np.int32),
    )
    return step, parallel.replicate(initial, "pmap"), parallel.place_batch(batch, "pmap")


def ratio_to_fixmatch(name, method, fields):
    """Returns median ratios of step times; the three steps take turns."""
    if jax.device_count() > 1 or os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1":
        pytest.skip("needs one device and full optimization: run this file with "
                    "XLA_FLAGS= JAX_DISABLE_MOST_OPTIMIZATIONS=0")  # fmt: skip
    # FixMatch is measured twice: the ratio of the two shows the noise of this machine.
    base = {key: fields[key] for key in fields if not key.startswith("avg_clustering")}
    runs = {
        "fixmatch": prepare("fixmatch", base),
        "fixmatch again": prepare("fixmatch", base),
        "method": prepare(method, fields),
    }
    seconds = {run: [] for run in runs}
    rng = random.Random(0)
    for _ in range(5 + TURNS):
        for run in rng.sample(list(runs), len(runs)):  # the order changes times by a few %
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
        f"\n{name}: {method} / FixMatch = {ratio['method']:.3f}, FixMatch / FixMatch = "
        f"{ratio['fixmatch again']:.3f}, medians of {TURNS} pairs; FixMatch "
        f"{1e3 * statistics.median(seconds['fixmatch']):.1f} ms"
    )
    return ratio["method"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields"), [("conv4", CONV4), ("WRN-10-1", WIDE_RESNET)])
def test_layermatch_costs_what_fixmatch_costs(name, fields):
    assert ratio_to_fixmatch(name, "layermatch", fields) <= 1.03


@pytest.mark.slow
@pytest.mark.parametrize("method", POLICIES)
def test_a_policy_costs_what_fixmatch_costs(method):
    ratio = ratio_to_fixmatch("conv4", method, CONV4)
    assert ratio <= 1.05 or method == "mean_teacher"  # it runs a second network


@pytest.mark.slow
@pytest.mark.parametrize(("method", "centers"), [("flexmatch", "none"), ("fixmatch", "outputs")])
def test_state_by_sample_costs_little(method, centers):
    fields = IMAGENET_100 | {"avg_clustering.centers": centers}
    step, initial, batch = prepare(method, fields)
    size = sum(x.nbytes for x in jax.tree.leaves((initial.policy, initial.centers)))
    memory = step.lower(initial, batch).compile().memory_analysis()
    print(
        f"\n{method}, {centers}: {size / 1e6:.1f} MB of state; a step's arguments "
        f"{memory.argument_size_in_bytes / 1e6:.1f} MB, of these updated in place "
        f"{memory.alias_size_in_bytes / 1e6:.1f} MB, temporaries "
        f"{memory.temp_size_in_bytes / 1e6:.1f} MB"
    )
    assert memory.alias_size_in_bytes >= size, "state is copied"
    assert ratio_to_fixmatch("ImageNet-100", method, fields) <= 1.05
