"""Tests pseudo-label policies on small cases computed by hand."""

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes

from layermatch_jax import automatic, presets
from layermatch_jax import config as config_lib
from layermatch_jax.method import policies


def make_policy(name="fixed_threshold", **fields):
    config = config_lib.base()
    config.policy.name = name
    config.policy.update(fields)
    return policies.create(automatic.resolve(config))


def make_inputs(weak_logits, num_labeled=2):
    weak_logits = jnp.array(weak_logits, jnp.float32)
    rows, num_classes = weak_logits.shape
    return builders.make_inputs(
        weak=weak_logits,
        strong=weak_logits[::-1],
        labeled=jnp.zeros((num_labeled, num_classes)),
        labels=jnp.arange(num_labeled, dtype=jnp.int32) % num_classes,
        indices=jnp.arange(rows, dtype=jnp.int32),
        teacher=-weak_logits,
    )


@pytest.mark.parametrize("name", policies.POLICIES)
def test_every_policy_answers_in_the_shapes_of_the_interface(name):
    rows, labeled, num_classes = 12, 4, 3
    policy = make_policy(name)
    state = policy.init(builders.make_spec(num_classes, rows))
    inputs = builders.make_inputs_of(policy)
    assignment = jax.jit(policy.assign)(state, inputs)
    shapes.check(inputs, inputs.outputs, assignment)
    assert assignment.targets.shape == (rows, num_classes)
    assert assignment.labeled_weights.shape == (labeled,)
    np.testing.assert_allclose(jnp.sum(assignment.targets, axis=1), 1, rtol=1e-6)
    spec = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)  # noqa: E731
    assert spec(assignment.state) == spec(state)
    assert all(
        jnp.shape(value) in ((), (num_classes,)) for value in assignment.diagnostics.values()
    )
    terms = policy.loss(inputs.outputs, assignment)
    assert "unsupervised" in terms
    assert all((term.shape, term.dtype) == ((), jnp.float32) for term in terms.values())


# Logits of four rows of probabilities.
CONFIDENT = np.log([[0.7, 0.2, 0.1], [0.25, 0.4, 0.35], [0.02, 0.02, 0.96], [0.05, 0.9, 0.05]])


@pytest.mark.parametrize(
    ("threshold", "weights"),
    [
        (0.95, [0, 0, 1, 0]),
        (0.6, [1, 0, 1, 1]),
        (0.8, [0, 0, 1, 1]),
        (0.0, [1, 1, 1, 1]),
        (1.0, [0, 0, 0, 0]),
    ],
)
def test_fixed_threshold(threshold, weights):
    policy = make_policy(threshold=threshold)
    # A constant added to the logits of a row changes nothing.
    assignment = policy.assign(
        (), make_inputs(CONFIDENT + np.array([[0.0], [3.0], [-5.0], [40.0]]))
    )
    np.testing.assert_array_equal(assignment.targets, [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]])
    np.testing.assert_array_equal(assignment.weights, weights)
    np.testing.assert_array_equal(assignment.labeled_weights, [1, 1])
    assert assignment.scale == 1
    assert assignment.state == policy.init(builders.make_spec()) == ()
    np.testing.assert_allclose(
        assignment.diagnostics["class_threshold"], [threshold] * 3, rtol=1e-6
    )


def test_fixed_threshold_takes_cross_entropy_on_the_strong_view():
    policy, inputs = make_policy(threshold=0.6), make_inputs(CONFIDENT)
    terms = policy.loss(inputs.outputs, policy.assign((), inputs))
    # Rows 0, 2 and 3 pass, with classes 0, 2 and 1; their strong views are rows 3, 1 and 0.
    expected = -(np.log(0.05) + np.log(0.35) + np.log(0.2)) / 4
    assert terms.keys() == {"unsupervised"}
    np.testing.assert_allclose(terms["unsupervised"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("logits", "threshold", "weight"),
    [
        ([2.0, 2.0], 0.5, 1),  # the confidence is the threshold: accepted
        ([2.0, 2.0], np.nextafter(np.float32(0.5), np.float32(1)).item(), 0),
        ([1.0, 1.0, 1.0, 1.0], 0.25, 1),
        ([200.0, 0.0], 1.0, 1),  # a confidence that is rounded to 1
    ],
)
def test_a_tie_with_the_threshold_is_accepted_and_the_first_class_wins_a_tie(
    logits, threshold, weight
):
    assignment = make_policy(threshold=threshold).assign((), make_inputs([logits]))
    np.testing.assert_array_equal(assignment.weights, [weight])
    np.testing.assert_array_equal(assignment.targets, np.eye(len(logits))[:1])


def test_the_names_that_config_knows():
    assert tuple(sorted(policies.POLICIES)) == tuple(policies.POLICIES)


def test_the_presets_of_the_field():
    made = {
        m: automatic.resolve(presets.apply_method(config_lib.base(), m)) for m in presets.METHODS
    }
    for method in ("fixmatch", "grad_relu", "avg_clustering", "layermatch"):
        settings = made[method].policy
        assert (settings.name, settings.threshold) == ("fixed_threshold", 0.95)
    for method in set(policies.POLICIES) - {"fixed_threshold"}:
        assert made[method].policy.name == method
    assert made["uda"].policy.threshold == 0.8
    assert made["mean_teacher"].unsupervised_weight == 50
    assert (made["pi_model"].unsupervised_weight, made["pi_model"].unlabeled_ratio) == (10, 1)
    assert (made["vat"].unsupervised_weight, made["vat"].unlabeled_ratio) == (0.3, 1)
    others = [c for m, c in made.items() if m not in ("mean_teacher", "pi_model", "vat")]
    assert {c.unsupervised_weight for c in others} == {0, 1}
    assert {c.unlabeled_ratio for c in others} == {7}
