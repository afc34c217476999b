"""Compares VAT with the formulas of its paper (Miyato 2018, section 3) in NumPy float64."""

import functools

import builders
import jax
import jax.numpy as jnp
import numpy as np
import optax
from builders import MU, SIDE, B, K
from comatch_test import finite_differences
from oracles import softmax

from layermatch_jax import automatic, presets
from layermatch_jax.batches import TrainBatch
from layermatch_jax.method import assembly, policies, steps
from layermatch_jax.method.policies import vat
from layermatch_jax.views import MADE, ByView, Layout

RADIUS, ENTROPY_WEIGHT, STEPS, RAMP, DONE = 0.7, 0.3, 20, 0.4, 3  # DONE: steps before the test
SCALE = DONE / (RAMP * STEPS)
ROWS = B * MU


def make(**fields):
    fields = {"policy__radius": RADIUS, "policy__entropy_weight": ENTROPY_WEIGHT} | fields
    config = builders.make_config(
        "vat", train_steps=STEPS, policy__ramp=RAMP, dataset__image_size=SIDE, **fields
    )
    return config, policies.create(config)


# ---------------------------------------------------------------- the formulas, and a network


def features_of(lib, backbone, images):
    """A smooth network with BatchNorm: features [n, D] depend on all rows. lib: np or jnp."""
    x = images.reshape(len(images), -1) @ backbone["stem"]["kernel"]
    x = (x - x.mean(0)[None]) / lib.sqrt(x.var(0)[None] + 1e-3)
    return lib.tanh(x) @ backbone["block"]["kernel"]


def network(lib, params, images):
    classifier = params["classifier"]
    features = features_of(lib, params["backbone"], images)
    return features @ classifier["kernel"] + classifier["bias"][None]


def divergence(logits, changed):
    """Computes KL(p ‖ q) for each row."""
    p, q = softmax(logits), softmax(changed)
    return (p * (np.log(p) - np.log(q))).sum(-1)


def entropy(logits):
    return -(softmax(logits) * np.log(softmax(logits))).sum(-1)


def lengths(x):
    return np.sqrt((x.reshape(len(x), -1) ** 2).sum(1)).reshape(-1, 1, 1, 1)


def curvature_along(params, images, direction, step=1e-4):
    """Computes H·d by differences; H is the Hessian of Σ KL in the change r at r = 0."""
    clean = network(np, params, images)
    total = lambda r: divergence(clean, network(np, params, images + r)).sum()  # noqa: E731
    ahead, behind = (finite_differences(total, s * direction, step) for s in (step, -step))
    return (ahead - behind) / (2 * step)


def adversarial(params, images, directions):
    """Computes x + ε·Hd/‖Hd‖, with d of length 1."""
    change = curvature_along(params, images, directions / lengths(directions))
    return images + RADIUS * change / lengths(change)


