"""Compares CoMatch with its paper (Li, Xiong and Hoi 2021), written in NumPy float64.

Where the paper leaves details open, this follows the authors' code: alignment comes before
smoothing, and each embedding of the first strong view is compared with all of the second one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import cross_entropy, log_softmax, norm, softmax

from layermatch_jax import automatic, presets
from layermatch_jax import config as config_lib
from layermatch_jax.method import policies
from layermatch_jax.views import ByView

DIM = 64  # of an embedding
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}  # float32


class Batch(NamedTuple):
    """The inputs of CoMatch. Embeddings have unit length."""

    weak_logits: np.ndarray  # [μB, K]
    strong_logits: np.ndarray  # [μB, K], of the first strong view
    labels: np.ndarray  # [B]
    labeled: np.ndarray  # [B, 64], embeddings of the labeled images
    weak: np.ndarray  # [μB, 64], and of the unlabeled ones
    strong: np.ndarray  # [μB, 64]
    second_strong: np.ndarray  # [μB, 64]


# ---------------------------------------------------------------- the paper


def assign(s, x, threshold):
    """Computes pseudo-labels p, their weights and the graph. Changes the memory in `s`."""
    K = x.weak_logits.shape[-1]
    raw = softmax(x.weak_logits)
    s.setdefault("means", []).append(raw.mean(0))
    mean = np.mean(s["means"][-32:], axis=0)
    aligned = norm(np.divide(raw, mean, where=mean > 0, out=np.zeros_like(raw)))
    p, memory = aligned, s.setdefault("memory", [])
    if len(memory) >= 5:
        embeddings = np.concatenate([z for z, _ in memory[-5:]])
        probabilities = np.concatenate([of_z for _, of_z in memory[-5:]])
        p = 0.9 * aligned + 0.1 * softmax(np.float64(x.weak) @ embeddings.T / 0.2) @ probabilities
    memory.append(
        (
            np.concatenate([x.weak, x.labeled]).astype(np.float64),
            np.concatenate([aligned, np.eye(K)[x.labels]]),
        )
    )
    similar = p @ p.T
    np.fill_diagonal(similar, 1.0)
    off_diagonal = similar[~np.eye(len(p), dtype=bool)]
    return {
        "targets": p,
        "weights": p.max(-1) >= threshold,
        "graph": norm(np.where(similar >= 0.8, similar, 0.0)),
        "edges": (off_diagonal >= 0.8).mean() if len(p) > 1 else 0.0,
        "margin": min(
            np.abs(p.max(-1) - threshold).min(), np.abs(off_diagonal - 0.8).min(initial=1.0)
        ),
    }


def classification_loss(strong_logits, assignment):
    return (assignment["weights"] * cross_entropy(strong_logits, assignment["targets"])).mean()


def contrastive_loss(strong, second_strong, graph):
    return -(graph * log_softmax(strong @ second_strong.T / 0.2)).sum(-1).mean()


# ---------------------------------------------------------------- batches


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw(rng, B=6, mu=4, K=10):
    """Makes a random batch with classes of similar images, some easy and some hard."""
    rows, labels = mu * B, rng.integers(K, size=B)
    centers = unit(np.random.default_rng(K).normal(size=(K, DIM)))
    classes = rng.choice(min(K, 5), size=rows)  # few, for pairs; the others are in the labels
    closeness = rng.choice([0.05, 0.3, 1.0], size=(rows, 1))
    confidence = rng.choice([1.0, 4.0, 20.0], size=(rows, 1), p=[0.15, 0.25, 0.6])

    def embeddings(of, noise):
        return unit(centers[of] + noise * unit(rng.normal(size=(len(of), DIM)))).astype(np.float32)

    def logits():
        return confidence * np.eye(K)[classes] + rng.normal(size=(rows, K))

    return Batch(
        weak_logits=logits().astype(np.float32),
        strong_logits=logits().astype(np.float32),
        labels=labels.astype(np.int32),
        labeled=embeddings(labels, 0.3),
        weak=embeddings(classes, closeness),
        strong=embeddings(classes, closeness),
        second_strong=embeddings(classes, closeness),
    )


def expect(batches, threshold):
    s = {}
    return [assign(s, x, threshold) for x in batches]


def settle(make_batches, threshold, margin=1e-5):
    """Finds batches in which rounding decides nothing; returns them and the expected results."""
    for seed in range(200):
        batches = make_batches(np.random.default_rng(seed))
        assignments = expect(batches, threshold)
        if min(assignment["margin"] for assignment in assignments) > margin:
            return batches, assignments
    raise AssertionError("no seed keeps all rows and edges away from their thresholds")


# ---------------------------------------------------------------- the policy


def outputs_of(x):
    """Makes Inputs; views that the loss must not use hold other numbers."""
    noise = np.random.default_rng(5).normal(size=x.weak_logits.shape).astype(np.float32)
    embeddings = {"weak": x.weak, "strong": x.strong, "second_strong": x.second_strong}
    return policies.Outputs(
        logits={"weak": -noise, "strong": x.strong_logits, "second_strong": noise},
        heads={"projection": ByView({"weak": x.labeled}, embeddings)},
    )


def inputs_of(x):
    rows, B = len(x.weak_logits), len(x.labels)
    outputs = outputs_of(x)
    return policies.Inputs(
        target_logits=outputs.logits | {"weak": x.weak_logits},
        outputs=outputs,
        labeled_logits={"weak": np.zeros((B, x.weak_logits.shape[1]), np.float32)},
        labels=x.labels,
        labeled_indices=np.arange(B, dtype=np.int32),
        unlabeled_indices=np.arange(rows, dtype=np.int32),
    )


@functools.cache
def make(threshold=0.95):
    """(policy, its assignment and its loss's terms, compiled)."""
    config = presets.apply_method(config_lib.base(), "comatch")
    config.policy.threshold = threshold
    policy = policies.create(automatic.resolve(config))

    def assignment_of(state, x):
        assignment = policy.assign(state, inputs_of(x))
        return assignment, policy.loss(outputs_of(x), assignment)

    return policy, jax.jit(assignment_of)


def first_state(policy, x):
    B, K = len(x.labels), x.weak_logits.shape[-1]
    return policy.init(
        policies.Spec(
            num_classes=K,
            feature_dim=7,
            batch_size=B,
            unlabeled_ratio=len(x.weak_logits) // B,
            num_unlabeled=1000,
            labels=np.arange(50, dtype=np.int32) % K,
        )
    )


def check(assignment, terms, want, x):
    rows, K = x.weak_logits.shape
    assert (assignment.targets.shape, assignment.targets.dtype) == ((rows, K), np.float32)
    np.testing.assert_allclose(assignment.targets, want["targets"], **TOLERANCE)
    np.testing.assert_array_equal(assignment.weights, want["weights"])
    np.testing.assert_array_equal(assignment.labeled_weights, np.ones(len(x.labels)))
    assert assignment.scale == 1
    assert set(terms) == {"unsupervised", "contrast"}
    np.testing.assert_allclose(
        terms["unsupervised"], classification_loss(x.strong_logits, want), **TOLERANCE
    )
    contrast = contrastive_loss(np.float64(x.strong), np.float64(x.second_strong), want["graph"])
    np.testing.assert_allclose(terms["contrast"], contrast, rtol=1e-5, atol=1e-5)
    for leaf in jax.tree.leaves(assignment):
        assert np.isfinite(leaf).all()


def follow(batches, assignments, threshold):
    """Runs the policy over the batches and checks every step; returns the last state."""
    policy, assignment_of = make(threshold)
    state = first_state(policy, batches[0])
    for step, (x, want) in enumerate(zip(batches, assignments, strict=True)):
        assignment, terms = jax.device_get(assignment_of(state, x))
        try:
            check(assignment, terms, want, x)
        except AssertionError as error:
            raise AssertionError(f"step {step}: {error}") from error
        state = assignment.state
    return state


# ---------------------------------------------------------------- tests


def test_what_it_asks_of_the_step():
    policy, _ = make()
    assert dict(policy.views.labeled) == {"weak": "weak"}
    kinds = {"weak": "weak", "strong": "strong", "second_strong": "strong"}
    assert dict(policy.views.unlabeled) == kinds
    assert (policy.target_view, policy.needs_teacher, policy.draws) == ("weak", False, None)
    assert set(policy.heads) == {"projection"}


def test_the_projection_is_two_layers_and_of_unit_length():
    D, K = 6, 3
    head = make()[0].heads["projection"](D, K, None)
    x = np.random.default_rng(0).normal(size=(5, D)).astype(np.float32)
    z, variables = head.init_with_output(jax.random.key(0), x, train=True)
    leaves = jax.tree.leaves(variables["params"])
    assert set(variables) == {"params"}
    assert sorted(leaf.shape for leaf in leaves) == [(D,), (D, D), (D, DIM), (DIM,)]
    by_shape = {leaf.shape: np.float64(leaf) for leaf in leaves}
    nudged = jax.tree.map(lambda p: p + 0.1 * (p.ndim == 1), variables)  # biases start at 0
    hidden = x @ by_shape[D, D] + by_shape[D,] + 0.1
    expected = unit(np.where(hidden > 0, hidden, 0.1 * hidden) @ by_shape[D, DIM] + 0.1)
    np.testing.assert_allclose(head.apply(nudged, x, train=True), expected, **TOLERANCE)
    np.testing.assert_allclose(np.linalg.norm(z, axis=-1), 1, rtol=1e-6)
    assert np.isfinite(head.apply(variables, 0 * x, train=True)).all()


@pytest.mark.parametrize(("threshold", "K"), [(0.95, 10), (0.7, 10), (0.95, 100)])
def test_follows_its_formulas_over_many_steps(threshold, K):
    steps = 13  # from the sixth on the memory is used; it is overwritten twice
    batches, assignments = settle(lambda rng: [draw(rng, K=K) for _ in range(steps)], threshold)
    follow(batches, assignments, threshold)
    for part in (assignments[:5], assignments[5:]):  # some rows are accepted and some are not
        assert 0.1 <= np.mean([assignment["weights"] for assignment in part]) <= 0.9
        assert 0.02 <= np.mean([assignment["edges"] for assignment in part]) <= 0.9


def test_alignment_looks_back_over_thirty_two_batches():
    def make_batches(rng):
        # Class frequencies change slowly, so forgotten batches matter.
        batches = [draw(rng, B=2, mu=2, K=3) for _ in range(45)]
        drift = 3 * np.cos(np.arange(45) / 10)
        return [
            x._replace(weak_logits=x.weak_logits + np.float32(d) * (np.arange(3) == 1))
            for x, d in zip(batches, drift, strict=True)
        ]

    batches, assignments = settle(make_batches, 0.7)
    follow(batches, assignments, 0.7)
    # The formulas and the policy both forget all but the last 32 + 4 batches.
    probe = batches[0]
    policy, assignment_of = make(0.7)

    def after(some):
        state = first_state(policy, probe)
        for x in some:
            state = assignment_of(state, x)[0].state
        return np.array(assignment_of(state, probe)[0].targets)

    everything = after(batches)
    np.testing.assert_allclose(after(batches[-36:]), everything, rtol=1e-5, atol=1e-6)
    assert np.abs(after(batches[-31:]) - everything).max() > 1e-4  # the batch before these matters


def unsure(x):
    return x._replace(weak_logits=0 * x.weak_logits)


def one_class(x):
    def only(logits):
        return logits + np.float32(30) * (np.arange(logits.shape[-1]) == 3)

    return x._replace(
        weak_logits=only(x.weak_logits),
        strong_logits=only(x.strong_logits),
        labels=np.full_like(x.labels, 3),
    )


def absent_class(x):
    """Sets the probability of class 0 to 0, also in float64."""
    absent = np.where(np.arange(10) == 0, np.float32(-1e4), 0)
    return x._replace(weak_logits=x.weak_logits + absent)


def one_image(x):
    """Makes all embeddings equal."""
    return x._replace(
        **{
            name: np.broadcast_to(x.weak[:1], getattr(x, name).shape)
            for name in ("labeled", "weak", "strong", "second_strong")
        }
    )


def opposite(x):
    """Makes the embeddings of the second strong view opposite to those of the first."""
    return x._replace(second_strong=-x.strong)


@pytest.mark.parametrize("case", [unsure, one_class, absent_class, one_image, opposite])
def test_follows_its_formulas_in_degenerate_batches(case):
    def make_batches(rng):
        return [case(draw(rng)) for _ in range(7)] + [draw(rng)]

    batches, assignments = settle(make_batches, 0.95)
    follow(batches, assignments, 0.95)
    if case is unsure:
        for assignment in assignments[:7]:
            assert not assignment["weights"].any()
            np.testing.assert_array_equal(assignment["graph"], np.eye(24))


@pytest.mark.parametrize("mu", [1, 4])
def test_one_labeled_row_is_enough(mu):
    batches, assignments = settle(lambda rng: [draw(rng, B=1, mu=mu) for _ in range(12)], 0.95)
    follow(batches, assignments, 0.95)
    if mu == 1:  # the row is compared only with itself
        assert contrastive_loss(batches[0].strong, batches[0].second_strong, np.eye(1)) == 0


def test_without_unlabeled_images_there_is_no_loss_and_all_stays_finite():
    """Supervised training, λ_u = 0, has no unlabeled rows."""
    x = draw(np.random.default_rng(0), B=2, mu=0)
    policy, assignment_of = make()
    assignment, terms = jax.device_get(assignment_of(first_state(policy, x), x))
    assert {name: float(value) for name, value in terms.items()} == {
        "unsupervised": 0,
        "contrast": 0,
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(assignment):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)


# The memory, computed by hand. Two labeled and two unlabeled images a step, four classes. Each of
# the 20 images in the memory has another basis vector as its embedding.


def basis(*directions):
    return np.eye(DIM, dtype=np.float32)[list(directions)]


def plain(step, labels, weak, weak_logits=None):
    logits = np.zeros((2, 4), np.float32) if weak_logits is None else np.float32(weak_logits)
    return Batch(
        weak_logits=logits,
        strong_logits=np.zeros((2, 4), np.float32),
        labels=np.array(labels, np.int32),
        labeled=basis(4 * step, 4 * step + 1),
        weak=weak,
        strong=basis(0, 1),
        second_strong=basis(0, 1),
    )


def own(step):
    """Returns the embeddings of the unlabeled images of a step."""
    return basis(4 * step + 2, 4 * step + 3)


def test_labeled_images_enter_the_memory_with_their_labels():
    _, assignment_of = make()
    labels = [(0, 1), (2, 3), (0, 1), (2, 3), (0, 3)]  # 3, 2, 2 and 3 times
    state = first_state(make()[0], plain(0, (0, 1), own(0)))
    for step, of_step in enumerate(labels):
        assignment, _ = assignment_of(state, plain(step, of_step, own(step)))
        np.testing.assert_allclose(
            assignment.targets, np.full((2, 4), 0.25), rtol=1e-6
        )  # not yet full
        state = assignment.state
    # Query with the embedding of the first labeled image of the second step, which has class 2, and
    # with an embedding that is not in the memory. Before normalization, the similarity is e⁵ to the
    # same embedding and 1 to the others. The ten unlabeled images have (¼, ¼, ¼, ¼) in the memory.
    queries = np.concatenate([basis(4), basis(60)])
    assignment, _ = assignment_of(state, plain(5, (0, 0), queries))
    e5 = np.exp(5.0)
    counts = np.array([3, 2, 2, 3]) + 10 * 0.25
    like = (counts + (e5 - 1) * np.eye(4)[2]) / (e5 + 19)
    expected = 0.9 * 0.25 + 0.1 * np.stack([like, counts / 20])
    np.testing.assert_allclose(assignment.targets, expected, rtol=1e-5)


def test_a_row_at_the_threshold_is_accepted():
    policy, assignment_of = make(0.25)
    x = plain(0, (0, 1), own(0))  # four equal logits
    assignment, _ = assignment_of(first_state(policy, x), x)
    np.testing.assert_array_equal(assignment.weights, [1, 1])


def test_probabilities_are_remembered_before_smoothing_and_after_alignment():
    _, assignment_of = make()
    state = first_state(make()[0], plain(0, (0, 0), own(0)))
    for step in range(5):
        state = assignment_of(state, plain(step, (0, 0), own(step)))[0].state
    # Smoothing moves the rows of the sixth step toward class 0; the memory keeps ¼ for each class.
    assignment, _ = assignment_of(state, plain(5, (0, 0), own(5)))
    assert (np.asarray(assignment.targets)[:, 0] > 0.28).all()
    assignment, _ = assignment_of(assignment.state, plain(6, (0, 0), own(5)))
    e5 = np.exp(5.0)
    counts = np.array([10, 0, 0, 0]) + 10 * 0.25
    like = (counts + (e5 - 1) * 0.25) / (e5 + 19)
    np.testing.assert_allclose(
        assignment.targets, np.stack([0.9 * 0.25 + 0.1 * like] * 2), rtol=1e-5
    )

    # If all rows predict class 1, alignment makes them ¼ each, already in the first step.
    state = first_state(make()[0], plain(0, (0, 0), own(0)))
    says_one = np.log([[0.1, 0.7, 0.1, 0.1]] * 2)
    for step in range(5):
        assignment, _ = assignment_of(state, plain(step, (0, 0), own(step), says_one))
        np.testing.assert_allclose(assignment.targets, np.full((2, 4), 0.25), rtol=1e-5)
        state = assignment.state
    assignment, _ = assignment_of(state, plain(5, (0, 0), own(4), says_one))
    np.testing.assert_allclose(
        assignment.targets, np.stack([0.9 * 0.25 + 0.1 * like] * 2), rtol=1e-5
    )


def finite_differences(f, x, step=1e-5):
    x = np.float64(x)
    nudges = step * np.eye(x.size).reshape(-1, *x.shape)
    return np.array([f(x + n) - f(x - n) for n in nudges]).reshape(x.shape) / (2 * step)


def test_gradients_are_those_of_the_formulas():
    def make_batches(rng):
        return [draw(rng, B=2, mu=6, K=5) for _ in range(7)]

    batches, assignments = settle(make_batches, 0.95)
    x, want = batches[-1], assignments[-1]
    assert 0 < want["edges"] < 1
    assert 0 < np.mean(want["weights"]) < 1
    state = follow(batches[:-1], assignments[:-1], 0.95)
    policy, _ = make()
    with jax.enable_x64(True):
        to_float64 = lambda a: jnp.float64(a) if a.dtype == np.float32 else a  # noqa: E731

        @jax.jit
        def gradients(state, x, outputs):
            assignment = policy.assign(state, inputs_of(x))
            return {
                name: jax.grad(lambda outputs: policy.loss(outputs, assignment)[name])(outputs)  # noqa: B023
                for name in ("unsupervised", "contrast")
            }

        by_term = gradients(*jax.tree.map(to_float64, (state, x, outputs_of(x))))
    by_term = jax.device_get(by_term)
    z, z2, graph = np.float64(x.strong), np.float64(x.second_strong), want["graph"]
    expected = {
        "unsupervised": {
            "logits": finite_differences(lambda a: classification_loss(a, want), x.strong_logits)
        },
        "contrast": {
            "strong": finite_differences(lambda a: contrastive_loss(a, z2, graph), z),
            "second_strong": finite_differences(lambda a: contrastive_loss(z, a, graph), z2),
        },
    }
    for name, gradient in by_term.items():
        head = gradient.heads["projection"]
        found = {"logits": gradient.logits["strong"]} | head.unlabeled
        others = [gradient.logits["weak"], gradient.logits["second_strong"], *head.labeled.values()]
        for key, value in found.items():
            if key not in expected[name]:
                others.append(value)
                continue
            assert np.abs(value).max() > 1e-3
            # The graph and the pseudo-labels may be float32.
            np.testing.assert_allclose(value, expected[name][key], rtol=2e-6, atol=1e-7)
        for value in others:  # the loss treats them as constants
            np.testing.assert_array_equal(value, 0)
