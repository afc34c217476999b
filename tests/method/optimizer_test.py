"""Compares the schedule with literal numbers and the update with a loop in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from layermatch_jax import config as config_lib
from layermatch_jax.method import optimizer


def make_config(train_steps=2**20, **fields):
    config = config_lib.base()
    config.train_steps = train_steps
    config.optimizer.update(fields)
    return config


@pytest.mark.parametrize("train_steps", [2**20, 1000])
@pytest.mark.parametrize(
    ("part", "factor"),
    [(0, 1.0), (0.25, 0.941544065), (0.5, 0.773010453), (1, 0.195090322)],  # cos(7π/16 · part)
)
def test_schedule(train_steps, part, factor):
    rate = optimizer.learning_rate(make_config(train_steps))(jnp.int32(part * train_steps))
    np.testing.assert_allclose(rate, 0.03 * factor, rtol=2e-6)
    rate = optimizer.learning_rate(make_config(train_steps, learning_rate=0.2))(
        jnp.int32(part * train_steps)
    )
    np.testing.assert_allclose(rate, 0.2 * factor, rtol=2e-6)


def test_decay_acts_on_kernels_only():
    params = {
        "backbone": {
            "stem": {"kernel": 0.0},
            "stage1_block0": {"norm1": {"scale": 0.0, "bias": 0.0}, "conv1": {"kernel": 0.0}},
        },
        "classifier": {"kernel": 0.0, "bias": 0.0},
    }
    assert optimizer.decayed(params) == {
        "backbone": {
            "stem": {"kernel": True},
            "stage1_block0": {"norm1": {"scale": False, "bias": False}, "conv1": {"kernel": True}},
        },
        "classifier": {"kernel": True, "bias": False},
    }


def run(config, params, gradients):
    """Returns the parameters after every update."""
    tx = optimizer.create(config)
    opt_state = tx.init(params)
    for gradient in gradients:
        updates, opt_state = tx.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        yield params


@pytest.mark.parametrize(
    ("nesterov", "kernel", "bias"),
    [
        # d = 2 + 0.1·1 = 2.1, velocity 2.1, 1 − 0.1·(2.1 + 0.9·2.1); the bias does not decay
        (True, 0.601, 0.62),
        (False, 0.79, 0.8),
    ],
)
def test_the_first_update_by_hand(nesterov, kernel, bias):
    config = make_config(learning_rate=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    params, gradient = ({"kernel": jnp.array(x), "bias": jnp.array(x)} for x in (1.0, 2.0))
    (after,) = run(config, params, [gradient])
    np.testing.assert_allclose(after["kernel"], kernel, rtol=1e-6)
    np.testing.assert_allclose(after["bias"], bias, rtol=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
def test_four_updates_equal_a_numpy_loop(nesterov):
    """PyTorch's SGD: d = g + λp; v = μv + d; p −= lr·(d + μv), or lr·v without Nesterov."""
    with jax.enable_x64(True):
        rng = np.random.RandomState(0)
        shapes = {"kernel": (2, 3), "bias": (3,), "scale": (2,)}
        expected = {name: rng.randn(*shape) for name, shape in shapes.items()}
        gradients = [{name: rng.randn(*shape) for name, shape in shapes.items()} for _ in range(3)]
        gradients.append({name: np.zeros(shape) for name, shape in shapes.items()})
        config = make_config(
            4, learning_rate=0.3, momentum=0.8, nesterov=nesterov, weight_decay=0.05
        )
        factors = [1.0, 0.9415440651830208, 0.7730104533627370, 0.5141027441932217]
        start = jax.tree.map(jnp.array, expected)
        velocity = dict.fromkeys(shapes, 0.0)
        before = start
        for actual, gradient, factor in zip(
            run(config, start, gradients), gradients, factors, strict=True
        ):
            for name in shapes:
                d = gradient[name] + (0.05 * expected[name] if name == "kernel" else 0.0)
                velocity[name] = 0.8 * velocity[name] + d
                step = d + 0.8 * velocity[name] if nesterov else velocity[name]
                expected[name] = expected[name] - 0.3 * factor * step
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-12), actual, expected
            )
            # The last gradient is 0, but momentum and decay still change the parameters.
            for name in shapes:
                assert np.abs(actual[name] - before[name]).min() > 1e-3
            before = actual


