"""Tests that one call of several train steps equals calls of one step each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parallel_test import assert_equal_within, configuration, make_batch, start

from layermatch_jax.batches import TrainBatch
from layermatch_jax.method import program, steps, windows
from layermatch_jax.runtime import parallel

K = 3


def chunk_of(batches):
    """Stacks S batches to [rows, S, ...]."""
    return TrainBatch(*(np.stack(x, axis=1) for x in zip(*batches, strict=True)))


def compile_program(method, devices):
    function = functools.partial(program.train_steps, batch=lambda _, rows: rows, method=method)
    if devices == "one":
        return jax.jit(function)
    return parallel.compile_step(function, devices, resident=True)


# Centers and policy have a state, so the order of the steps matters.
@pytest.mark.parametrize("devices", ["pmap", "jit"])
def test_a_call_of_several_steps(devices):
    config = configuration(**{"policy.name": "flexmatch", "avg_clustering.centers": "classifier"})
    method, initial = start(config, parallel.axis_name(devices))
    compiled = compile_program(method, devices)
    single = parallel.compile_step(functools.partial(steps.train_step, method=method), devices)

    expected, sums = parallel.replicate(initial, devices), []
    for k in range(K):
        expected, step_metrics = single(expected, parallel.place_batch(make_batch(k), devices))
        sums.append(jax.device_get(step_metrics))
    chunk = parallel.place_batch(chunk_of([make_batch(k) for k in range(K)]), devices)
    state, window = compiled(parallel.replicate(initial, devices), (), chunk)

    assert int(state.step) == K
    assert_equal_within(jax.device_get(state), jax.device_get(expected), 1e-6)
    for name, total in window["sums"].items():
        np.testing.assert_allclose(total, sum(s[name] for s in sums), rtol=1e-5, err_msg=name)
    assert window["nonfinite_step"] == windows.NEVER


def spoiled_at(step):
    """Makes an optimizer whose updates are 0, except for NaN in one step (0-based)."""
    return optax.GradientTransformation(
        init=lambda params: jnp.int32(0),
        update=lambda grads, count, params: (
            jax.tree.map(lambda g: jnp.where(count == step, jnp.nan, 0 * g), grads),
            count + 1,
        ),
    )


@pytest.mark.parametrize(("spoiled", "first"), [(0, 2), (1, 3), (2, windows.NEVER)])
def test_a_loss_that_is_not_finite_is_told_by_its_step(spoiled, first):
    method, initial = start(configuration(), None)
    tx = spoiled_at(spoiled)
    initial = initial.replace(tx=tx, opt_state=tx.init(initial.params))
    chunk = chunk_of([make_batch(k) for k in range(K)])
    _, window = compile_program(method, "one")(initial, (), chunk)
    assert window["nonfinite_step"] == first
