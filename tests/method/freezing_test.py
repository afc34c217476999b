"""Frozen parameters, kept BatchNorm statistics, and drop-path in whole train steps."""

import functools

import jax
import numpy as np
import pytest
from runs_of_tests import KilledError, assert_same, before_step, die, tiny

from layermatch_jax import models, setup, train
from layermatch_jax.errors import InputError
from layermatch_jax.method import backprop, freezing
from layermatch_jax.models import vit
from layermatch_jax.runtime import parallel


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A run that the others start from."""
    workdir = tmp_path_factory.mktemp("backbone")
    train.train_and_evaluate(tiny(train_steps=4), str(workdir))
    return str(workdir)


def after_steps(config, count=2):
    """Returns (state before the first step, state after `count` steps), on the host."""
    prepared = setup.prepare(config, setup.load(config))
    state = parallel.replicate(prepared.initial, config.parallelism)
    for _, chunk in prepared.data.feed.chunks(range(count)):
        rows = parallel.place_batch(chunk, config.parallelism)
        state, _ = prepared.train_program(state, prepared.resident, rows)
    return jax.device_get(prepared.initial), jax.device_get(state)


def changed(before, after):
    """Returns the paths of the leaves that are not the same bit for bit."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, x), y in pairs
        if np.asarray(x).tobytes() != np.asarray(y).tobytes()
    }


def leaves(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("optimizer", ["sgd", pytest.param("adamw", marks=pytest.mark.slow)])
def test_frozen_layers_keep_every_bit(optimizer):
    config = tiny(
        **{
            "model.freeze": "backbone/(stem|stage1_).*",
            "optimizer.name": optimizer,
            "optimizer.weight_decay": 0.1,
        }
    )
    before, after = after_steps(config)
    frozen = {
        p for p in leaves(before.params) if p.startswith(("backbone/stem", "backbone/stage1_"))
    }
    assert frozen
    assert changed(before.params, after.params) == leaves(before.params) - frozen
    assert changed(before.ema_params, after.ema_params) == leaves(before.params) - frozen
    still = {p for p in leaves(before.batch_stats) if p.startswith(("stem", "stage1_"))}
    assert still
    assert changed(before.batch_stats, after.batch_stats) == leaves(before.batch_stats) - still


@pytest.mark.slow
def test_a_frozen_classifier():
    before, after = after_steps(tiny(**{"model.freeze": "classifier/.*"}))
    moved = changed(before.params, after.params)
    assert moved == {p for p in leaves(before.params) if not p.startswith("classifier")}


def test_kept_statistics_make_the_features_those_of_an_evaluation(backbone):
    config = tiny(**{"model.pretrained": backbone, "model.batch_stats": "kept"})
    before, after = after_steps(config)
    assert not changed(before.batch_stats, after.batch_stats)
    images = np.random.RandomState(0).rand(5, 8, 8, 3).astype(np.float32)
    variables = {"params": after.params["backbone"], "batch_stats": after.batch_stats}
    in_training, _ = after.apply_fn(variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(in_training, after.apply_fn(variables, images, train=False))
    # With the statistics of the batch they would differ.
    usual = setup.prepare(c := tiny(parallelism="jit"), setup.load(c)).initial.apply_fn
    of_batch, _ = usual(variables, images, train=True, mutable=["batch_stats"])
    assert np.abs(of_batch - in_training).max() > 0.01


RECIPE = {
    "model.freeze": "backbone/stem/.*", "model.batch_stats": "kept", "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-3, "optimizer.layer_decay": 0.7,
    "optimizer.backbone_rate": 0.3, "optimizer.warm_up": 3, "optimizer.schedule": "cosine",
}  # fmt: skip


def test_devices_do_not_change_a_run_with_frozen_layers_and_adamw(backbone):
    settings = RECIPE | {"model.pretrained": backbone}
    _, pmapped = after_steps(tiny(**settings))
    _, jitted = after_steps(tiny(**settings, parallelism="jit"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
        pmapped.params, jitted.params,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_with_adamw_goes_on_bit_for_bit(backbone, tmp_path, monkeypatch):
    config = tiny(**RECIPE, **{"model.pretrained": backbone})
    train.train_and_evaluate(config, str(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        before_step(patched, 6, die)
        with pytest.raises(KilledError):
            train.train_and_evaluate(config, str(tmp_path / "cut"))
    train.train_and_evaluate(config, str(tmp_path / "cut"))
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_dropped_branches_are_those_of_the_global_batch():
    settings = {
        "width": 64, "patch": 4, "dtype": np.dtype("float32"), "depth": 4, "drop_path": 0.6,
    }  # fmt: skip
    images = np.random.RandomState(0).rand(16, 8, 8, 3).astype(np.float32)
    alone = vit.VisionTransformer(**settings)
    params = alone.init(jax.random.key(0), images, train=False)
    key = backprop.drop_path_key(3, jax.numpy.int32(7))

    def apply(model, rows):
        return model.apply(params, rows, train=True, rngs={"drop_path": key})

    whole = apply(alone, images)
    divided = jax.pmap(
        functools.partial(apply, vit.VisionTransformer(**settings, axis_name="batch")),
        axis_name="batch",
    )(images.reshape(8, 2, 8, 8, 3))
    np.testing.assert_allclose(divided.reshape(whole.shape), whole, rtol=1e-4, atol=1e-5)
    # Some branches of some images are dropped, and each step drops others.
    without = alone.apply(params, images, train=False)
    assert (np.abs(whole - without).max(axis=1) > 1e-3).sum() >= 8
    other = backprop.drop_path_key(3, jax.numpy.int32(8))
    assert (
        np.abs(whole - alone.apply(params, images, train=True, rngs={"drop_path": other})).max()
        > 0.01
    )


def test_the_dropped_branches_depend_on_the_seed_of_the_run(monkeypatch):
    seeds = []

    def recorded(seed, step):
        seeds.append(seed)
        return jax.random.fold_in(jax.random.key(0), step)

    monkeypatch.setattr(backprop, "drop_path_key", recorded)
    model = vit.VisionTransformer(64, 4, np.dtype("float32"), depth=4, drop_path=0.5)
    monkeypatch.setattr(models, "create_model", lambda config, axis_name: model)
    config = tiny(**{"model.name": "vit_s16", "model.drop_path": 0.5, "seed": 5})
    prepared = setup.prepare(config, setup.load(config))
    assert prepared.method.drop_path_seed == 5
    assert set(seeds) == {5}


def test_expressions_that_are_refused():
    params = {"backbone": {"stem": {"kernel": 0.0}}, "classifier": {"bias": 0.0}}
    for expression, message in (
        ("stem", r"stem matches no parameter.*\n.*backbone/stem/kernel"),
        (".*", "freezes all parameters"),
        ("(", "is not a regular expression"),
    ):
        with pytest.raises(InputError, match=message):
            freezing.frozen_parameters(expression, params)
    assert not any(jax.tree.leaves(freezing.frozen_parameters("", params)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.batch_stats": "kept"}, "statistics, but those of random weights mean nothing"),
        ({"model.drop_path": 0.1}, "only transformers"),
    ],
)
def test_settings_that_are_refused(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        train.train_and_evaluate(tiny(**fields), str(tmp_path))
