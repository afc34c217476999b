"""Views that pass once through frozen layers, against steps on the same views as images."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs_of_tests import KilledError, assert_same, before_step, die, tiny

from layermatch_jax import models, setup, train
from layermatch_jax.data.augment import device
from layermatch_jax.errors import InputError
from layermatch_jax.frozen import cached_views
from layermatch_jax.method import assembly, freezing, steps
from layermatch_jax.views import Layout, Views

FREEZE = "backbone/(stem|stage1_).*"
MEAN_STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def of_cache(method="layermatch", **fields):
    return tiny(method, **({"model.freeze": FREEZE, "input.cache_views": 3} | fields))


def made(images, kinds, config, version, total, sampler, n):
    """Makes one version of all views of the n-th set as pixels: {view: uint8 [N, S, S, 3]}."""
    size = min(config.eval_batch_size, -(-total // 8) * 8)
    layout = Layout(Views(labeled=kinds, unlabeled={}), 0)
    sampler = dataclasses.replace(
        sampler,
        num_labeled=size,
        num_unlabeled=1,
        batch_size=size,
        layout=layout,
        policy_draws=None,
    )
    blocks, parts = -(-total // size), []
    views_of = jax.jit(functools.partial(device.make_batch, layout=layout, padding=1, image_size=8))
    for block in range(blocks):
        positions = np.arange(block * size, min(block * size + size, total))
        step = 2**40 * (n + 1) + version * blocks + block
        draws = sampler.draw(step)._replace(labeled=np.arange(size, dtype=np.int32), policy=())
        draws = jax.tree.map(jnp.asarray, draws)
        pixels = np.zeros((size, 8, 8, 3), np.uint8)
        pixels[: len(positions)] = images.read(positions)
        pixels, none = jnp.array(pixels), jnp.zeros(size, jnp.int32)
        data = device.ResidentData(pixels, none, pixels[:1], none)
        parts.append(views_of(data, draws).images[: len(positions)])
    whole = np.concatenate(parts)
    return {name: whole[:, v] for v, name in enumerate(kinds)}


def test_a_step_is_that_on_the_same_views_as_images():
    config = of_cache(parallelism="jit")
    data = setup.load(config, MEAN_STD)
    prepared = setup.prepare(config, data)
    state, partition = prepared.initial, data.partition
    sampler = setup.create_sampler(config, partition)
    resident = cached_views.fill(config, partition, sampler, state, MEAN_STD)
    _, chunk = next(data.feed.chunks(range(5, 6)))
    draws = jax.tree.map(lambda x: x[:, 0], chunk)
    batch = data.feed.batch(resident, draws)
    assert batch.images.dtype == np.float32
    assert len(np.unique(draws.version)) == 3

    # The same views as pixels, version by version.
    layout = sampler.layout
    versions = [
        (
            made(partition.labeled, layout.views.labeled, config, v, 20, sampler, 0),
            made(partition.unlabeled, layout.views.unlabeled, config, v, 400, sampler, 1),
        )
        for v in range(3)
    ]
    rows = []
    for row in range(config.batch_size):
        views = [versions[draws.version[row, 0]][0]["weak"][draws.labeled[row]]]
        for name in ("weak", "strong"):
            where = layout.unlabeled(name)
            for i, v in enumerate(range(where.start, where.stop)):
                of_version = versions[draws.version[row, v]][1]
                views.append(of_version[name][draws.unlabeled[row, i]])
        rows.append(np.stack(views))
    as_pixels = batch._replace(images=np.stack(rows))
    assert not (as_pixels.images[:, 1] == as_pixels.images[:, 3]).all()  # weak and strong differ

    def step(state, batch, method):
        return jax.jit(functools.partial(steps.train_step, method=method))(state, batch)

    cached, _ = step(state, batch, prepared.method)
    usual = assembly.create_method(config, state.params, MEAN_STD)._replace(after="")
    whole, _ = step(state, as_pixels, usual)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        (cached.params, cached.batch_stats, cached.policy),
        (whole.params, whole.batch_stats, whole.policy),
    )
    assert (
        np.abs(cached.params["classifier"]["kernel"] - state.params["classifier"]["kernel"]).max()
        > 0
    )


@pytest.mark.parametrize(
    "name",
    [
        "conv4",
        pytest.param("efficientnet_lite0", marks=pytest.mark.slow),
        pytest.param("resnet50", marks=pytest.mark.slow),
        pytest.param("wide_resnet", marks=pytest.mark.slow),
    ],
)
def test_two_parts_are_the_whole_backbone(name):
    config = tiny(**{"model.name": name, "model.depth": 10})
    backbone = models.create_model(config.model)
    images = np.random.RandomState(0).rand(2, 16, 16, 3).astype(np.float32)
    variables = jax.jit(lambda: backbone.init(jax.random.key(0), images, train=False))()
    apply = jax.jit(backbone.apply, static_argnames=("train", "after", "until"))
    whole = apply(variables, images, train=False)
    names = freezing.in_order(variables["params"])
    assert names[0] == "stem"
    for name in (names[0], names[len(names) // 2], names[-1]):
        front = apply(variables, images, train=False, until=name)
        back = apply(variables, front, train=False, after=name)
        np.testing.assert_allclose(back, whole, rtol=1e-5, atol=1e-6)
    assert front.ndim == 4


def test_a_run_repeats_and_resumes_bit_for_bit(tmp_path, monkeypatch, capsys):
    config = of_cache()
    train.train_and_evaluate(config, str(tmp_path / "whole"))
    told = capsys.readouterr().err
    # 3 versions of 20 · 1 + 400 · 2 views, [2, 2, 8] float32 behind stage 1
    assert "2,460 views pass once through the frozen layers, up to stage1_block0: 0 MB" in told
    with monkeypatch.context() as patched:
        before_step(patched, 6, die, cached_views)
        with pytest.raises(KilledError):
            train.train_and_evaluate(config, str(tmp_path / "cut"))
    train.train_and_evaluate(config, str(tmp_path / "cut"))
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_devices_and_supervised_training(tmp_path):
    results = [
        train.train_and_evaluate(of_cache("supervised", parallelism=p), str(tmp_path / p))
        for p in ("pmap", "jit")
    ]
    assert results[0]["test_accuracy"]["raw"] == results[1]["test_accuracy"]["raw"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.freeze": ""}, "does not freeze the first layer, the stem"),
        ({"model.freeze": "backbone/stage1_.*"}, "does not freeze the first layer, the stem"),
        ({"layer_report.at_steps": (4,)}, "excludes --config.layer_report.at_steps"),
        ({"model.name": "linear"}, "cannot be divided"),
    ],
)
def test_settings_that_are_refused(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        train.train_and_evaluate(of_cache(**fields), str(tmp_path))


def test_vat_is_refused(tmp_path):
    with pytest.raises(InputError, match="excludes :method=vat"):
        train.train_and_evaluate(of_cache("vat"), str(tmp_path))


def test_frozen_layers_are_the_first_ones():
    params = {
        "backbone": {
            "stem": {"conv": 0.0}, "stage1_block0": {"conv": 0.0, "norm": 0.0},
            "stage1_block10": {"conv": 0.0}, "stage1_block9": {"conv": 0.0},
            "final_norm": {"scale": 0.0},
        },
        "classifier": {"bias": 0.0},
    }  # fmt: skip
    for expression, last in (
        ("backbone/stem/.*", "stem"),
        ("backbone/(stem|stage1_block0)/conv", "stem"),  # norm is not frozen
        ("backbone/(stem|stage1_block[0-9]/).*", "stage1_block9"),
        ("backbone/(stem|stage1_block0|final).*", "stage1_block0"),
        ("backbone/.*", "final_norm"),
    ):
        assert freezing.last_frozen_layer(expression, params) == last