def problem(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    params = jax.tree.map(np.asarray, builders.make_params())
    params = {**params, "classifier": jax.tree.map(lambda p: 3 * p, params["classifier"])}
    return params, rng.random((rows, SIDE, SIDE, 3)), rng.normal(size=(rows, SIDE, SIDE, 3))


# ---------------------------------------------------------------- the adversarial view


def test_what_it_asks_of_the_step():
    _, policy = make()
    assert dict(policy.views.labeled) == {"weak": "weak"}
    assert dict(policy.views.unlabeled) == {"weak": "weak", "adversarial": MADE}
    assert (policy.target_view, policy.needs_teacher, dict(policy.heads)) == ("weak", False, {})
    assert not policy.pseudo_labels
    assert Layout(policy.views, MU).drawn.size == 1 + MU
    directions = policy.draws(np.random.default_rng(0), B, MU)
    assert (directions.shape, directions.dtype) == ((B, MU, SIDE, SIDE, 3), np.float32)
    assert abs(directions.mean()) < 0.3
    assert abs(directions.std() - 1) < 0.2
    config = automatic.resolve(presets.apply_method(builders.config_lib.base(), "vat"))
    assert (config.unsupervised_weight, config.unlabeled_ratio) == (0.3, 1)
    settings = config.policy
    assert (settings.radius, settings.entropy_weight, settings.ramp) == (6, 0.2, 0.4)


def test_the_adversarial_view_is_one_power_iteration_away(float64):
    params, images, directions = problem()
    _, policy = make()
    apply = functools.partial(network, jnp, params)
    views = ByView({"weak": -images[::MU]}, {"weak": jnp.array(images)})
    made = jax.jit(
        lambda draws: policy.prepare(apply, views, draws, policy.init(builders.make_spec(K)))
    )
    found = made(jnp.array(directions.reshape(B, MU, SIDE, SIDE, 3)))
    assert found.keys() == {"adversarial"}
    expected = adversarial(params, images, directions)
    np.testing.assert_allclose(lengths(found["adversarial"] - images), RADIUS, rtol=1e-9)
    np.testing.assert_allclose(found["adversarial"], expected, atol=1e-5 * RADIUS)
    # Predictions change more in this direction than in the Gaussian one.
    clean = network(np, params, images)
    along = images + RADIUS * directions / lengths(directions)
    changes = [divergence(clean, network(np, params, x)).mean() for x in (expected, along)]
    assert changes[0] > 1.5 * changes[1]


def test_many_power_iterations_end_at_the_direction_of_largest_curvature(float64):
    params, images, d = problem(rows=3)
    params = {**params, "classifier": {**params["classifier"], "bias": np.array([0.5, -0.3, 0.0])}}
    units = np.eye(images.size).reshape(-1, *images.shape)
    matrix = np.stack([curvature_along(params, images, u).ravel() for u in units])
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-7)
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    assert 0 < values[-2] < 0.9 * values[-1]
    apply = functools.partial(network, jnp, params)
    step = jax.jit(lambda d: vat.curvature(apply, jnp.array(images), d))
    for _ in range(100):
        product = step(d)
        d = product / jnp.linalg.norm(product)
    np.testing.assert_allclose(abs(np.vdot(d, vectors[:, -1])), 1, rtol=1e-9)
    np.testing.assert_allclose(jnp.linalg.norm(product), values[-1], rtol=1e-5)


def test_directions_of_any_length_and_none():
    x = np.zeros((4, 2, 2, 3), np.float32)
    x[0, 0, 1, 2], x[1, 1, 0, :2], x[2, 0] = -7, 3e-30, 1e30
    expected = np.zeros_like(x)
    expected[0, 0, 1, 2], expected[1, 1, 0, :2], expected[2, 0] = -1, 2**-0.5, 6**-0.5
    np.testing.assert_allclose(jax.jit(vat.unit)(x), expected, rtol=1e-6)


# ---------------------------------------------------------------- the loss


def inputs_of(logits):
    decoy = {name: x[::-1] for name, x in logits.items()}  # not the logits that the loss takes
    return policies.Inputs(
        target_logits=logits,
        outputs=policies.Outputs(decoy, {}),
        labeled_logits={"weak": np.zeros((B, K), np.float32)},
        labels=np.arange(B, dtype=np.int32) % K,
        labeled_indices=np.arange(B, dtype=np.int32),
        unlabeled_indices=np.arange(ROWS, dtype=np.int32),
    )


def test_the_loss_over_the_steps():
    _, policy = make()
    state, rng = policy.init(builders.make_spec(K)), np.random.default_rng(0)
    for count in range(10):
        names = policy.views.unlabeled
        logits = {name: np.float32(3 * rng.normal(size=(ROWS, K))) for name in names}
        heads = {name: x + np.float32(rng.normal(size=x.shape)) for name, x in logits.items()}
        assignment = policy.assign(state, inputs_of(logits))
        terms = policy.loss(policies.Outputs(heads, {}), assignment)
        np.testing.assert_allclose(assignment.scale, min(count / (RAMP * STEPS), 1), rtol=1e-6)
        np.testing.assert_allclose(assignment.targets, softmax(logits["weak"]), rtol=1e-5)
        np.testing.assert_array_equal(assignment.weights, np.ones(ROWS))
        assert terms.keys() == {"unsupervised", "entropy"}
        expected = divergence(logits["weak"], heads["adversarial"]).mean()
        np.testing.assert_allclose(terms["unsupervised"], expected, rtol=1e-5)
        expected = ENTROPY_WEIGHT * entropy(heads["weak"]).mean()
        np.testing.assert_allclose(terms["entropy"], expected, rtol=1e-5)
        state = assignment.state


def test_sure_rows_and_unchanged_ones():
    _, policy = make()
    state = policy.init(builders.make_spec(K))
    sure = np.float32(1e4 * np.eye(K)[np.arange(ROWS) % K])
    for changed in (sure, sure / 2):  # equally confident, with other logits
        logits = {"weak": sure, "adversarial": changed}
        terms = policy.loss(policies.Outputs(logits, {}), policy.assign(state, inputs_of(logits)))
        assert terms == {"unsupervised": 0, "entropy": 0}


