"""Compares five train steps of Avg-Clustering with a loop in NumPy; special cases; float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import (
    MU,
    NUM_UNLABELED,
    B,
    D,
    K,
    gradients,
    logits_of,
    make_batch,
    make_classifier,
    make_method,
    make_params,
    make_state,
    views,
)
from objectives import (
    GRAD_RELU,
    assert_trees_close,
    pseudo_labels,
    softmax,
    supervised_loss,
    unsupervised_loss,
    weak_probabilities,
    without_labels,
)

from layermatch_jax.method import steps

pytestmark = pytest.mark.usefixtures("float64")


class NumpyNone:
    """A reading in NumPy. Its methods are used before and after the update of the parameters."""

    def __init__(self, classifier):
        self.classifier = jax.tree.map(np.array, classifier)

    def label(self, weak_logits, indices):
        """Returns the probabilities from which pseudo-labels are computed."""
        return softmax(weak_logits)

    def head(self, features):
        """Returns the logits of H; None means that H is the classifier."""

    def pullable(self, targets, weights):
        return targets, weights

    def update(self, step, classifier, batch, features, targets, weights):
        pass

    def state(self):
        return ()


class NumpyClassifier(NumpyNone):
    momentum = 0.2  # reached at step 2: (1 + t) / (10 + t) is 0.1, 0.1818, 0.25

    def head(self, features):
        return logits_of(self.classifier, features)

    def update(self, step, classifier, batch, features, targets, weights):
        m = [0.1, 2 / 11, 0.2, 0.2, 0.2][step]
        for name, new in classifier.items():
            self.classifier[name] = m * self.classifier[name] + (1 - m) * np.array(new)

    def state(self):
        return self.classifier


class NumpyFeatures(NumpyNone):
    momentum = 0.24  # reached at a class's third update

    def __init__(self, classifier):
        self.centers, self.updates = np.zeros((K, D)), np.zeros(K, int)

    def head(self, features):
        norms = np.maximum(np.linalg.norm(self.centers, axis=1, keepdims=True), 1e-300)
        cosine = (
            features / jnp.linalg.norm(features, axis=1, keepdims=True) @ (self.centers / norms).T
        )
        seen = np.tile(self.updates > 0, (len(features), 1))
        return jnp.where(seen, cosine / 0.1, -1e5)  # exp(-1e5) is 0 in the softmax

    def pullable(self, targets, weights):
        return targets, weights * (self.updates[np.argmax(targets, axis=1)] > 0)

    def update(self, step, classifier, batch, features, targets, weights):
        labeled, weak, _ = features
        for k in range(K):
            total, weight = np.zeros(D), 0.0
            for i in range(B):
                if batch.labels[i] == k:
                    total, weight = total + labeled[i], weight + 1.0
            for j in range(MU * B):
                total = total + weights[j] * targets[j, k] * weak[j]
                weight = weight + weights[j] * targets[j, k]
            if weight > 0:
                n = self.updates[k]
                m = min(self.momentum, (1 + n) / (10 + n))
                self.centers[k] = m * self.centers[k] + (1 - m) * total / weight
                self.updates[k] += 1

    def state(self):
        return {"centers": self.centers, "updates": self.updates}


class NumpyOutputs(NumpyNone):
    momentum = 0.6

    def __init__(self, classifier):
        self.outputs, self.visits = np.zeros((NUM_UNLABELED, K)), np.zeros(NUM_UNLABELED, int)

    def label(self, weak_logits, indices):
        last = {j: q for j, q in zip(indices, softmax(weak_logits), strict=True)}
        for j, q in last.items():
            self.outputs[j] = 0.6 * self.outputs[j] + 0.4 * q
            self.visits[j] += 1
        return self.outputs[indices] / (1 - 0.6 ** self.visits[indices])[:, None]

    def state(self):
        return {"outputs": self.outputs, "visits": self.visits}


@pytest.mark.parametrize(
    ("centers", "reading", "threshold", "rtol"),
    [
        ("none", NumpyNone, 0.6, 1e-10),
        ("classifier", NumpyClassifier, 0.6, 1e-10),
        ("features", NumpyFeatures, 0.6, 1e-10),
        ("outputs", NumpyOutputs, 0.5, 1e-6),  # corrects the bias in float32
    ],
)
def test_centers_equal_a_numpy_loop_over_five_steps(centers, reading, threshold, rtol):
    params = make_params(3)
    momentum = getattr(reading, "momentum", None)
    method = make_method(
        params,
        layerwise__gradient_mask=GRAD_RELU,
        avg_clustering__centers=centers,
        avg_clustering__momentum=momentum,
        policy__threshold=threshold,
    )
    current, step = make_state(params, method), functools.partial(steps.train_step, method=method)
    mirror = reading(params["classifier"])
    for t, seed in enumerate([0, 1, 2, 3, 5]):
        batch = make_batch(seed)
        indices = batch.unlabeled_indices.reshape(-1)
        assert len(set(indices)) < len(indices)  # a sample occurs twice
        params = current.params
        features = views(params["backbone"], batch)
        weak_logits = np.array(logits_of(params["classifier"], features[1]))
        targets, weights = pseudo_labels(mirror.label(weak_logits, indices), threshold)
        pullable = mirror.pullable(targets, weights)

        def objective(params, batch=batch, pullable=pullable):
            frozen = functools.partial(logits_of, jax.lax.stop_gradient(params["classifier"]))
            head = frozen if mirror.head(jnp.zeros((1, D))) is None else mirror.head
            return supervised_loss(params, batch) + unsupervised_loss(
                params, batch, *pullable, head
            )

        expected = jax.grad(objective)(params)
        current, _ = step(current, batch)
        features = [np.array(x) for x in features]
        targets, weights = np.array(targets), np.array(weights)
        mirror.update(t, current.params["classifier"], batch, features, targets, weights)
        assert_trees_close(current.opt_state, expected, rtol=rtol, atol=rtol)
        assert_trees_close(current.centers, mirror.state(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("centers", ["features", "outputs"])
def test_the_first_step_knows_no_centers_and_stays_finite(centers):
    params, batch = make_params(), make_batch()
    method = without_labels(make_method(params, avg_clustering__centers=centers))
    actual = gradients(method, params, batch)["backbone"]["stem"]["kernel"]
    if centers == "features":  # there are no centers, so nothing is pulled
        np.testing.assert_array_equal(actual, 0.0)
    else:  # after a first visit, the average is the prediction
        targets, weights = pseudo_labels(weak_probabilities(params, batch))
        last = {j: t for j, t in zip(batch.unlabeled_indices.ravel(), targets, strict=True)}
        targets = jnp.array([last[j] for j in batch.unlabeled_indices.ravel()])
        last = {j: w for j, w in zip(batch.unlabeled_indices.ravel(), weights, strict=True)}
        weights = jnp.array([last[j] for j in batch.unlabeled_indices.ravel()])
        expected = jax.grad(unsupervised_loss)(params, batch, targets, weights)
        np.testing.assert_allclose(actual, expected["backbone"]["stem"]["kernel"], rtol=1e-9)


def test_a_class_without_center_is_left_out_of_the_softmax_and_its_rows_weigh_nothing():
    params, batch = make_params(), make_batch()
    targets, weights = pseudo_labels(weak_probabilities(params, batch))
    assert np.sum(weights * targets[:, 1]) > 0  # some accepted rows have the class without a center
    centers = np.random.RandomState(3).randn(K, D)
    state_of_centers = {"centers": jnp.array(centers), "updates": jnp.array([5, 0, 1])}

    def two_classes(params):
        _, _, strong = views(params["backbone"], batch)
        unit = centers / np.linalg.norm(centers, axis=1, keepdims=True)
        cosine = strong / jnp.linalg.norm(strong, axis=1, keepdims=True) @ unit[[0, 2]].T
        logs = jax.nn.log_softmax(cosine / 0.1)
        return -jnp.sum(weights[:, None] * targets[:, jnp.array([0, 2])] * logs) / (MU * B)

    method = make_method(params, "layermatch", avg_clustering__centers="features")
    actual = gradients(without_labels(method), params, batch, state_of_centers)
    assert_trees_close(actual, jax.jit(jax.grad(two_classes))(params), rtol=1e-9, atol=1e-12)


def test_the_averaged_classifier_labels_when_it_is_asked_to():
    params, batch, averaged = make_params(), make_batch(), make_classifier(9)
    targets, weights = pseudo_labels(weak_probabilities(params, batch, averaged))
    usual, usual_weights = pseudo_labels(weak_probabilities(params, batch))
    assert np.any(targets != usual)
    assert np.any(weights != usual_weights)
    for target_head, labels in (
        ("centers", (targets, weights)),
        ("classifier", (usual, usual_weights)),
    ):
        method = make_method(params, "layermatch", avg_clustering__target_head=target_head)
        actual = gradients(without_labels(method), params, batch, averaged)["backbone"]
        head = functools.partial(logits_of, averaged)
        expected = jax.grad(unsupervised_loss)(params, batch, *labels, head)["backbone"]
        assert_trees_close(actual, expected)
