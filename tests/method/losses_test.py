"""Tests per-example losses: hand-computed numbers, shapes, derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from layermatch_jax.method import losses

LOGITS = np.log([1.0, 2.0, 5.0]).astype(np.float32)  # probabilities 1/8, 2/8, 5/8


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([0, 0, 1], 0.4700036),  # ln 8/5
        ([1, 0, 0], 2.0794415),  # ln 8
        ([0.5, 0.5, 0], 1.7328680),  # (ln 8 + ln 4) / 2
        ([0.125, 0.25, 0.625], 0.9002561),  # the entropy
        ([0, 0, 0], 0),
    ],
)
def test_cross_entropy(targets, expected):
    loss = optax.softmax_cross_entropy(LOGITS, jnp.array(targets, jnp.float32))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([0, 0, 1], 0.07291667),  # (1 + 4 + 9) / 64 / 3
        ([1, 0, 0], 0.40625),  # (49 + 4 + 25) / 64 / 3
        ([0.125, 0.25, 0.625], 0),
    ],
)
def test_squared_error(targets, expected):
    loss = losses.squared_error(LOGITS, jnp.array(targets, jnp.float32))
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-14)


def test_confident_logits_overflow_nothing():
    logits, targets = jnp.array([[1e4, 0.0], [1e4, 0.0]]), jnp.eye(2)
    np.testing.assert_array_equal(optax.softmax_cross_entropy(logits, targets), [0, 1e4])
    np.testing.assert_array_equal(losses.squared_error(logits, targets), [0, 1])


@pytest.mark.parametrize("loss", [optax.softmax_cross_entropy, losses.squared_error])
def test_one_number_per_example(loss):
    rng = np.random.RandomState(0)
    logits, targets = rng.randn(2, 5, 3), rng.dirichlet(np.ones(3), (2, 5))
    rows = loss(jnp.array(logits), jnp.array(targets))
    assert rows.shape == (2, 5)
    assert rows.dtype == jnp.float32
    one = loss(jnp.array(logits[1, 2]), jnp.array(targets[1, 2]))
    np.testing.assert_allclose(rows[1, 2], one, rtol=1e-6)
    assert loss(jnp.zeros((0, 3)), jnp.zeros((0, 3))).shape == (0,)


@pytest.mark.parametrize("loss", [optax.softmax_cross_entropy, losses.squared_error])
def test_derivatives(loss):
    with jax.enable_x64(True):
        rng = np.random.RandomState(0)
        logits, targets = rng.randn(2, 3), rng.dirichlet(np.ones(3), 2)
        compiled = jax.jit(lambda logits: loss(logits, targets))
        check_grads(compiled, (logits,), order=1, atol=1e-7, rtol=1e-7)


def test_cross_entropys_derivative_is_the_error_of_the_probabilities():
    targets = np.array([0.0, 1.0, 0.0], np.float32)
    gradient = jax.grad(optax.softmax_cross_entropy)(LOGITS, targets)
    np.testing.assert_allclose(gradient, [0.125, -0.75, 0.625], rtol=1e-6)