def test_gradients_are_those_of_the_formulas_and_the_target_is_a_constant(float64):
    _, policy = make()
    rng = np.random.default_rng(1)
    logits = {name: 2 * rng.normal(size=(ROWS, K)) for name in ("weak", "adversarial")}
    assignment = policy.assign(policy.init(builders.make_spec(K)), inputs_of(logits))

    @jax.jit
    @jax.grad
    def gradient(x):
        return sum(policy.loss(policies.Outputs(x, {}), assignment).values())

    found = gradient(jax.tree.map(jnp.float64, logits))
    expected = {
        "adversarial": finite_differences(
            lambda x: divergence(logits["weak"], x).mean(), logits["adversarial"]
        ),
        "weak": finite_differences(lambda x: ENTROPY_WEIGHT * entropy(x).mean(), logits["weak"]),
    }
    for name, of_view in expected.items():
        assert np.abs(of_view).max() > 1e-3
        np.testing.assert_allclose(found[name], of_view, rtol=2e-6, atol=1e-9)


# ---------------------------------------------------------------- the whole step


def backbone(variables, images, train, mutable):
    del train, mutable
    return features_of(jnp, variables["params"], images), {}


def objective(params, images, labels, targets, strength):
    """Computes L_s + strength · (KL + w · entropy). Images: labeled, weak, adversarial."""
    logits = network(jnp, params, images.reshape(-1, SIDE, SIDE, 3)).reshape(B, 1 + 2 * MU, K)
    weak, changed = (logits[:, 1 + v * MU : 1 + (v + 1) * MU].reshape(-1, K) for v in (0, 1))
    log_p, log_q = jax.nn.log_softmax(weak), jax.nn.log_softmax(changed)
    loss_s = optax.softmax_cross_entropy_with_integer_labels(logits[:, 0], labels).mean()
    kl = jnp.sum(targets * (jnp.log(targets) - log_q), axis=-1).mean()
    sureness = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1).mean()
    return loss_s + strength * (kl + ENTROPY_WEIGHT * sureness), kl


def test_a_step_follows_the_gradient_of_its_objective(float64):
    config, policy = make(unsupervised_weight=2.0, parallelism="jit")
    rng = np.random.default_rng(2)
    batch = TrainBatch(
        images=rng.integers(256, size=(B, 1 + MU, SIDE, SIDE, 3), dtype=np.uint8),
        labels=np.arange(B, dtype=np.int32) % K,
        labeled_indices=np.arange(B, dtype=np.int32),
        unlabeled_indices=np.arange(ROWS, dtype=np.int32).reshape(B, MU),
        true_labels=rng.integers(-1, K, (B, MU), dtype=np.int32),
        draws=policy.draws(rng, B, MU),
    )
    params, _, _ = problem()
    del params["backbone"]["stem"]["bias"]  # this network has none
    method = assembly.create_method(config, params, ((0.0,) * 3, (1.0,) * 3))
    start = builders.make_state(jax.tree.map(jnp.array, params), method, apply_fn=backbone)
    start = start.replace(
        policy={"step": jnp.int32(DONE)},
        batch_stats={},
        ema_params=jax.tree.map(lambda p: p + 0.1, start.params),  # VAT does not use it
    )
    new, metrics = jax.jit(functools.partial(steps.train_step, method=method))(start, batch)

    # By hand: the network makes the view from the weak views only; the target comes from the pass.
    drawn = batch.images / 255
    weak = drawn[:, 1:].reshape(ROWS, SIDE, SIDE, 3)
    made = adversarial(params, weak, np.float64(batch.draws.reshape(weak.shape)))
    images = np.concatenate([drawn, made.reshape(B, MU, SIDE, SIDE, 3)], axis=1)
    logits = network(np, params, images.reshape(-1, SIDE, SIDE, 3)).reshape(B, 1 + 2 * MU, K)
    targets = softmax(logits[:, 1 : 1 + MU].reshape(ROWS, K))
    by_params = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (_, kl), expected = by_params(params, images, batch.labels, targets, 2.0 * SCALE)
    assert kl > 0.1
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(new.opt_state), jax.tree.leaves(expected), strict=True
    ):
        scale = np.abs(b).max()
        assert scale > 1e-3
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale, err_msg=name)
    np.testing.assert_allclose(metrics["loss_unsupervised"][0], kl, rtol=1e-5)
    assert metrics["mask_rate"][0] / metrics["mask_rate"][1] == 1
    assert new.policy["step"] == DONE + 1
