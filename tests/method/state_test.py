"""Tests that the shapes and dtypes of the training state never change."""

import functools

import builders
import jax
import numpy as np
import pytest

from layermatch_jax.method import assembly, policies, state, steps


@pytest.mark.parametrize("name", policies.POLICIES)
def test_a_step_keeps_the_form_of_the_state(name):
    # Otherwise the step would compile twice, and a checkpoint would not fit the restored state.
    method_name = "fixmatch" if name == "fixed_threshold" else name
    config = builders.make_config(method_name, model__name="linear", unlabeled_ratio=builders.MU)
    config.dataset.image_size = builders.SIDE
    labels = np.arange(builders.B, dtype=np.int32) % builders.K
    initializer = state.initializer(config, builders.K, builders.NUM_UNLABELED, labels)
    before = jax.eval_shape(initializer)
    method = assembly.create_method(config, before.params, ((0.0,) * 3, (1.0,) * 3))
    views = method.layout.drawn.size
    images = np.zeros((builders.B, views, builders.SIDE, builders.SIDE, 3), np.uint8)
    draws = method.policy.draws
    batch = builders.make_batch()._replace(
        images=images,
        draws=draws(np.random.default_rng(0), builders.B, builders.MU) if draws else (),
    )
    after, _ = jax.eval_shape(functools.partial(steps.train_step, method=method), before, batch)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    form = lambda tree: [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]  # noqa: E731
    assert form(after) == form(before)
