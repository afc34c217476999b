"""A policy that sets every field of its assignment, and its losses by the method's equations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from builders import MU, THRESHOLD, B, logits_of, views
from objectives import cross_entropy, one_hot

from layermatch_jax.method import policies


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

    def terms(outputs, assignment):
        rows = assignment.weights * loss(outputs.logits[view], assignment.targets)
        regularizer = assignment.extra * jnp.sum(jnp.log(jnp.cosh(outputs.logits[view])))
        return {"unsupervised": jnp.sum(rows) / len(rows), "regularizer": regularizer}

    return policies.Policy(init, assign, terms)


class Terms(NamedTuple):
    """The losses of the toy policy, in the order of the equations."""

    supervised: jax.Array
    unsupervised: jax.Array  # the weighted mean over rows
    regularizer: jax.Array


def toy_terms(params, batch, view, loss, head=logits_of, constants=None, target_head=None):
    """Computes the losses at params; `constants` and `target_head` make the pseudo-labels."""
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
