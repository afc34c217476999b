"""Tests EMA, statistics, decay and shards of a train step, and evaluation, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import (
    MU,
    B,
    D,
    K,
    assert_informative,
    backbone,
    logits_of,
    make_batch,
    make_config,
    make_method,
    make_params,
    make_state,
)
from full_policy import toy_policy
from objectives import assert_trees_close, softmax, supervised_loss, without_labels

from layermatch_jax.batches import EvalBatch
from layermatch_jax.method import backprop, optimizer, steps
from layermatch_jax.views import Layout, Views

pytestmark = pytest.mark.usefixtures("float64")


def test_supervised_training_needs_no_unlabeled_images():
    params, batch = make_params(), make_batch(mu=0)
    assert batch.images.shape[1] == 1
    assert batch.unlabeled_indices.shape == (B, 0)
    method = make_method(params, "supervised")
    step = jax.jit(functools.partial(steps.train_step, method=method))
    new, metrics = step(make_state(params, method), batch)
    expected = jax.jit(jax.grad(supervised_loss))(params, batch)
    assert_trees_close(new.opt_state, expected)
    for name, pair in metrics.items():
        assert np.all(np.isfinite(pair)), name
    assert metrics["loss_supervised"][0] == metrics["loss"][0]
    assert metrics["mask_rate"][1] == 0


def test_ema_has_no_warm_up_and_follows_the_update():
    params, other = make_params(), make_params(1)
    method = make_method(params, ema_decay=0.75)
    start = make_state(params, method).replace(ema_params=other)
    first, _ = steps.train_step(start, make_batch(), method=method)
    mean = lambda old, new: 0.75 * old + 0.25 * new  # noqa: E731
    assert_trees_close(first.ema_params, jax.tree.map(mean, other, first.params))
    second, _ = steps.train_step(first, make_batch(1), method=method)
    assert_trees_close(second.ema_params, jax.tree.map(mean, first.ema_params, second.params))


def test_batch_statistics_are_those_of_all_views():
    params, batch = make_params(), make_batch()
    method = make_method(params)
    new, _ = steps.train_step(make_state(params, method), batch, method=method)
    x = (batch.images / 255 - 0.5).reshape(-1, 12) @ np.array(params["backbone"]["stem"]["kernel"])
    x = x + np.array(params["backbone"]["stem"]["bias"])
    np.testing.assert_allclose(new.batch_stats["mean"], x.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(new.batch_stats["var"], x.var(axis=0), rtol=1e-10)


def test_no_mask_touches_weight_decay_and_a_zero_gradient_is_no_zero_update():
    params = make_params()
    settings = {
        "layerwise__gradient_mask": ((".*", 0.0),),
        "optimizer__learning_rate": 0.5,
        "optimizer__weight_decay": 0.125,
        "optimizer__momentum": 0.5,
        "train_steps": 2,
    }
    method = without_labels(make_method(params, **settings))
    tx = optimizer.create(make_config(**settings))
    current = make_state(params, method, tx)
    for seed in (0, 1):
        current, metrics = steps.train_step(current, make_batch(seed), method=method)
        assert metrics["gradient_norm"][0] == 0
    # p(1 - 0.5·1.5·0.125) = 0.90625 p. Then d = 0.125·0.90625 p, velocity 0.0625 p + d, and
    # p falls by 0.5·cos(7π/32)·(d + velocity / 2).
    d = 0.125 * 0.90625
    factor = 0.90625 - 0.5 * 0.7730104533627370 * (d + 0.5 * (0.5 * 0.125 + d))

    def expected(path, p):
        return factor * p if path[-1].key == "kernel" else p

    assert_trees_close(current.params, jax.tree_util.tree_map_with_path(expected, params))


def test_shards_of_a_batch_add_up_to_the_batch():
    """Two devices, simulated by vmap: sums, order of rows, each device's own assignments."""
    params, batch = make_params(3), make_batch()

    def one_matrix(variables, images, train, mutable):  # tests of the backbones check BatchNorm
        x = jnp.rint(images.astype(jnp.float64) * 255).reshape(len(images), -1) / 255 - 0.5
        return x @ variables["params"]["stem"]["kernel"], {"batch_stats": variables["batch_stats"]}

    weak = (batch.images[:, 1 : 1 + MU].reshape(MU * B, 12) / 255 - 0.5) @ np.array(
        params["backbone"]["stem"]["kernel"]
    )
    assert_informative(softmax(np.array(logits_of(params["classifier"], weak))))
    method = make_method(params, "layermatch", avg_clustering__centers="features")
    method = method._replace(policy=toy_policy("strong", optax.softmax_cross_entropy))
    seen = {"centers": jnp.array(np.random.RandomState(3).randn(K, D)), "updates": jnp.ones(K, int)}
    start = make_state(params, method, apply_fn=one_matrix).replace(centers=seen)
    whole = steps.train_step(start, batch, method=method)
    shards = jax.tree.map(lambda x: x.reshape(2, B // 2, *x.shape[1:]), batch)
    step = functools.partial(steps.train_step, method=method, axis_name="batch")
    both = jax.jit(jax.vmap(step, in_axes=(None, 0), axis_name="batch"))(start, shards)
    for device in (0, 1):
        own = jax.tree.map(lambda x, i=device: np.array(x)[i], both)
        assert_trees_close(own, whole, rtol=1e-6, atol=1e-12)


def test_evaluation_skips_padding_and_uses_the_live_statistics():
    params, averaged = make_params(), make_params(1)
    method = make_method(params)
    rng = np.random.RandomState(0)
    live = {"mean": jnp.array(rng.randn(D)), "var": jnp.array(rng.rand(D) + 0.5)}
    start = make_state(params, method).replace(ema_params=averaged, batch_stats=live)
    images = rng.randint(0, 256, (6, 2, 2, 3)).astype(np.uint8)
    padding = backbone(
        {"params": params["backbone"], "batch_stats": live}, images[4:] / 255, train=False
    )
    # Padding with correct labels would change the metrics, if it counted.
    hit = np.argmax(logits_of(params["classifier"], padding), axis=1)
    batch = EvalBatch(
        images=images,
        labels=np.array([0, 1, 2, 0, *hit], np.int32),
        mask=np.array([1, 1, 1, 1, 0, 0], np.float32),
    )
    metrics = jax.jit(functools.partial(steps.eval_step, method=method))(start, batch)
    for suffix, p in (("", params), ("_ema", averaged)):
        features = backbone(
            {"params": p["backbone"], "batch_stats": live}, batch.images[:4] / 255, train=False
        )
        q = softmax(np.array(logits_of(p["classifier"], features)))
        hits = (q.argmax(axis=1) == batch.labels[:4]).sum()
        loss = -np.log(q[np.arange(4), batch.labels[:4]]).sum()
        np.testing.assert_allclose(metrics["accuracy" + suffix], [hits, 4])
        np.testing.assert_allclose(metrics["loss" + suffix], [loss, 4], rtol=1e-6)


def test_rows_go_by_labeled_image():
    rows = Layout(Views(), mu=2).split(jnp.arange(10).reshape(2, 5))
    np.testing.assert_array_equal(rows.labeled["weak"], [0, 5])
    np.testing.assert_array_equal(rows.unlabeled["weak"], [1, 2, 6, 7])
    np.testing.assert_array_equal(rows.unlabeled["strong"], [3, 4, 8, 9])


def test_images_are_normalized_by_channel():
    method = make_method(make_params())._replace(mean=(0.5, 0.25, 0.0), std=(0.25, 0.5, 2.0))
    images = np.array([[[[0, 0, 0], [255, 255, 255], [51, 102, 204]]]], np.uint8)
    expected = [[[[-2, -0.5, 0], [2, 1.5, 0.5], [-1.2, 0.3, 0.4]]]]
    actual = backprop.normalize(jnp.array(images), method.mean, method.std)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_cosine():
    a, b = {"x": jnp.array([3.0, 0.0]), "y": jnp.array(4.0)}, {"x": jnp.array([1.0, 5.0]), "y": 0.0}
    np.testing.assert_allclose(steps.cosine(a, b), (3 / (5 * 26**0.5), 1))
    np.testing.assert_allclose(steps.cosine(a, jax.tree.map(lambda x: -2 * x, a)), (-1, 1))
    assert steps.cosine(a, jax.tree.map(lambda x: 0 * x, a)) == (0, 0)
