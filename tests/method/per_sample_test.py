"""Tests that, of rows with the same index, the last one in global order is written."""

import jax.numpy as jnp
import numpy as np

from layermatch_jax.method import per_sample

INDICES = jnp.array([4, 2, 4, 0, 2, 4])


def test_the_last_row_of_each_sample():
    actual = per_sample.last_of_each(INDICES)
    np.testing.assert_array_equal(actual, [False, False, False, True, True, True])


def test_the_last_row_among_those_that_count():
    among = jnp.array([True, True, True, False, False, False])
    actual = per_sample.last_of_each(INDICES, among)
    np.testing.assert_array_equal(actual, [False, True, True, False, False, False])


def test_writes_change_their_samples_alone():
    rows = jnp.arange(6, dtype=jnp.int32) * 10
    among = jnp.array([True, True, True, False, False, False])
    values = per_sample.write(
        jnp.full(5, -1, jnp.int32), INDICES, rows, per_sample.last_of_each(INDICES, among)
    )
    np.testing.assert_array_equal(values, [-1, -1, 10, -1, 20])
    matrix = per_sample.write(
        jnp.zeros((5, 2)), INDICES, jnp.stack([rows, -rows], 1) * 1.0, INDICES == 0
    )
    np.testing.assert_array_equal(matrix, [[30, -30], [0, 0], [0, 0], [0, 0], [0, 0]])
