"""The train step against the method's equations, written down here a second time, in float64."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import (
    MU,
    NUM_UNLABELED,
    RATE,
    THRESHOLD,
    B,
    D,
    K,
    assert_informative,
    backbone,
    gradients,
    logits_of,
    make_batch,
    make_classifier,
    make_config,
    make_method,
    make_params,
    make_state,
    views,
)

from layermatch_jax import losses, optimizer, policies, state, steps
from layermatch_jax.batch import EvalBatch, TrainBatch

GRAD_RELU = (("classifier/.*", 0.0),)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def assert_trees_close(actual, expected, rtol=1e-10, atol=1e-13):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), actual, expected
    )


def cross_entropy(logits, targets):
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=1)


def one_hot(labels):
    return jnp.eye(K)[labels]


def supervised_loss(params, batch):
    labeled, _, _ = views(params["backbone"], batch)
    return jnp.mean(cross_entropy(logits_of(params["classifier"], labeled), one_hot(batch.labels)))


def unsupervised_loss(params, batch, targets, weights, head=None):
    """L_u through the classifier, or through `head`, a function of features."""
    _, _, strong = views(params["backbone"], batch)
    logits = logits_of(params["classifier"], strong) if head is None else head(strong)
    return jnp.sum(weights * cross_entropy(logits, targets)) / (MU * B)


def pseudo_labels(probabilities):
    """FixMatch's (targets, weights), on a batch of which they are worth something."""
    assert_informative(probabilities)
    accepted = np.max(probabilities, axis=1) >= THRESHOLD
    return one_hot(np.argmax(probabilities, axis=1)), accepted.astype(float)


def weak_probabilities(params, batch, classifier=None):
    _, weak, _ = views(params["backbone"], batch)
    classifier = params["classifier"] if classifier is None else classifier
    return jax.nn.softmax(logits_of(classifier, weak))


def without_labels(method):
    """The method on labelled images that weigh nothing: gradients are those of L_u alone."""

    def assign(policy_state, inputs):
        answer = method.policy.assign(policy_state, inputs)
        return answer._replace(labeled_weights=jnp.zeros(inputs.labels.shape))

    return method._replace(policy=method.policy._replace(assign=assign))


# ---------------------------------------------------------------------------------------------
# Which layer sees which gradient.


def test_fixmatch_is_the_gradient_of_one_loss():
    params, batch = make_params(), make_batch()

    def fixmatch(params):
        labeled, weak, strong = views(params["backbone"], batch)
        labeled, weak, strong = (
            logits_of(params["classifier"], x) for x in (labeled, weak, strong)
        )
        probabilities = jax.nn.softmax(jax.lax.stop_gradient(weak))
        accepted = jnp.max(probabilities, axis=1) >= THRESHOLD
        targets = one_hot(jnp.argmax(probabilities, axis=1))
        loss_u = jnp.sum(accepted * cross_entropy(strong, targets)) / (MU * B)
        return jnp.mean(cross_entropy(labeled, one_hot(batch.labels))) + 0.5 * loss_u

    pseudo_labels(weak_probabilities(params, batch))  # is informative
    method = make_method(params, "fixmatch", unsupervised_weight=0.5)
    assert_trees_close(gradients(method, params, batch), jax.grad(fixmatch)(params))


@pytest.mark.parametrize("name", ["grad_relu", "layermatch"])
def test_grad_relu_leaves_the_classifier_an_exact_zero_and_the_backbone_its_gradient(name):
    params, batch = make_params(), make_batch()
    pseudo_labels(weak_probabilities(params, batch))  # is informative
    gated = gradients(without_labels(make_method(params, name)), params, batch)
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(gated["classifier"][leaf], 0.0)
    for leaf in jax.tree.leaves(gated["backbone"]["block"]):
        assert np.abs(leaf).max() > 1e-3
    # Without the gate there is something to remove.
    free = gradients(without_labels(make_method(params, "fixmatch")), params, batch)
    for leaf in ("kernel", "bias"):
        assert np.abs(free["classifier"][leaf]).min() > 1e-4


