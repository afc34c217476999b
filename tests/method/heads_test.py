"""Policies with more views and policy heads: compares the train step with one objective."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import (
    MU,
    SIDE,
    THRESHOLD,
    B,
    D,
    K,
    assert_informative,
    backbone,
    logits_of,
    make_config,
    make_params,
    make_spec,
    make_state,
)
from comatch_test import Batch as CoMatchBatch
from comatch_test import assign as comatch_assign
from oracles import softmax
from toy_with_head import EPSILON, TOY, TOY_SCALE, WIDTH, agreement, turned

from layermatch_jax.batches import TrainBatch
from layermatch_jax.method import assembly, policies, steps

pytestmark = pytest.mark.usefixtures("toy")

GRAD_RELU = (("classifier/.*", 0.0),)


def to_float64(tree):
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def problem(name, **fields):
    """Makes (method, state before a step) in float64."""
    fields = {"policy__name": name, "parallelism": "jit"} | fields
    config = make_config("fixmatch", **fields)
    params = make_params()
    # Confident rows, so that CoMatch's graph has edges.
    sureness = {"comatch": 8, "toy": 1}[name]
    params["classifier"] = jax.tree.map(lambda p: sureness * p, params["classifier"])
    policy, stats, heads = policies.create(config), {}, {}
    for head, create in policy.heads.items():
        made = to_float64(create(D, K, None).init(jax.random.key(1), jnp.zeros((1, D)), train=True))
        heads[head] = jax.tree.map(lambda p: p + 0.1, made["params"])  # biases start at 0
        stats |= {head: made["batch_stats"]} if "batch_stats" in made else {}
    params["heads"] = heads
    method = assembly.create_method(config, params, ((0.0,) * 3, (1.0,) * 3))
    current = make_state(params, method).replace(
        head_stats=stats, policy=to_float64(policy.init(make_spec()))
    )
    return method, current


def batch_of(method, seed=0):
    """Makes a batch in the layout of the method, with the draws of the policy."""
    rng = np.random.RandomState(seed)
    policy = method.policy
    return TrainBatch(
        images=rng.randint(0, 256, (B, method.layout.drawn.size, SIDE, SIDE, 3)).astype(np.uint8),
        labels=rng.randint(0, K, B).astype(np.int32),
        labeled_indices=rng.permutation(B).astype(np.int32),
        unlabeled_indices=rng.randint(0, 20, (B, MU)).astype(np.int32),
        true_labels=rng.randint(-1, K, (B, MU)).astype(np.int32),
        draws=policy.draws(np.random.default_rng(seed), B, MU) if policy.draws else (),
    )


def features_by_position(params, batch):
    """Computes features [B, V, D] of all views in one backbone pass."""
    images = batch.images.reshape(-1, SIDE, SIDE, 3) / 255
    features = backbone({"params": params["backbone"], "batch_stats": {}}, images, train=True)
    return features.reshape(B, -1, D)


def rows(features, start):
    """Selects the μ views that start at a position, in row order."""
    return features[:, start : start + MU].reshape(B * MU, D)


def supervised(params, features, batch):
    """Computes L_s, the mean over the given labeled views [B, n, D]."""
    log_p = jax.nn.log_softmax(logits_of(params["classifier"], features.reshape(-1, D)))
    labels = np.repeat(batch.labels, features.shape[1])
    return -jnp.mean(log_p[np.arange(len(labels)), labels])


def unsupervised(params, strong, targets, weights):
    log_p = jax.nn.log_softmax(logits_of(params["classifier"], strong))
    return -jnp.mean(weights * jnp.sum(targets * log_p, axis=-1))


def projection(params, features):
    first, last = (params["heads"]["projection"][name] for name in ("Dense_0", "Dense_1"))
    hidden = features @ first["kernel"] + first["bias"][None]
    z = jnp.where(hidden > 0, hidden, 0.1 * hidden) @ last["kernel"] + last["bias"][None]
    return z / jnp.linalg.norm(z, axis=-1, keepdims=True)


def comatch_objective(params, batch, constants, weight):
    """CoMatch's objective with λ_u = weight. Views: labeled; μ weak, strong, second strong."""
    features = features_by_position(params, batch)
    strong, second = (rows(features, 1 + v * MU) for v in (1, 2))
    z, z2 = projection(params, strong), projection(params, second)
    similar = jax.nn.log_softmax(z @ z2.T / 0.2)
    contrast = -jnp.mean(jnp.sum(constants["graph"] * similar, axis=-1))
    loss_u = unsupervised(params, strong, constants["targets"], constants["weights"])
    return supervised(params, features[:, :1], batch) + weight * (loss_u + contrast)


