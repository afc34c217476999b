"""Tests that every field of an assignment affects the gradient of a train step, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import (
    K,
    assert_informative,
    gradients,
    logits_of,
    make_batch,
    make_classifier,
    make_method,
    make_params,
    make_state,
)
from full_policy import toy_policy, toy_terms
from objectives import assert_trees_close, cross_entropy, weak_probabilities

from layermatch_jax.method import losses, steps

pytestmark = pytest.mark.usefixtures("float64")


def squared_error(logits, targets):
    return jnp.sum((jax.nn.softmax(logits) - targets) ** 2, axis=1) / K


def test_every_part_of_an_assignment_reaches_the_gradient():
    @jax.jit
    @jax.grad
    def gradient(params, batch, scale):
        terms = toy_terms(params, batch, "weak", squared_error)
        return terms.supervised + 2.0 * scale * (terms.unsupervised + terms.regularizer)

    params = make_params()
    method = make_method(params, "fixmatch", unsupervised_weight=2.0)
    method = method._replace(policy=toy_policy("weak", losses.squared_error))
    current, mean = make_state(params, method), np.full(K, 1 / 3)
    for seed, scale in ((0, 0.5), (1, 0.75)):  # the second step uses the state of the first
        params, batch = current.params, make_batch(seed)
        probabilities = np.array(weak_probabilities(params, batch))
        assert_informative(probabilities)
        expected = gradient(params, batch, scale)
        current, metrics = steps.train_step(current, batch, method=method)
        assert_trees_close(current.opt_state, expected)
        mean = 0.9 * mean + 0.1 * probabilities.mean(axis=0)
        np.testing.assert_allclose(current.policy["mean"], mean, rtol=1e-12)
        np.testing.assert_allclose(metrics["first_class"], [mean[0], 1], rtol=1e-6)
    assert current.policy["calls"] == 2


def test_every_part_of_an_assignment_is_gated_and_seen_through_the_centers():
    params, batch, averaged = make_params(), make_batch(), make_classifier(9)
    assert_informative(weak_probabilities(params, batch, averaged))
    method = make_method(
        params,
        layerwise__gradient_mask=(("classifier/.*", 0.25),),
        avg_clustering__centers="classifier",
        avg_clustering__target_head="centers",
    )
    method = method._replace(policy=toy_policy("strong", optax.softmax_cross_entropy))
    through_centers = lambda classifier, features: logits_of(averaged, features)  # noqa: E731

    def objective(trained):
        terms = functools.partial(
            toy_terms, batch=batch, view="strong", loss=cross_entropy, target_head=averaged
        )
        features = terms(trained, head=through_centers, constants=params)
        # The mask of the classifier: on constant features, the same value, ¼ of the gradient.
        gated = jax.tree.map(lambda p: 0.25 * p + 0.75 * jax.lax.stop_gradient(p), trained)
        gated = {"backbone": params["backbone"], "classifier": gated["classifier"]}
        classifier = terms(gated, head=logits_of, constants=params)
        return features.supervised + 0.5 * sum([*features[1:], *classifier[1:]])

    assert_trees_close(gradients(method, params, batch, averaged), jax.grad(objective)(params))
