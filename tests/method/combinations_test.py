"""Compares a step with the method's equations for all policies, gradient masks and centers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import (
    MU,
    NUM_UNLABELED,
    SIDE,
    B,
    D,
    K,
    assert_informative,
    backbone,
    logits_of,
    make_batch,
    make_classifier,
    make_inputs,
    make_method,
    make_params,
    make_spec,
    make_state,
    views,
)

from layermatch_jax.method import policies, steps

pytestmark = pytest.mark.usefixtures("float64")

MASKS = (
    (),
    (("classifier/.*", 0.0),),
    (("classifier/.*", 0.25), ("backbone/stem/.*", 0.5)),
)
CENTERS = ("none", "classifier", "features", "outputs")
# Policies with one weak and one strong view; other test files check the rest.
POLICIES = [name for name in policies.POLICIES if name not in ("comatch", "pi_model", "vat")]
# All pairs of policies and centers; the masks take turns. Every second pair is slow.
CASES = [
    pytest.param(
        policy,
        centers,
        (i + j) % len(MASKS),
        marks=[pytest.mark.slow] if (i + j) % 2 else [],
    )
    for i, policy in enumerate(POLICIES)
    for j, centers in enumerate(CENTERS)
    if (policy, centers) != ("mean_teacher", "outputs")  # not allowed: it has its own targets
]


def warmed_up(policy):
    """Returns the state of a policy after three batches of random logits."""
    state, rng = policy.init(make_spec()), np.random.RandomState(7)
    for _ in range(3):
        random = lambda rows: jnp.array(2 * rng.randn(rows, K))  # noqa: E731
        inputs = make_inputs(
            weak=random(MU * B),
            strong=random(MU * B),
            labeled=random(B),
            labels=jnp.array(rng.randint(0, K, B)),
            indices=jnp.array(rng.randint(0, NUM_UNLABELED, MU * B)),
            teacher=random(MU * B),
        )
        state = policy.assign(state, inputs).state
    return state


def head_of(centers, classifier, state):
    """Returns the head H, implemented a second time."""

    def cosine(classifier, features):
        unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
        return unit(features) @ unit(state["centers"]).T / 0.1

    return {
        "classifier": lambda classifier, features: logits_of(state, features),
        "features": cosine,
    }.get(centers, logits_of)


@pytest.mark.parametrize(("name", "centers", "mask"), CASES)
def test_a_step_follows_the_equations(name, centers, mask):
    params, teacher, batch = make_params(), make_params(1), make_batch()
    method = make_method(
        params,
        policy__name=name,
        policy__warm_up=1 / 2**20,
        policy__period=1 / 2**20,
        policy__ramp=10 / 2**20,
        policy__signal_annealing="linear",
        policy__fairness_weight=0.5,
        policy__threshold=0.6,
        policy__relative_threshold=1.2,
        policy__momentum=0.8,
        unsupervised_weight=2.0,
        layerwise__gradient_mask=MASKS[mask],
        avg_clustering__centers=centers,
    )
    state_of_centers = {
        "classifier": make_classifier(9),
        "features": {
            "centers": jnp.array(np.random.RandomState(3).randn(K, D)),
            "updates": jnp.ones(K, int),
        },
    }.get(centers, make_state(params, method).centers)
    start = make_state(params, method).replace(
        ema_params=teacher, centers=state_of_centers, policy=warmed_up(method.policy)
    )
    head = head_of(centers, params["classifier"], state_of_centers)

    # The inputs of the policy, and its assignment.
    labeled, weak, strong = views(params["backbone"], batch)
    weak_logits, indices = (
        logits_of(params["classifier"], weak),
        batch.unlabeled_indices.reshape(-1),
    )
    assert_informative(jax.nn.softmax(weak_logits), 0.6)
    if centers == "outputs":  # after a first visit, the average is the last row of the sample
        last = {index: row for row, index in enumerate(indices)}
        weak_logits = jax.nn.log_softmax(weak_logits)[np.array([last[i] for i in indices])]
    images = batch.images[:, 1 : 1 + MU].reshape(-1, SIDE, SIDE, 3) / 255
    variables = {"params": teacher["backbone"], "batch_stats": {}}
    teacher_features = backbone(variables, images, train=True)
    assignment = method.policy.assign(
        start.policy,
        make_inputs(
            weak=weak_logits,
            strong=head(params["classifier"], strong),
            labeled=logits_of(params["classifier"], labeled),
            labels=jnp.array(batch.labels),
            indices=jnp.array(indices),
            teacher=logits_of(teacher["classifier"], teacher_features),
        ),
    )
    if name not in ("mean_teacher", "softmatch"):
        assert 0 < np.sum(np.asarray(assignment.weights) > 0) < MU * B, "all or no rows pass"
    if name == "freematch":
        fairness = lambda logits: method.policy.loss(  # noqa: E731, checked elsewhere
            policies.Outputs({"strong": logits}, {}), assignment
        )["fairness"]
        by_logits = jax.grad(fairness)(head(params["classifier"], strong))
        assert np.abs(by_logits).max() > 1e-5
    else:
        fairness = lambda logits: 0.0  # noqa: E731

    # The losses, and the gradient that each layer gets.
    def loss_s(params):
        logits = logits_of(params["classifier"], views(params["backbone"], batch)[0])
        rows = -jax.nn.log_softmax(logits)[np.arange(B), batch.labels]
        return jnp.mean(assignment.labeled_weights * rows)

    def loss_u(params, head):
        _, weak, strong = views(params["backbone"], batch)
        logits = head(params["classifier"], weak if name == "pseudo_label" else strong)
        if name == "mean_teacher":
            rows = jnp.mean((jax.nn.softmax(logits) - assignment.targets) ** 2, axis=1)
        else:
            rows = -jnp.sum(assignment.targets * jax.nn.log_softmax(logits), axis=1)
        return (
            2.0
            * assignment.scale
            * (jnp.sum(assignment.weights * rows) / (MU * B) + fairness(logits))
        )

    of_labels = jax.grad(loss_s)(params)
    of_pseudo_labels = (
        jax.grad(loss_u)(params, head)["backbone"],
        (jax.grad(loss_u)(params, logits_of)["classifier"]),
    )
    stem, classifier = ((1.0, 1.0), (1.0, 0.0), (0.5, 0.25))[mask]
    add = lambda factor: lambda a, b: a + factor * b  # noqa: E731
    expected = {
        "backbone": {
            part: jax.tree.map(
                add(stem if part == "stem" else 1.0),
                of_labels["backbone"][part],
                of_pseudo_labels[0][part],
            )
            for part in ("stem", "block")
        },
        "classifier": jax.tree.map(add(classifier), of_labels["classifier"], of_pseudo_labels[1]),
    }

    new, metrics = steps.train_step(start, batch, method=method)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-10)
    jax.tree.map(close, new.opt_state, expected)
    jax.tree.map(close, new.policy, assignment.state)
    for key, value in assignment.diagnostics.items():
        np.testing.assert_allclose(metrics[key][0], value, rtol=1e-5, err_msg=key)