@jax.jit
def comatch_inputs(params, batch):
    """Weak logits, and the embeddings of the labeled and of the weak views."""
    features = features_by_position(params, batch)
    weak = rows(features, 1)
    labeled = projection(params, features[:, 0])
    return logits_of(params["classifier"], weak), labeled, projection(params, weak)


def comatch_constants(params, batch, memory):
    """Computes pseudo-labels and graph with the oracle, which changes `memory`."""
    weak_logits, labeled, weak = jax.device_get(comatch_inputs(params, batch))
    x = CoMatchBatch(
        weak_logits=weak_logits,
        strong_logits=None,
        labels=batch.labels,
        labeled=labeled,
        weak=weak,
        strong=None,
        second_strong=None,
    )
    return comatch_assign(memory, x, THRESHOLD)


def toy_head(params, features):
    """Applies the head to all views: outputs [B, V, 5], and the statistics of the batch."""
    head = params["heads"]["projection"]
    x = features.reshape(-1, D) @ head["first"]["kernel"]
    mean, var = jnp.mean(x, axis=0), jnp.var(x, axis=0)
    x = (x - mean[None]) / jnp.sqrt(var + EPSILON)[None]
    x = jnp.tanh(x * head["norm"]["scale"][None] + head["norm"]["bias"][None])
    x = x @ head["last"]["kernel"] + head["last"]["bias"][None]
    return x.reshape(B, -1, WIDTH), mean, var


def with_turned(params, batch):
    """Adds the view that the toy makes; the network sees only the weak views for it."""
    strong, weak = (batch.images[:, v : v + MU].reshape(-1, SIDE, SIDE, 3) for v in (2, 2 + MU))
    features = backbone({"params": params["backbone"], "batch_stats": {}}, weak / 255, train=True)
    logits = logits_of(params["classifier"], features)
    made = turned(weak, strong, logits, batch.draws["order"], 0).reshape(B, MU, SIDE, SIDE, 3)
    assert 0.1 < np.mean(logits.argmax(-1) == batch.draws["order"].reshape(-1) % K) < 0.9
    parts = [batch.images[:, : 2 + MU], made, batch.images[:, 2 + MU :]]
    return batch._replace(images=np.concatenate(parts, axis=1))


def toy_objective(params, batch, constants, weight):
    """The toy's objective; λ_u · scale = weight. Labeled weak, strong; μ strong, made, weak."""
    features = features_by_position(params, batch._replace(images=constants["images"]))
    compared, _, _ = toy_head(params, features)
    strong, made = (compared[:, v : v + MU].reshape(-1, WIDTH) for v in (2, 2 + MU))
    extra = agreement(compared[:, 1], made, strong, batch.draws["direction"], batch.draws["order"])
    loss_u = unsupervised(params, rows(features, 2), constants["targets"], constants["weights"])
    return supervised(params, features[:, :2], batch) + weight * (loss_u + extra)


def toy_constants(params, batch):
    batch = with_turned(params, batch)
    weak = rows(features_by_position(params, batch), 2 + 2 * MU)
    q = softmax(logits_of(params["classifier"], weak))
    constants = {"targets": np.eye(K)[q.argmax(-1)], "weights": q.max(-1) >= THRESHOLD, "q": q}
    return constants | {"images": batch.images}


RTOL = 1e-9


def assert_trees_close(actual, expected):
    """Asserts equality up to 1e-9 of the largest number in each leaf."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        scale = np.abs(b).max()
        # The bias before BatchNorm has no gradient.
        assert scale > 1e-4 or "['stem']['bias']" in name, f"{name}: a gradient of 0 tests nothing"
        np.testing.assert_allclose(a, b, rtol=0, atol=RTOL * scale + 1e-12, err_msg=name)


@pytest.fixture(scope="module")
def comatch_run():
    """Runs seven steps of CoMatch: (state before the last, its batch, the oracle's result)."""
    with jax.enable_x64(True):
        method, current = problem("comatch")
        step, memory = compiled("comatch", ()), {}
        for count in range(7):
            batch = batch_of(method, count)
            constants = comatch_constants(current.params, batch, memory)
            assert constants["margin"] > 1e-6
            if count < 6:
                current, _ = step(current, batch, 0.75)
        assert 0 < np.mean(constants["weights"]) < 1
        assert 0 < constants["edges"] < 1
        return jax.device_get(current), batch, constants


@pytest.fixture(scope="module")
def toy_run():
    """Returns the same for the first step of the toy policy."""
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.POLICIES, "toy", TOY)
        method, current = problem("toy")
        batch = batch_of(method)
        constants = toy_constants(current.params, batch)
        assert_informative(constants.pop("q"))
        return jax.device_get(current), batch, constants


