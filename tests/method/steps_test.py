"""The train step against the method's equations, written down here a second time, in float64."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import (
    MU,
    NUM_UNLABELED,
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

from layermatch_jax.batch import EvalBatch, TrainBatch
from layermatch_jax.method import assembly, backprop, losses, optimizer, policies, state, steps
from layermatch_jax.views import Layout, Views

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


def pseudo_labels(probabilities, threshold=THRESHOLD):
    """FixMatch's (targets, weights), on a batch of which they are worth something."""
    assert_informative(probabilities, threshold)
    accepted = np.max(probabilities, axis=1) >= threshold
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
    pseudo_labels(weak_probabilities(params, batch))  # is informative

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
        norms = np.maximum(np.linalg.norm(self.centres, axis=1, keepdims=True), 1e-300)
        cosine = (
            features / jnp.linalg.norm(features, axis=1, keepdims=True) @ (self.centres / norms).T
        )
        seen = np.tile(self.updates > 0, (len(features), 1))
        return jnp.where(seen, cosine / 0.1, -1e5)  # exp(-1e5) is 0: not in the softmax

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
    ("centres", "reading", "threshold", "rtol"),
    [
        ("none", NumpyNone, 0.6, 1e-10),
        ("classifier", NumpyClassifier, 0.6, 1e-10),
        ("features", NumpyFeatures, 0.6, 1e-10),
        ("outputs", NumpyOutputs, 0.5, 1e-6),  # the code corrects the bias in float32
    ],
)
def test_centres_equal_a_numpy_loop_over_five_steps(centres, reading, threshold, rtol):
    params = make_params(3)
    momentum = getattr(reading, "momentum", None)
    method = make_method(
        params,
        layerwise__gradient_mask=GRAD_RELU,
        avg_clustering__centres=centres,
        avg_clustering__momentum=momentum,
        policy__threshold=threshold,
    )
    current, step = make_state(params, method), functools.partial(steps.train_step, method=method)
    mirror = reading(params["classifier"])
    for t, seed in enumerate([0, 1, 2, 3, 5]):
        batch = make_batch(seed)
        indices = batch.unlabeled_indices.reshape(-1)
        assert len(set(indices)) < len(indices)  # some sample occurs twice
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
        assert_trees_close(current.centres, mirror.state(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("centres", ["features", "outputs"])
def test_the_first_step_knows_no_centres_and_stays_finite(centres):
    params, batch = make_params(), make_batch()
    method = without_labels(make_method(params, avg_clustering__centres=centres))
    actual = gradients(method, params, batch)["backbone"]["stem"]["kernel"]
    if centres == "features":  # no centre pulls at anything
        np.testing.assert_array_equal(actual, 0.0)
    else:  # a first visit's average is the visit itself
        targets, weights = pseudo_labels(weak_probabilities(params, batch))
        last = {j: t for j, t in zip(batch.unlabeled_indices.ravel(), targets, strict=True)}
        targets = jnp.array([last[j] for j in batch.unlabeled_indices.ravel()])
        last = {j: w for j, w in zip(batch.unlabeled_indices.ravel(), weights, strict=True)}
        weights = jnp.array([last[j] for j in batch.unlabeled_indices.ravel()])
        expected = jax.grad(unsupervised_loss)(params, batch, targets, weights)
        np.testing.assert_allclose(actual, expected["backbone"]["stem"]["kernel"], rtol=1e-9)


def test_a_class_without_centre_is_left_out_of_the_softmax_and_its_rows_weigh_nothing():
    params, batch = make_params(), make_batch()
    targets, weights = pseudo_labels(weak_probabilities(params, batch))
    assert np.sum(weights * targets[:, 1]) > 0  # rows of the class without a centre are accepted
    centres = np.random.RandomState(3).randn(K, D)
    state_of_centres = {"centres": jnp.array(centres), "updates": jnp.array([5, 0, 1])}

    def two_classes(params):
        _, _, strong = views(params["backbone"], batch)
        unit = centres / np.linalg.norm(centres, axis=1, keepdims=True)
        cosine = strong / jnp.linalg.norm(strong, axis=1, keepdims=True) @ unit[[0, 2]].T
        logs = jax.nn.log_softmax(cosine / 0.1)
        return -jnp.sum(weights[:, None] * targets[:, jnp.array([0, 2])] * logs) / (MU * B)

    method = make_method(params, "layermatch", avg_clustering__centres="features")
    actual = gradients(without_labels(method), params, batch, state_of_centres)
    assert_trees_close(actual, jax.jit(jax.grad(two_classes))(params), rtol=1e-9, atol=1e-12)


def test_the_averaged_classifier_labels_when_it_is_asked_to():
    params, batch, averaged = make_params(), make_batch(), make_classifier(9)
    targets, weights = pseudo_labels(weak_probabilities(params, batch, averaged))
    usual, usual_weights = pseudo_labels(weak_probabilities(params, batch))
    assert np.any(targets != usual)
    assert np.any(weights != usual_weights)
    for target_head, labels in (
        ("centres", (targets, weights)),
        ("classifier", (usual, usual_weights)),
    ):
        method = make_method(params, "layermatch", avg_clustering__target_head=target_head)
        actual = gradients(without_labels(method), params, batch, averaged)["backbone"]
        head = functools.partial(logits_of, averaged)
        expected = jax.grad(unsupervised_loss)(params, batch, *labels, head)["backbone"]
        assert_trees_close(actual, expected)


# ---------------------------------------------------------------------------------------------
# A policy that uses every part of its answer.


def toy_policy(view, loss):
    def init(spec):
        return {"calls": jnp.array(0.0), "mean": jnp.full(spec.num_classes, 1 / spec.num_classes)}

    def assign(policy_state, inputs):
        weak_logits, indices = inputs.target_logits["weak"], inputs.unlabeled_indices
        probabilities = jax.nn.softmax(weak_logits)
        confidence = jnp.max(probabilities, axis=1)
        mean = 0.9 * policy_state["mean"] + 0.1 * jnp.mean(probabilities, axis=0)
        return policies.Assignment(
            targets=jax.nn.softmax(2 * weak_logits),
            weights=jnp.where(confidence >= THRESHOLD, confidence + 0.01 * indices, 0.0),
            labeled_weights=1 / (1.0 + inputs.labels) + inputs.labeled_logits["weak"][:, 0] ** 2,
            scale=0.5 + 0.25 * policy_state["calls"],
            extra=0.05,
            state={"calls": policy_state["calls"] + 1, "mean": mean},
            diagnostics={"first_class": mean[0], "mean": mean},
        )

    def terms(outputs, answer):
        rows = answer.weights * loss(outputs.logits[view], answer.targets)
        regularizer = answer.extra * jnp.sum(jnp.log(jnp.cosh(outputs.logits[view])))
        return {"unsupervised": jnp.sum(rows) / len(rows), "regularizer": regularizer}

    return policies.Policy(init, assign, terms)


class Terms(NamedTuple):
    """The toy policy's losses, in the order of the equations."""

    supervised: jax.Array
    unsupervised: jax.Array  # the weighted mean over rows
    regularizer: jax.Array


def toy_terms(params, batch, view, loss, head=logits_of, constants=None, target_head=None):
    """The losses as functions of params; `constants`: where pseudo-labels are made, and by whom."""
    constants = params if constants is None else constants
    classifier = constants["classifier"] if target_head is None else target_head
    labeled, weak, strong = jax.lax.stop_gradient(views(constants["backbone"], batch))
    probabilities = jax.nn.softmax(logits_of(classifier, weak))
    confidence = jnp.max(probabilities, axis=1)
    weights = (confidence >= THRESHOLD) * (confidence + 0.01 * batch.unlabeled_indices.reshape(-1))
    targets = probabilities**2 / jnp.sum(probabilities**2, axis=1, keepdims=True)
    of_labeled = 1 / (1.0 + batch.labels) + logits_of(constants["classifier"], labeled)[:, 0] ** 2
    weights, targets, of_labeled = jax.lax.stop_gradient((weights, targets, of_labeled))

    labeled, weak, strong = views(params["backbone"], batch)
    logits = head(params["classifier"], {"weak": weak, "strong": strong}[view])
    ce = cross_entropy(logits_of(params["classifier"], labeled), one_hot(batch.labels))
    return Terms(
        jnp.sum(of_labeled * ce) / B,
        jnp.sum(weights * loss(logits, targets)) / (MU * B),
        0.05 * jnp.sum(jnp.log(jnp.cosh(logits))),
    )


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
    for seed, scale in ((0, 0.5), (1, 0.75)):  # the second step sees the state of the first
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


def test_every_part_of_an_assignment_is_gated_and_seen_through_the_centres():
    params, batch, averaged = make_params(), make_batch(), make_classifier(9)
    assert_informative(weak_probabilities(params, batch, averaged))
    method = make_method(
        params,
        layerwise__gradient_mask=(("classifier/.*", 0.25),),
        avg_clustering__centres="classifier",
        avg_clustering__target_head="centres",
    )
    method = method._replace(policy=toy_policy("strong", losses.cross_entropy))
    through_centres = lambda classifier, features: logits_of(averaged, features)  # noqa: E731

    def objective(trained):
        terms = functools.partial(
            toy_terms, batch=batch, view="strong", loss=cross_entropy, target_head=averaged
        )
        features = terms(trained, head=through_centres, constants=params)
        # The classifier's gate: the same value, a quarter of the gradient, on constant features.
        gated = jax.tree.map(lambda p: 0.25 * p + 0.75 * jax.lax.stop_gradient(p), trained)
        gated = {"backbone": params["backbone"], "classifier": gated["classifier"]}
        classifier = terms(gated, head=logits_of, constants=params)
        return features.supervised + 0.5 * sum([*features[1:], *classifier[1:]])

    assert_trees_close(gradients(method, params, batch, averaged), jax.grad(objective)(params))


def test_metrics_are_sums_and_weights():
    params, batch = make_params(), make_batch()
    method = make_method(
        params, "grad_relu", unsupervised_weight=3.0, optimizer__learning_rate=0.25
    )
    method = method._replace(policy=toy_policy("strong", losses.cross_entropy))
    probabilities = np.array(weak_probabilities(params, batch))
    assert_informative(probabilities)
    confidence, indices = probabilities.max(axis=1), batch.unlabeled_indices.reshape(-1)
    weights = np.where(confidence >= THRESHOLD, confidence + 0.01 * indices, 0.0)
    # Every third row is right, wrong, of unknown truth.
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
        "regularizer": (regularizer, 1),
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
    for threshold in (THRESHOLD, 2.0):  # the latter accepts none
        method = make_method(params, policy__threshold=threshold)
        _, metrics = steps.train_step(make_state(params, method), batch, method=method)
        total, weights[threshold] = metrics["classifier_gradient_cosine"]
        assert (total != 0) == (threshold == THRESHOLD)
    assert weights == {THRESHOLD: 1, 2.0: 0}
    assert metrics["loss_unsupervised"][1] == 1  # a mean over all rows: truly 0


def test_without_labelled_rows_there_is_no_supervised_loss():
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
    # Rows: 0 as 0, right; 2 as 0; 1 as 1 by half a weight; 1 as 2, not accepted; unknown as 2.
    answer = policies.Assignment(
        targets=one_hot(jnp.array([0, 0, 1, 2, 2])),
        weights=jnp.array([1.0, 1.0, 0.5, 0.0, 1.0]),
        **dict.fromkeys(policies.Assignment._fields[2:]),
    )
    metrics = steps._pseudo_label_metrics(answer, jnp.array([0, 2, 1, 1, -1]))
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


# ---------------------------------------------------------------------------------------------
# What else a step carries.


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
    """Two devices, in the shape of a vmap: sums, row order, everybody's own answers."""
    params, batch = make_params(3), make_batch()

    def one_matrix(variables, images, train, mutable):  # BatchNorm is the models' affair
        x = jnp.rint(images.astype(jnp.float64) * 255).reshape(len(images), -1) / 255 - 0.5
        return x @ variables["params"]["stem"]["kernel"], {"batch_stats": variables["batch_stats"]}

    weak = (batch.images[:, 1 : 1 + MU].reshape(MU * B, 12) / 255 - 0.5) @ np.array(
        params["backbone"]["stem"]["kernel"]
    )
    assert_informative(softmax(np.array(logits_of(params["classifier"], weak))))
    method = make_method(params, "layermatch", avg_clustering__centres="features")
    method = method._replace(policy=toy_policy("strong", losses.cross_entropy))
    seen = {"centres": jnp.array(np.random.RandomState(3).randn(K, D)), "updates": jnp.ones(K, int)}
    start = make_state(params, method, apply_fn=one_matrix).replace(centres=seen)
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
    hit = np.argmax(logits_of(params["classifier"], padding), axis=1)  # they would count
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


def test_images_are_normalised_by_channel():
    method = make_method(make_params())._replace(mean=(0.5, 0.25, 0.0), std=(0.25, 0.5, 2.0))
    images = np.array([[[[0, 0, 0], [255, 255, 255], [51, 102, 204]]]], np.uint8)
    expected = [[[[-2, -0.5, 0], [2, 1.5, 0.5], [-1.2, 0.3, 0.4]]]]
    actual = backprop.normalize(jnp.array(images), method)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_cosine():
    a, b = {"x": jnp.array([3.0, 0.0]), "y": jnp.array(4.0)}, {"x": jnp.array([1.0, 5.0]), "y": 0.0}
    np.testing.assert_allclose(steps.cosine(a, b), (3 / (5 * 26**0.5), 1))
    np.testing.assert_allclose(steps.cosine(a, jax.tree.map(lambda x: -2 * x, a)), (-1, 1))
    assert steps.cosine(a, jax.tree.map(lambda x: 0 * x, a)) == (0, 0)


# ---------------------------------------------------------------------------------------------
# Three training steps in numbers.

PIXEL_MEAN, PIXEL_STD = (0.5, 0.4, 0.6), (0.25, 0.2, 0.3)


def literal_problem():
    """Start and three batches: 2 labelled, 4 unlabelled images of 2x2 pixels, 3 classes, D = 3.

    Seed 184 is the first on which every step is informative.
    """
    rng = np.random.RandomState(184)
    start = {
        "stem": np.round(0.3 * rng.randn(12, 3), 2),
        "kernel": np.round(rng.randn(3, 3), 2),
        "bias": np.round(0.2 * rng.randn(3), 2),
    }
    batches = [
        (rng.randint(0, 256, (2, 5, 2, 2, 3)).astype(np.uint8), rng.randint(0, 3, 2))
        for _ in range(3)
    ]
    return start, batches


def numpy_layermatch_steps(start, batches):
    """LayerMatch on z = x·S, by the method's equations and the chain rule, in float64.

    λ_u = 0.75, τ = 0.5, lr = 0.2·cos(7πk / 16·4), Nesterov 0.9, decay 0.02, EMA 0.8, centres 0.15.

    Returns:
      The last parameters, their EMA, the centres; [(L_s, L_u)] and [q] of the steps.
    """
    p, ema, centres = dict(start), dict(start), dict(start)
    velocity = dict.fromkeys(p, 0.0)
    step_losses, step_probabilities = [], []
    for t, (images, labels) in enumerate(batches):
        x = ((images / 255 - PIXEL_MEAN) / PIXEL_STD).reshape(2, 5, 12)
        labeled, weak, strong = x[:, 0], x[:, 1:3].reshape(4, 12), x[:, 3:].reshape(4, 12)

        z = labeled @ p["stem"]
        prob = softmax(z @ p["kernel"] + p["bias"])
        loss_s = -np.log(prob[[0, 1], labels]).mean()
        error = (prob - np.eye(3)[labels]) / 2  # ∂L_s/∂logits
        gradient = {
            "stem": labeled.T @ error @ p["kernel"].T,
            "kernel": z.T @ error,
            "bias": error.sum(axis=0),
        }

        q = softmax(weak @ p["stem"] @ p["kernel"] + p["bias"])
        pseudo, accepted = q.argmax(axis=1), q.max(axis=1) >= 0.5
        prob = softmax(strong @ p["stem"] @ centres["kernel"] + centres["bias"])
        loss_u = -(accepted * np.log(prob[[0, 1, 2, 3], pseudo])).sum() / 4
        error = accepted[:, None] * (prob - np.eye(3)[pseudo]) / 4
        gradient["stem"] = gradient["stem"] + 0.75 * strong.T @ error @ centres["kernel"].T

        rate = 0.2 * np.cos(7 * np.pi * t / (16 * 4))
        m = min(0.15, (1 + t) / (10 + t))
        for name in p:
            decay = 0.0 if name == "bias" else 0.02 * p[name]
            d = gradient[name] + decay
            velocity[name] = 0.9 * velocity[name] + d
            p[name] = p[name] - rate * (d + 0.9 * velocity[name])
            ema[name] = 0.8 * ema[name] + 0.2 * p[name]
            centres[name] = m * centres[name] + (1 - m) * p[name]
        step_losses.append((loss_s, loss_u))
        step_probabilities.append(q)
    return p, ema, centres, step_losses, step_probabilities


# Printed once by numpy_layermatch_steps(*literal_problem()), to 12 digits.
LITERAL = {
    "stem": [
        [0.118874181585, -0.00231616123813, 0.16192051641],
        [-0.602390673253, 0.0305628231966, -0.815079093713],
        [-0.0606671236255, 0.484473975677, -0.481613789639],
        [-0.0234755044038, 0.152994067205, 0.0235965199791],
        [0.218909316014, -0.0855491109873, -0.206666479427],
        [-0.317068707266, 0.00209343581076, -0.0699901338639],
        [0.0284593902514, 0.292438473967, -0.178281966207],
        [0.5690070691, 0.110840072319, -0.293537354154],
        [-0.360202239784, 0.282313841744, -0.211224822914],
        [0.332886018408, -0.276037332713, 1.0940100369],
        [0.724502369141, 0.651440784744, 0.524091145183],
        [0.367162930065, -0.175593092583, -0.3132171],
    ],
    "kernel": [
        [-0.349166866093, 0.441939527258, -0.248250715457],
        [0.482718593083, -0.302496117395, -0.209374610867],
        [-0.189539605401, 1.27068063758, 0.0266401046485],
    ],
    "bias": [0.385882540519, -0.553662670077, 0.157780129558],
    "ema_stem": [
        [0.0327566404867, -0.164555182881, -0.0666666863075],
        [-0.23007541668, 0.389058935149, 0.0693296731001],
    ],
    "ema_kernel": [
        [-0.186559813744, 0.364604903147, -0.336530602238],
        [0.155956044271, 0.125668339674, -0.311340417601],
        [-0.143351270056, 1.3445060087, -0.0719454597012],
    ],
    "ema_bias": [0.145151923917, -0.391148394757, 0.23599647084],
    "centres_kernel": [
        [-0.354370304566, 0.437590059262, -0.23898933698],
        [0.447175001095, -0.256217456627, -0.220164341146],
        [-0.182273667538, 1.27413012303, 0.0180018182893],
    ],
    "centres_bias": [0.363375657194, -0.544240052018, 0.170864394824],
    "losses": [
        [0.463130769276, 2.31260547258],
        [1.84872054043, 0.88346602131],
        [0.932485895983, 0.404237771071],
    ],  # (L_s, L_u) of the steps
}
CHANGED = (
    "The numbers of a training step changed. If you did not mean to change the method, you just "
    "did; if you did, derive them anew with numpy_layermatch_steps, never with the code under test."
)


def as_params(p):
    return {
        "backbone": {"stem": {"kernel": p["stem"]}},
        "classifier": {"kernel": p["kernel"], "bias": p["bias"]},
    }


def literal_config():
    return make_config(
        "layermatch",
        batch_size=2,
        unlabeled_ratio=2,
        unsupervised_weight=0.75,
        train_steps=4,
        ema_decay=0.8,
        policy__threshold=0.5,
        avg_clustering__momentum=0.15,
        optimizer__learning_rate=0.2,
        optimizer__weight_decay=0.02,
        model__name="linear",
        model__width=3,
        dataset__image_size=2,
    )


def assert_literal(p, ema, centres, step_losses, rtol):
    for name, actual in {
        "stem": p["stem"],
        "kernel": p["kernel"],
        "bias": p["bias"],
        "ema_stem": ema["stem"][:2],
        "ema_kernel": ema["kernel"],
        "ema_bias": ema["bias"],
        "centres_kernel": centres["kernel"],
        "centres_bias": centres["bias"],
        "losses": np.array(step_losses),
    }.items():
        np.testing.assert_allclose(actual, LITERAL[name], rtol=rtol, atol=rtol, err_msg=CHANGED)


def test_the_literal_numbers_are_those_of_the_equations():
    *answer, probabilities = numpy_layermatch_steps(*literal_problem())
    for q in probabilities:
        assert_informative(q, 0.5)
    assert_literal(*answer, rtol=1e-11)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_three_training_steps_equal_literal_numbers(dtype):
    with jax.enable_x64(dtype == "float64"):
        start, batches = literal_problem()
        config = literal_config()
        current = state.create(config, num_classes=3, num_unlabeled=4, labels=np.zeros(2, np.int32))
        params = jax.tree.map(jnp.array, as_params(start))
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, current.params)
        method = assembly.create_method(config, params, (PIXEL_MEAN, PIXEL_STD))
        current = current.replace(
            params=params,
            ema_params=params,
            opt_state=current.tx.init(params),
            centres=method.centres.init(params["classifier"], 4),
        )

        def exact(variables, images, train, mutable):
            """The linear backbone on float64 pixels: the step normalises in float32."""
            mean, std = (jnp.array(x)[None, None, None] for x in (PIXEL_MEAN, PIXEL_STD))
            pixels = jnp.rint((images.astype(jnp.float64) * std + mean) * 255)
            x = ((pixels / 255 - mean) / std).reshape(len(images), -1)
            return x @ variables["params"]["stem"]["kernel"], {}

        if dtype == "float64":
            current = current.replace(apply_fn=exact)
        step = jax.jit(functools.partial(steps.train_step, method=method))
        step_losses, rates = [], []
        for images, labels in batches:
            indices = np.arange(4, dtype=np.int32).reshape(2, 2)
            labels = labels.astype(np.int32)
            batch = TrainBatch(images, labels, np.arange(2), indices, indices % 3)
            current, metrics = step(current, batch)
            step_losses.append([metrics["loss_supervised"][0], metrics["loss_unsupervised"][0]])
            rates.append(metrics["learning_rate"][0])
        stem = lambda tree: {"stem": tree["backbone"]["stem"]["kernel"], **tree["classifier"]}  # noqa: E731
        # Metrics are float32 in any case.
        np.testing.assert_allclose(step_losses, LITERAL["losses"], rtol=1e-5, err_msg=CHANGED)
        np.testing.assert_allclose(rates, 0.2 * np.array([1, 0.941544065, 0.773010453]), rtol=1e-6)
        assert current.step == 3
        assert_literal(
            stem(current.params),
            stem(current.ema_params),
            current.centres,
            LITERAL["losses"],
            rtol=1e-11 if dtype == "float64" else 1e-5,
        )