def test_under_grad_relu_the_classifier_learns_from_labels_bit_for_bit():
    params, batch = make_params(), make_batch()
    gated = gradients(make_method(params, "grad_relu"), params, batch)
    alone = gradients(make_method(params, "grad_relu", unsupervised_weight=0.0), params, batch)
    jax.tree.map(np.testing.assert_array_equal, gated["classifier"], alone["classifier"])
    assert_trees_close(alone, jax.grad(supervised_loss)(params, batch))


def test_layermatch_is_one_loss_with_two_constants():
    params, batch, averaged = make_params(), make_batch(), make_classifier(7)
    targets, weights = pseudo_labels(weak_probabilities(params, batch))

    def layermatch(params):
        """As an objective: centres and, through them, L_u without the classifier."""
        head = functools.partial(logits_of, averaged)
        return supervised_loss(params, batch) + unsupervised_loss(
            params, batch, targets, weights, head
        )

    actual = gradients(make_method(params, "layermatch"), params, batch, averaged)
    assert_trees_close(actual, jax.grad(layermatch)(params))

    def grad_relu(params):
        constant = jax.lax.stop_gradient(params["classifier"])
        head = functools.partial(logits_of, constant)
        return supervised_loss(params, batch) + unsupervised_loss(
            params, batch, targets, weights, head
        )

    actual = gradients(make_method(params, "grad_relu"), params, batch)
    assert_trees_close(actual, jax.grad(grad_relu)(params))


@pytest.mark.parametrize(
    ("mask", "stem", "block", "kernel", "bias"),
    [
        ((), 1, 1, 1, 1),
        (GRAD_RELU, 1, 1, 0, 0),
        ((("backbone/.*", 0.5), ("classifier/bias", 0.25)), 0.5, 0.5, 1, 0.25),
        ((("backbone/stem/.*", 0.5), *GRAD_RELU), 0.5, 1, 0, 0),
        ((("backbone/stem/.*", 0.0), (".*", 0.75)), 0, 0.75, 0.75, 0.75),
    ],
)
@pytest.mark.parametrize("centres", ["none", "classifier"])
def test_one_step_equals_two_gradients_put_together(mask, stem, block, kernel, bias, centres):
    params, batch, averaged = make_params(1), make_batch(1), make_classifier(7)
    method = make_method(
        params,
        layerwise__gradient_mask=mask,
        avg_clustering__centres=centres,
        unsupervised_weight=2.0,
    )
    targets, weights = pseudo_labels(weak_probabilities(params, batch))
    of_labels = jax.grad(supervised_loss)(params, batch)
    through_classifier = jax.grad(unsupervised_loss)(params, batch, targets, weights)
    head = functools.partial(logits_of, averaged) if centres == "classifier" else None
    through_centres = jax.grad(unsupervised_loss)(params, batch, targets, weights, head)
    expected = jax.tree.map(
        lambda supervised, unsupervised, multiplier: supervised + 2.0 * multiplier * unsupervised,
        of_labels,
        {
            "backbone": through_centres["backbone"],
            "classifier": through_classifier["classifier"],
        },
        {
            "backbone": {"stem": {"kernel": stem, "bias": stem}, "block": {"kernel": block}},
            "classifier": {"kernel": kernel, "bias": bias},
        },
    )
    state_of_centres = averaged if centres == "classifier" else None
    assert_trees_close(gradients(method, params, batch, state_of_centres), expected)


def test_a_mask_inside_the_backbone_scales_what_it_names_and_nothing_else():
    params, batch = make_params(1), make_batch(1)
    pseudo_labels(weak_probabilities(params, batch))  # is informative
    mask = (("backbone/block/kernel", 0.25),)
    masked = gradients(
        without_labels(make_method(params, layerwise__gradient_mask=mask)), params, batch
    )
    plain = gradients(without_labels(make_method(params)), params, batch)
    assert np.abs(plain["backbone"]["block"]["kernel"]).min() > 1e-5
    plain["backbone"]["block"]["kernel"] *= 0.25
    assert_trees_close(masked, plain, rtol=1e-12)


