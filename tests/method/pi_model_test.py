"""Compares the Π-model with its formula (Laine and Aila 2017, as in USB) in NumPy float64."""

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comatch_test import finite_differences
from oracles import softmax

from layermatch_jax import automatic, presets
from layermatch_jax.method import policies

B, MU, STEPS = 4, 2, 20
ROWS = B * MU


def make(ramp=0.4):
    config = builders.make_config("pi_model", policy__ramp=ramp, train_steps=STEPS)
    return policies.create(config)


def draw(rng, K):
    """Makes Inputs with random logits for every view."""
    views = {name: 3 * rng.normal(size=(ROWS, K)) for name in ("weak", "second_weak")}
    return {name: x.astype(np.float32) for name, x in views.items()}


def inputs_of(logits, K):
    decoy = {name: x[::-1] for name, x in logits.items()}  # not the logits that the loss takes
    return policies.Inputs(
        target_logits=logits,
        outputs=policies.Outputs(decoy, {}),
        labeled_logits={"weak": np.zeros((B, K), np.float32)},
        labels=np.arange(B, dtype=np.int32) % K,
        labeled_indices=np.arange(B, dtype=np.int32),
        unlabeled_indices=np.arange(ROWS, dtype=np.int32),
    )


def loss(second, target):
    """Computes the loss, a mean over rows and classes."""
    return ((softmax(second) - softmax(target)) ** 2).mean()


def test_what_it_asks_of_the_step():
    policy = make()
    assert dict(policy.views.labeled) == {"weak": "weak"}
    assert dict(policy.views.unlabeled) == {"weak": "weak", "second_weak": "weak"}
    assert (policy.target_view, policy.needs_teacher) == ("weak", False)
    assert (policy.draws, dict(policy.heads), policy.pseudo_labels) == (None, {}, False)
    config = automatic.resolve(presets.apply_method(builders.config_lib.base(), "pi_model"))
    assert (config.unsupervised_weight, config.unlabeled_ratio, config.policy.ramp) == (10, 1, 0.4)


@pytest.mark.parametrize(("ramp", "K"), [(0.4, 10), (0.25, 100), (0.0, 2)])
def test_follows_its_formula_over_many_steps(ramp, K):
    policy, rng = make(ramp), np.random.default_rng(0)
    state = policy.init(builders.make_spec(K))

    @jax.jit
    def step(state, logits):
        assignment = policy.assign(state, inputs_of(logits, K))
        return assignment, policy.loss(policies.Outputs(logits, {}), assignment)

    for count in range(12):
        logits = draw(rng, K)
        assignment, terms = jax.device_get(step(state, logits))
        scale = 1 if ramp == 0 else min(count / (ramp * STEPS), 1)
        np.testing.assert_allclose(assignment.scale, scale, rtol=1e-6)
        np.testing.assert_allclose(
            assignment.targets, softmax(logits["weak"]), rtol=1e-5, atol=1e-7
        )
        np.testing.assert_array_equal(assignment.weights, np.ones(ROWS))
        np.testing.assert_array_equal(assignment.labeled_weights, np.ones(B))
        assert set(terms) == {"unsupervised"}
        expected = loss(logits["second_weak"], logits["weak"])
        np.testing.assert_allclose(terms["unsupervised"], expected, rtol=1e-5)
        state = assignment.state


def test_equal_views_and_sure_rows_cost_what_they_should():
    policy, K = make(), 4
    state = policy.init(builders.make_spec(K))
    sure = {
        "weak": np.float32(1e4 * np.eye(K)[np.zeros(ROWS, int)]),
        "second_weak": np.float32(1e4 * np.eye(K)[np.repeat([0, 1], ROWS // 2)]),
    }
    assignment = policy.assign(state, inputs_of(sure, K))
    value = policy.loss(policies.Outputs(sure, {}), assignment)["unsupervised"]
    assert value == 0.5 * 2 / K  # half of the rows differ, by 1 in two classes
    same = sure | {"second_weak": sure["weak"]}
    assert policy.loss(policies.Outputs(same, {}), assignment)["unsupervised"] == 0


def test_its_gradient_is_that_of_the_formula_and_the_weak_view_is_a_constant():
    policy, K = make(), 5
    logits = draw(np.random.default_rng(1), K)
    with jax.enable_x64(True):
        x = {name: jnp.float64(a) for name, a in logits.items()}

        @jax.jit
        @jax.grad
        def gradient(x):
            constant = jax.tree.map(jax.lax.stop_gradient, x)
            assignment = policy.assign(policy.init(builders.make_spec(K)), inputs_of(constant, K))
            return policy.loss(policies.Outputs(x, {}), assignment)["unsupervised"]

        found = jax.device_get(gradient(x))
    expected = finite_differences(lambda a: loss(a, logits["weak"]), logits["second_weak"])
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found["second_weak"], expected, rtol=2e-6, atol=1e-9)
    np.testing.assert_array_equal(found["weak"], 0)
