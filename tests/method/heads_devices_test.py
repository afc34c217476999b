"""Policies with policy heads and draws: one device against eight devices, and the draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import make_config
from image_builders import fake_run
from parallel_test import CLASSES, LABELS, UNLABELED, assert_equal_within, configuration
from parallel_test import MU as RATIO
from parallel_test import B as ROWS
from toy_with_head import WIDTH

from layermatch_jax.batches import TrainBatch
from layermatch_jax.data import feed
from layermatch_jax.method import assembly, state, steps
from layermatch_jax.runtime import parallel

pytestmark = pytest.mark.usefixtures("toy")


# ---------------------------------------------------------------- one device and eight


def place_for(devices):
    if devices == "one":
        return lambda tree: tree, lambda batch: batch
    return (
        functools.partial(parallel.replicate, parallelism=devices),
        functools.partial(parallel.place_batch, parallelism=devices),
    )


def float32_batch(method, seed):
    rng, views = np.random.RandomState(seed), method.layout.drawn.size
    policy = method.policy
    return TrainBatch(
        images=rng.randint(0, 256, (ROWS, views, 8, 8, 3)).astype(np.uint8),
        labels=rng.randint(0, CLASSES, ROWS).astype(np.int32),
        labeled_indices=rng.permutation(ROWS).astype(np.int32),
        unlabeled_indices=rng.randint(0, UNLABELED, (ROWS, RATIO)).astype(np.int32),
        true_labels=rng.randint(-1, CLASSES, (ROWS, RATIO)).astype(np.int32),
        draws=policy.draws(np.random.default_rng(seed), ROWS, RATIO) if policy.draws else (),
    )


def start(name, devices):
    config = configuration(
        **{
            "policy.name": name,
            "policy.threshold": 0.9,
            "avg_clustering.centers": "none",
            "parallelism": "pmap" if devices == "pmap" else "jit",
            "policy.ramp": 0.0,
        }
    )
    axis_name = "batch" if devices == "pmap" else None
    current = state.create(config, CLASSES, UNLABELED, LABELS, axis_name)
    kernel = current.params["classifier"]["kernel"]
    params = current.params | {
        "classifier": {"kernel": 3 * kernel, "bias": jnp.array([0.1, -0.1, 0.0])}
    }
    method = assembly.create_method(config, params, ((0.5,) * 3, (0.3,) * 3), axis_name)
    step = functools.partial(steps.train_step, method=method)
    program = jax.jit(step) if devices == "one" else parallel.compile_step(step, devices)
    return method, program, jax.device_get(current.replace(params=params))


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("comatch", 5),
        pytest.param("toy", 0, marks=pytest.mark.slow),
        pytest.param("pi_model", 0, marks=pytest.mark.slow),
        ("vat", 0),
    ],
)
def test_one_device_equals_eight(name, before):
    """`before` is the number of steps on one device that fill the memory first."""
    method, program, first = start(name, "one")
    for k in range(before):
        first, _ = program(first, float32_batch(method, k))
    first = jax.device_get(first)

    def run(program, devices):
        replicate, place = place_for(devices)
        current = replicate(first)
        for k in range(before, before + 3):
            current, metrics = program(current, place(float32_batch(method, k)))
        return jax.device_get((current, metrics))

    expected, expected_metrics = run(program, "one")
    used, count = expected_metrics["mask_rate"]
    assert name in ("pi_model", "vat") or 0.1 <= used / count <= 0.9
    if name == "comatch":
        assert expected_metrics["neighbors"][0] > 0.1  # the loss compares rows of different devices
    for devices in ("pmap", "jit"):
        actual, metrics = run(start(name, devices)[1], devices)
        assert_equal_within(actual, expected, 1e-5)
        assert_equal_within(metrics, expected_metrics, 1e-4)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected.params, first.params)
    assert min(jax.tree.leaves(moved)) > 1e-5, "a parameter that hardly changed tests nothing"
    for tree, start_tree in ((expected.policy, first.policy), (expected.head_stats, {})):
        if start_tree:
            moved = jax.tree.map(lambda a, b: np.any(a != b), tree, start_tree)
            assert all(jax.tree.leaves(moved))


# ---------------------------------------------------------------- the policy's own draws


def prepared(backend, **fields):
    config = make_config("fixmatch", policy__name="toy")
    steps_per_call = 2 if backend == "device" else 1
    given = {"input.backend": backend, "input.steps_per_call": steps_per_call} | fields
    config, _, partition, sampler = fake_run(config, **given)
    return config, partition, sampler


def draws_of_steps(backend, which, part=slice(None)):
    """Returns the draws that the feed passes to the steps `which`."""
    config, partition, sampler = prepared(backend)
    made = feed.create(config, partition, sampler, part)
    resident, found = made.resident("jit"), []
    own_draws = jax.jit(lambda resident, one_step: made.batch(resident, one_step).draws)
    for _, chunk in made.chunks(which):
        for k in range(len(jax.tree.leaves(chunk)[0][0])):
            one_step = jax.tree.map(lambda x, k=k: x[:, k], chunk)
            found.append(jax.device_get(own_draws(resident, one_step)))
    return found


def test_own_draws_are_the_same_from_both_backends_and_cut_by_host():
    _, _, sampler = prepared("device")
    whole = [sampler.draw_for_policy(step) for step in range(3, 7)]
    assert whole[0]["direction"].shape == (4, WIDTH)
    assert whole[0]["order"].shape == (4, 2)
    for backend in ("tf_data", "device"):
        for part in (slice(None), slice(2, 4)):
            found = draws_of_steps(backend, range(3, 7), part)
            for a, b in zip(found, whole, strict=True):
                np.testing.assert_array_equal(a["order"], b["order"][part])
                np.testing.assert_array_equal(a["direction"], np.float32(b["direction"][part]))


def test_own_draws_are_a_function_of_seed_and_step():
    _, _, sampler = prepared("device")
    again = prepared("tf_data", **{"dataset.label_seed": 1})[2]
    again.draw(2)  # after calls for other steps
    jax.tree.map(np.testing.assert_array_equal, sampler.draw_for_policy(7), again.draw(7).policy)
    others = [sampler.draw_for_policy(8), prepared("device", seed=1)[2].draw_for_policy(7)]
    for other in others:
        differ = jax.tree.map(lambda a, b: np.all(a != b), sampler.draw_for_policy(7), other)
        assert differ["direction"]
    # A separate generator: the draws of the views equal those for a policy without own draws.
    plain = prepared("device", **{"policy.name": "fixed_threshold"})[2]
    assert plain.draw(7).policy == ()
    np.testing.assert_array_equal(plain.draw(7).unlabeled, sampler.draw(7).unlabeled)