@functools.cache
def compiled(name, mask):
    """Makes the step of a policy with a mask: (state, batch, λ_u) -> (state, metrics)."""
    method, _ = problem(name, layerwise__gradient_mask=mask)
    return jax.jit(
        lambda state, batch, weight: steps.train_step(
            state, batch, method=method._replace(unsupervised_weight=weight)
        )
    )


OBJECTIVES = {
    "comatch": (jax.jit(jax.grad(comatch_objective)), 1.0),
    "toy": (jax.jit(jax.grad(toy_objective)), TOY_SCALE),
}


@pytest.fixture(params=OBJECTIVES)
def case(request, float64):
    """Makes two functions: the gradient that a step computes, and that of its objective."""
    name = request.param
    by_params, scale = OBJECTIVES[name]
    current, batch, constants = request.getfixturevalue(f"{name}_run")

    def gradient(mask=(), weight=0.75, **changed):
        new, _ = compiled(name, mask)(current, batch._replace(**changed), weight)
        return jax.device_get(new.opt_state)

    def expected(weight=0.75, **changed):
        arguments = batch._replace(**changed), constants, weight * scale
        return jax.device_get(by_params(current.params, *arguments))

    return gradient, expected


def test_a_step_follows_the_gradient_of_one_objective(case):
    gradient, expected = case
    assert_trees_close(gradient(), expected())


def test_the_own_head_learns_from_the_unsupervised_loss_alone(case):
    gradient, expected = case
    own = gradient()["heads"]
    doubled = gradient(weight=1.5)["heads"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-9), doubled, own)
    jax.tree.map(lambda a: np.testing.assert_array_equal(a, 0), gradient(weight=0.0)["heads"])
    # Other labels change the gradient of the classifier, but no bit of that of the policy head.
    labels = np.arange(B, dtype=np.int32) % K
    relabeled = gradient(labels=labels)
    jax.tree.map(np.testing.assert_array_equal, relabeled["heads"], own)
    assert_trees_close(relabeled, expected(labels=labels))
    change = relabeled["classifier"]["bias"] - gradient()["classifier"]["bias"]
    assert np.abs(change).max() > 0.05


@pytest.mark.parametrize(
    "case", ["comatch", pytest.param("toy", marks=pytest.mark.slow)], indirect=True
)
def test_grad_relu_leaves_the_own_head_alone(case):
    gradient, expected = case
    gated, both = gradient(GRAD_RELU), expected()
    for part in ("heads", "backbone"):
        assert_trees_close(gated[part], both[part])
    assert_trees_close(gated["classifier"], expected(0.0)["classifier"])


def test_a_mask_may_name_the_own_head(case):
    gradient, expected = case
    # With a mask inside the backbone, the two losses are pulled back separately.
    gated = gradient((("heads/projection/.*", 0.0), ("backbone/stem/.*", 0.0)))
    both, labels = expected(), expected(0.0)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), gated["heads"])
    both["backbone"]["stem"] = labels["backbone"]["stem"]
    assert_trees_close(gated["backbone"], both["backbone"])
    assert_trees_close(gated["classifier"], both["classifier"])


def test_the_own_heads_batch_norm_and_the_policys_state_move(float64, toy_run):
    current, batch, _ = toy_run
    new, metrics = compiled("toy", ())(current, batch, 0.75)
    features = features_by_position(current.params, with_turned(current.params, batch))
    _, mean, var = toy_head(current.params, features)
    norm = new.head_stats["projection"]["norm"]
    np.testing.assert_allclose(norm["mean"], 0.1 * mean, rtol=RTOL)  # from 0
    np.testing.assert_allclose(norm["var"], 0.9 + 0.1 * var, rtol=RTOL)  # from 1
    np.testing.assert_array_equal(new.policy["visits"], np.ones(B))  # each image once
    np.testing.assert_allclose(new.policy["seen"], batch.draws["direction"].sum(), rtol=1e-6)
    assert {"loss_unsupervised", "loss_agreement"} <= set(metrics)
