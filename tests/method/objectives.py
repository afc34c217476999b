"""A second implementation of the losses of a train step, in JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from builders import MU, THRESHOLD, B, K, assert_informative, logits_of, views

GRAD_RELU = (("classifier/.*", 0.0),)


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
    """Computes L_u through the classifier, or through `head`, a function of features."""
    _, _, strong = views(params["backbone"], batch)
    logits = logits_of(params["classifier"], strong) if head is None else head(strong)
    return jnp.sum(weights * cross_entropy(logits, targets)) / (MU * B)


def pseudo_labels(probabilities, threshold=THRESHOLD):
    """Computes FixMatch's (targets, weights); asserts that the batch is informative."""
    assert_informative(probabilities, threshold)
    accepted = np.max(probabilities, axis=1) >= threshold
    return one_hot(np.argmax(probabilities, axis=1)), accepted.astype(float)


def weak_probabilities(params, batch, classifier=None):
    _, weak, _ = views(params["backbone"], batch)
    classifier = params["classifier"] if classifier is None else classifier
    return jax.nn.softmax(logits_of(classifier, weak))


def without_labels(method):
    """Changes the method so that labeled images have weight 0 and gradients are those of L_u."""

    def assign(policy_state, inputs):
        assignment = method.policy.assign(policy_state, inputs)
        return assignment._replace(labeled_weights=jnp.zeros(inputs.labels.shape))

    return method._replace(policy=method.policy._replace(assign=assign))


def softmax(logits):
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)