# ---- AdamW, warm-up, cosine, and rates by layer ----


@pytest.mark.parametrize(
    ("step", "factor"),
    # (1 + cos(π · step / 100)) / 2 · min(1, (step + 1) / 10)
    [(0, 0.1), (4, 0.996057351 * 0.5), (25, 0.853553391), (50, 0.5), (100, 0.0)],
)
def test_cosine_with_warm_up(step, factor):
    rate = optimizer.learning_rate(make_config(100, schedule="cosine", warm_up=10))
    np.testing.assert_allclose(rate(jnp.int32(step)), 0.03 * factor, rtol=2e-6, atol=1e-9)


LAYERS = {
    "backbone": {
        "stage2_block0": {"conv1": {"kernel": 1.0}},
        "final_norm": {"scale": 1.0},
        "stem": {"kernel": 1.0},
        "stage1_block10": {"conv1": {"kernel": 1.0}},
        "stage1_block9": {"norm1": {"bias": 1.0}},
    },
    "classifier": {"kernel": 1.0, "bias": 1.0},
    "heads": {"projection": {"kernel": 1.0}},
}


def test_rates_fall_from_the_last_block_to_the_stem():
    # Four layers: stem, stage1_block9, stage1_block10, stage2_block0.
    assert optimizer.rates(LAYERS, layer_decay=0.5, backbone_rate=0.8) == {
        "backbone": {
            "stage2_block0": {"conv1": {"kernel": 0.4}},
            "final_norm": {"scale": 0.8},
            "stem": {"kernel": 0.05},
            "stage1_block10": {"conv1": {"kernel": 0.2}},
            "stage1_block9": {"norm1": {"bias": 0.1}},
        },
        "classifier": {"kernel": 1.0, "bias": 1.0},
        "heads": {"projection": {"kernel": 1.0}},
    }


def test_adamw_with_rates_by_layer_against_numpy():
    config = make_config(
        100, name="adamw", schedule="cosine", learning_rate=0.1, momentum=0.8, b2=0.9,
        weight_decay=0.5, layer_decay=0.5, warm_up=2,
    )  # fmt: skip
    config.model.freeze = "backbone/stage1_block9/.*"
    params = jax.tree.map(lambda x: jnp.array([x, 2.0]), LAYERS)
    gradients = [np.array([0.3, -2.0]), np.array([1.0, 0.1]), np.array([-0.5, 0.4])]

    def numpy_adamw(share, decay):
        p, m, v = np.array([1.0, 2.0]), np.zeros(2), np.zeros(2)
        for k, g in enumerate(gradients):
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            mean, square = m / (1 - 0.8 ** (k + 1)), v / (1 - 0.9 ** (k + 1))
            rate = 0.1 * (1 + np.cos(np.pi * k / 100)) / 2 * min(1, (k + 1) / 2)
            p = p - share * rate * (mean / (np.sqrt(square) + 1e-8) + decay * p)
        return p

    trees = [jax.tree.map(lambda _, g=g: jnp.array(g), LAYERS) for g in gradients]
    *_, last = run(config, params, trees)
    for found, share, decay in (
        (last["backbone"]["stem"]["kernel"], 1 / 16, 0.5),
        (last["backbone"]["stage2_block0"]["conv1"]["kernel"], 1 / 2, 0.5),
        (last["backbone"]["final_norm"]["scale"], 1, 0),
        (last["classifier"]["kernel"], 1, 0.5),
        (last["classifier"]["bias"], 1, 0),
    ):
        np.testing.assert_allclose(found, numpy_adamw(share, decay), rtol=1e-5)


def test_frozen_parameters_do_not_decay():
    config = make_config(100, weight_decay=0.5)
    config.model.freeze = "backbone/stem/.*"
    still = jax.tree.map(jnp.zeros_like, jax.tree.map(jnp.float32, LAYERS))
    *_, last = run(config, jax.tree.map(jnp.float32, LAYERS), [still])
    assert last["backbone"]["stem"]["kernel"] == 1
    assert last["classifier"]["kernel"] < 1