def test_one_and_two_pull_backs_agree_where_both_apply():
    params, batch = make_params(1), make_batch(1)

    def backbone_gradients(*mask):
        method = make_method(params, layerwise__gradient_mask=mask)
        return gradients(method, params, batch)["backbone"]

    once = backbone_gradients(("backbone/.*", 0.5))
    stem_halved = backbone_gradients(("backbone/stem/.*", 0.5))
    block_halved = backbone_gradients(("backbone/block/.*", 0.5))
    assert_trees_close(stem_halved["stem"], once["stem"], rtol=1e-12)
    assert_trees_close(block_halved["block"], once["block"], rtol=1e-12)


# ---------------------------------------------------------------------------------------------
# Avg-Clustering: five steps beside a loop in NumPy.


def softmax(logits):
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


class NumpyNone:
    """A reading, in NumPy: before the update (gives L_u's ingredients), and after it."""

    def __init__(self, classifier):
        self.classifier = jax.tree.map(np.array, classifier)

    def label(self, weak_logits, indices):
        """The probabilities to label by."""
        return softmax(weak_logits)

    def head(self, features):
        """Logits of H; None is the classifier."""

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
        self.centres, self.updates = np.zeros((K, D)), np.zeros(K, int)

    def head(self, features):
        seen = np.flatnonzero(self.updates)
        if not len(seen):
            return jnp.zeros((len(features), K))
        centres = self.centres[seen] / np.linalg.norm(self.centres[seen], axis=1, keepdims=True)
        cosine = features / jnp.linalg.norm(features, axis=1, keepdims=True) @ centres.T
        # Classes left out of the softmax: put back as columns of no probability.
        return jnp.full((len(features), K), -1e5).at[:, seen].set(cosine / 0.1)

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
                self.centres[k] = m * self.centres[k] + (1 - m) * total / weight
                self.updates[k] += 1

    def state(self):
        return {"centres": self.centres, "updates": self.updates}


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
    ("centres", "reading", "rtol"),
    [
        ("none", NumpyNone, 1e-10),
        ("classifier", NumpyClassifier, 1e-10),
        ("features", NumpyFeatures, 1e-8),  # the code's cosine has an epsilon of 1e-12
        ("outputs", NumpyOutputs, 1e-6),  # the code corrects the bias in float32
    ],
)
def test_centres_equal_a_numpy_loop_over_five_steps(centres, reading, rtol):
    params = make_params(2)
    momentum = getattr(reading, "momentum", None)
    method = make_method(
        params,
        layerwise__gradient_mask=GRAD_RELU,
        avg_clustering__centres=centres,
        avg_clustering__momentum=momentum,
    )
    current, step = make_state(params, method), functools.partial(steps.train_step, method=method)
    mirror = reading(params["classifier"])
    for t, seed in enumerate([0, 1, 2, 3, 5]):
        batch = make_batch(seed)
        indices = batch.indices.reshape(-1)
        assert len(set(indices)) < len(indices)  # some sample occurs twice
        params = current.params
        features = views(params["backbone"], batch)
        weak_logits = np.array(logits_of(params["classifier"], features[1]))
        targets, weights = pseudo_labels(mirror.label(weak_logits, indices))
        pullable = mirror.pullable(targets, weights)

        def objective(params, batch=batch, pullable=pullable):
            frozen = functools.partial(logits_of, jax.lax.stop_gradient(params["classifier"]))
            head = frozen if mirror.head(jnp.zeros((1, D))) is None else mirror.head
            return supervised_loss(params, batch) + unsupervised_loss(
                params, batch, *pullable, head
            )

        expected = jax.grad(objective)(params)
        current, _ = step(current, batch)
        mirror.update(
            t,
            current.params["classifier"],
            batch,
            np.array(features[:2] + (0,), object),
            targets,
            weights,
        )
        assert_trees_close(current.opt_state, expected, rtol=rtol, atol=rtol)
        assert_trees_close(current.centres, mirror.state(), rtol=rtol, atol=rtol)
