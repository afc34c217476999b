"""Compares the metrics of a train step with the method's equations, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import (
    MU,
    THRESHOLD,
    B,
    K,
    assert_informative,
    logits_of,
    make_batch,
    make_method,
    make_params,
    make_state,
    views,
)
from full_policy import toy_policy, toy_terms
from objectives import (
    cross_entropy,
    one_hot,
    pseudo_labels,
    supervised_loss,
    weak_probabilities,
    without_labels,
)

from layermatch_jax.method import policies, steps

pytestmark = pytest.mark.usefixtures("float64")


def test_metrics_are_sums_and_weights():
    params, batch = make_params(), make_batch()
    method = make_method(
        params, "grad_relu", unsupervised_weight=3.0, optimizer__learning_rate=0.25
    )
    method = method._replace(policy=toy_policy("strong", optax.softmax_cross_entropy))
    probabilities = np.array(weak_probabilities(params, batch))
    assert_informative(probabilities)
    confidence, indices = probabilities.max(axis=1), batch.unlabeled_indices.reshape(-1)
    weights = np.where(confidence >= THRESHOLD, confidence + 0.01 * indices, 0.0)
    # In turn: a correct pseudo-label, a wrong one, an unknown true label.
    kind, pseudo = np.arange(MU * B) % 3, probabilities.argmax(axis=1)
    truth = np.select([kind == 0, kind == 1], [pseudo, (pseudo + 1) % K], -1).astype(np.int32)
    known, correct = kind != 2, kind == 0
    assert 0 < weights @ correct < weights @ known < weights.sum()
    batch = batch._replace(true_labels=truth.reshape(B, MU))
    new, metrics = steps.train_step(make_state(params, method), batch, method=method)

    terms = toy_terms(params, batch, "strong", cross_entropy)
    of_labels, of_pseudo_labels = (
        jax.grad(lambda p, pick=pick: pick(toy_terms(p, batch, "strong", cross_entropy)))(params)
        for pick in (lambda t: t.supervised, lambda t: t.unsupervised + t.regularizer)
    )
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    a, b = flat(of_labels["classifier"]), flat(of_pseudo_labels["classifier"])
    backbone_gradient = flat(of_labels["backbone"]) + 1.5 * flat(of_pseudo_labels["backbone"])
    _, _, strong = views(params["backbone"], batch)
    regularizer = 0.05 * np.sum(np.log(np.cosh(logits_of(params["classifier"], strong))))
    of_class = np.eye(K)[pseudo]
    mean = 0.3 + 0.1 * probabilities.mean(axis=0)
    expected = {
        # λ_u · scale = 3 · 0.5
        "loss": (terms.supervised + 1.5 * (terms.unsupervised + regularizer), 1),
        "loss_supervised": (terms.supervised, 1),
        "loss_unsupervised": (terms.unsupervised, 1),
        "loss_regularizer": (regularizer, 1),
        "learning_rate": (0.25, 1),
        "mask_rate": (weights.sum(), MU * B),
        "pseudo_label_accuracy": (weights @ correct, weights @ known),
        "pseudo_label_accuracy_all": (correct.sum(), known.sum()),
        "classifier_gradient_cosine": (a @ b / np.linalg.norm(a) / np.linalg.norm(b), 1),
        "gradient_norm": (np.linalg.norm(np.concatenate([backbone_gradient, a])), 1),
        "parameter_norm": (np.linalg.norm(flat(new.params)), 1),
        "class_acceptance": (weights @ of_class, of_class.sum(axis=0)),
        "class_pseudo_labels": ((weights * known) @ of_class, np.ones(K)),
        "class_truths": ([np.sum(truth == k) for k in range(K)], np.ones(K)),
        "first_class": (mean[0], 1),
        "mean": (mean, np.ones(K)),
    }
    assert metrics.keys() == expected.keys()
    for name, pair in expected.items():
        np.testing.assert_allclose(metrics[name], pair, rtol=1e-6, err_msg=name)


def test_a_step_without_accepted_pseudo_labels_has_no_cosine():
    params, batch = make_params(), make_batch()
    weights = {}
    for threshold in (THRESHOLD, 2.0):  # the last one accepts no pseudo-label
        method = make_method(params, policy__threshold=threshold)
        _, metrics = steps.train_step(make_state(params, method), batch, method=method)
        total, weights[threshold] = metrics["classifier_gradient_cosine"]
        assert (total != 0) == (threshold == THRESHOLD)
    assert weights == {THRESHOLD: 1, 2.0: 0}
    assert metrics["loss_unsupervised"][1] == 1  # a mean over all rows, so it is 0


def test_without_labeled_rows_there_is_no_supervised_loss():
    params, batch = make_params(), make_batch()
    method = without_labels(make_method(params))
    _, metrics = steps.train_step(make_state(params, method), batch, method=method)
    assert metrics["loss_supervised"][1] == 0
    assert metrics["classifier_gradient_cosine"][1] == 0
    assert metrics["loss"][1] == 1


def test_supervised_training_knows_nothing_of_pseudo_labels():
    params = make_params()
    method = make_method(params, "supervised")
    state = make_state(params, method)
    _, metrics = steps.train_step(state, make_batch(mu=0), method=method)
    known = {name for name, (_, weight) in metrics.items() if np.any(weight > 0)}
    assert known == {"loss", "loss_supervised", "learning_rate", "gradient_norm", "parameter_norm"}


def test_pseudo_labels_of_each_class_are_counted_beside_the_truths():
    # True class -> pseudo-label: 0 -> 0; 2 -> 0; 1 -> 1 with weight ½; 1 -> 2 with weight 0;
    # unknown -> 2.
    assignment = policies.Assignment(
        targets=one_hot(jnp.array([0, 0, 1, 2, 2])),
        weights=jnp.array([1.0, 1.0, 0.5, 0.0, 1.0]),
        **dict.fromkeys(policies.Assignment._fields[2:]),
    )
    metrics = steps._pseudo_label_metrics(assignment, jnp.array([0, 2, 1, 1, -1]))
    np.testing.assert_allclose(metrics["class_pseudo_labels"][0], [2, 0.5, 0])
    np.testing.assert_allclose(metrics["class_truths"][0], [1, 2, 1])
    np.testing.assert_allclose(metrics["class_acceptance"][0], [2, 0.5, 1])
    np.testing.assert_allclose(metrics["class_acceptance"][1], [2, 1, 2])
    assert metrics["class_pseudo_labels"][1] == metrics["class_truths"][1] == 1  # a step


def test_losses_are_means_over_all_rows_accepted_or_not():
    params, batch = make_params(), make_batch()
    targets, weights = pseudo_labels(weak_probabilities(params, batch))
    method = make_method(params)
    _, metrics = steps.train_step(make_state(params, method), batch, method=method)
    _, _, strong = views(params["backbone"], batch)
    rows = cross_entropy(logits_of(params["classifier"], strong), targets)
    accepted = [float(loss) for loss, weight in zip(rows, weights, strict=True) if weight]
    np.testing.assert_allclose(metrics["loss_unsupervised"], [sum(accepted) / 12, 1], rtol=1e-6)
    np.testing.assert_allclose(metrics["mask_rate"], [len(accepted), 12])
    np.testing.assert_allclose(
        metrics["loss_supervised"], [supervised_loss(params, batch), 1], rtol=1e-6
    )
