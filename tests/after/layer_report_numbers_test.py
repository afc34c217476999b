"""The layer report's layers, gradients and numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import K, logits_of, make_batch, make_classifier, make_method, make_params, make_state
from objectives import (
    assert_trees_close,
    pseudo_labels,
    supervised_loss,
    unsupervised_loss,
    weak_probabilities,
)

from layermatch_jax.after.layer_report import estimates, measuring

# ---------------------------------------------------------------------------------------------
# Layers.


def test_layers_in_forward_order():
    paths = [
        "backbone/final_norm/scale", "backbone/stage10_block0/conv1/kernel",
        "backbone/stage1_block0/conv1/kernel", "backbone/stage1_block10/norm1/bias",
        "backbone/stage1_block2/conv1/kernel", "backbone/stage2_block0/shortcut/kernel",
        "backbone/stem/kernel", "classifier/bias", "classifier/kernel",
    ]  # fmt: skip
    assert estimates.forward_order(estimates.layer(path) for path in paths) == [
        "stem", "stage1_block0", "stage1_block2", "stage1_block10", "stage2_block0",
        "stage10_block0", "final_norm", "classifier",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The gradients of a batch.


def gradients_of(state, batch, method):
    step = functools.partial(measuring.gradients, batch=lambda resident, rows: rows, method=method)
    return jax.jit(step)(state, None, batch)


@pytest.mark.parametrize("name", ["fixmatch", "layermatch"])
def test_the_four_gradients_are_those_of_four_losses(name):
    with jax.enable_x64(True):
        params, batch, averaged = make_params(), make_batch(), make_classifier(7)
        # Of the four pseudo-labels that count one is wrong, and of one the truth is not known.
        targets, weights = pseudo_labels(weak_probabilities(params, batch))
        truth, used = np.array(targets).argmax(axis=1), np.flatnonzero(weights)
        truth[used[1]], truth[used[2]] = (truth[used[1]] + 1) % K, -1
        batch = batch._replace(true_labels=truth.reshape(batch.true_labels.shape))
        method = make_method(params, name, unsupervised_weight=3.0)
        state = make_state(params, method)
        if name == "layermatch":
            state = state.replace(centers=averaged)
        trees, sums = gradients_of(state, batch, method)

        known, right = truth >= 0, np.argmax(targets, axis=1) == truth
        wrong = known & ~right
        assert [np.sum(weights * rows) for rows in (right, wrong, ~known)] == [2, 1, 1]
        assert jax.device_get(sums) == {
            "known": known.sum(),
            "used": np.sum(weights * known),
            "right": np.sum(weights * right),
            "strength": 3.0,
        }
        head = functools.partial(logits_of, averaged) if name == "layermatch" else None

        def unsupervised(params, targets, weights):
            by_head = jax.grad(unsupervised_loss)(params, batch, targets, weights, head)
            plain = jax.grad(unsupervised_loss)(params, batch, targets, weights)
            return {"backbone": by_head["backbone"], "classifier": plain["classifier"]}

        def expected(params):
            return {
                "supervised": jax.grad(supervised_loss)(params, batch),
                "true": unsupervised(params, jnp.eye(K)[np.maximum(truth, 0)], weights * known),
                "right": unsupervised(params, targets, weights * right),
                "wrong": unsupervised(params, targets, weights * wrong),
            }

        assert_trees_close(trees, jax.jit(expected)(params))


def test_a_regularizer_is_no_pseudo_label():
    """FreeMatch's regularizer is left out: right and wrong rows sum to the gradient of L_u."""
    with jax.enable_x64(True):
        params, batch = make_params(), make_batch()
        batch = batch._replace(true_labels=np.maximum(batch.true_labels, 0))

        def both(weight):
            method = make_method(params, "freematch", policy__fairness_weight=weight)
            state = make_state(params, method)
            trees, _ = gradients_of(state, batch, method)
            return jax.tree.map(jnp.add, trees["right"], trees["wrong"])

        assert_trees_close(both(0.5), both(0.0))


# ---------------------------------------------------------------------------------------------
# The numbers of a layer.

# Three batches each, in two dimensions.
BY_HAND = np.array(
    [
        [[1, 1], [3, -1], [2, 0]],  # supervised
        [[2, 0], [1, 2], [1, 1]],  # true
        [[6, 0], [0, 0], [3, 0]],  # right
        [[0, -1], [0, -7], [0, -4]],  # wrong
    ],
    float,
)


def gram(vectors):
    """[4, n, p] -> [4, n, 4, n]."""
    return np.einsum("aip,bjp->aibj", vectors, vectors)


def test_the_numbers_by_hand():
    """A product of means: (Σa · Σb − Σ a_i · b_i) / 6, over the pairs of different batches."""
    told = estimates.compare(gram(BY_HAND), strength=2.0)
    assert list(told) == list(estimates.QUANTITIES)
    ss, tt = (36 - 16) / 6, (25 - 11) / 6
    right, wrong = (81 - 45) / 6, (144 - 66) / 6
    uu = right + wrong  # they are at right angles
    right_t, wrong_t, right_s, wrong_s = (36 - 15) / 6, (-36 + 18) / 6, (54 - 12) / 6, (0 - 6) / 6
    assert told["cosine_true"][0] == pytest.approx((right_t + wrong_t) / (uu * tt) ** 0.5)
    assert told["cosine_supervised"][0] == pytest.approx((right_s + wrong_s) / (uu * ss) ** 0.5)
    assert told["norm_ratio"][0] == pytest.approx(2 * (uu / ss) ** 0.5)
    assert told["noise_share"][0] == pytest.approx(13 / 19)


def test_where_there_is_nothing_to_compare():
    none_used = BY_HAND.copy()
    none_used[2:] = 0
    assert estimates.compare(gram(none_used)) == {
        "cosine_true": [None] * 3,
        "cosine_supervised": [None] * 3,
        "norm_ratio": [0.0] * 3,
        "noise_share": [None] * 3,
    }
    all_right = np.array(BY_HAND)
    all_right[2:] = [[[6, 0], [1, 0], [3, 0]], np.zeros((3, 2))]
    assert estimates.compare(gram(all_right))["noise_share"] == [0.0] * 3


def test_a_length_that_the_noise_hides_is_not_known():
    """The squared lengths of g_u and g_true are both estimated as −1/3: no cosine is reported."""
    hidden = BY_HAND.copy()
    hidden[1] = hidden[2] = [[1, 0], [-1, 0], [0, 1]]
    hidden[3] = 0
    told = estimates.compare(gram(hidden))
    assert told == {name: [None] * 3 for name in estimates.QUANTITIES}
    # Negative only without the first batch: no interval, so no value.
    hidden[2] = [[9, 0], [1, 1], [0, -1]]
    assert estimates.compare(gram(hidden))["norm_ratio"] == [None] * 3


def test_the_interval_is_that_of_a_direct_jackknife():
    n, quantile = 6, 2.570582  # of Student's t with 5 degrees of freedom, from a table
    vectors = np.random.RandomState(0).randn(4, n, 50) / 4 + 1

    def quantities(kept):
        def product(a, b):
            return np.mean([vectors[a, i] @ vectors[b, j] for i in kept for j in kept if i != j])

        s, t, right, wrong = range(4)
        u_t, u_s = (product(right, x) + product(wrong, x) for x in (t, s))
        rows = product(right, right) + product(wrong, wrong)
        length_u = (rows + 2 * product(right, wrong)) ** 0.5
        return [
            u_t / length_u / product(t, t) ** 0.5,
            u_s / length_u / product(s, s) ** 0.5,
            3 * length_u / product(s, s) ** 0.5,
            product(wrong, wrong) / rows,
        ]

    value = np.array(quantities(range(n)))
    without = np.array([quantities([i for i in range(n) if i != k]) for k in range(n)])
    error = np.sqrt((n - 1) / n * np.sum((without - without.mean(axis=0)) ** 2, axis=0))
    expected = np.stack([value, value - quantile * error, value + quantile * error], axis=1)
    highest = np.array([[1], [1], [np.inf], [1]])  # a cosine is not above 1
    assert np.any(expected > highest)
    told = estimates.compare(gram(vectors), strength=3.0)
    np.testing.assert_allclose(list(told.values()), np.minimum(expected, highest), rtol=1e-6)


@pytest.mark.parametrize("n", [8, 32, 128])
def test_of_intervals_95_percent_cover_the_true_gradients(n):
    """Gradients of 100 numbers; a batch's noise, which the kinds share in part, is 4 times longer.

    So 16 / 8 + 1 = 3 is the squared length of a mean over 8 batches, where the true one is 1.
    """
    rng, simulated = np.random.RandomState(n), 120
    s, t, right, wrong = np.eye(4, 100)  # directions at right angles
    means = np.stack([s, t, 0.6 * t + 0.3 * s + 0.4 * right, 0.5 * wrong - 0.1 * t])
    # u = 0.5 t + 0.3 s + 0.4 right + 0.5 wrong; rows: 0.36 + 0.09 + 0.16 and 0.25 + 0.01.
    length = 0.75**0.5
    truth = np.array([0.5 / length, 0.3 / length, length, 0.26 / 0.87])
    shared = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0.6, 0.5, 0], [0, 0.2, 0, 0.4]])
    told = []
    for _ in range(simulated):
        noise = 4 / 100**0.5 * rng.randn(4, n, 100)
        vectors = means[:, None] + np.einsum("ab,bip->aip", shared, noise)
        rows = vectors.reshape(4 * n, -1)
        found = estimates.compare((rows @ rows.T).reshape(4, n, 4, n))
        told.append([[np.nan if x is None else x for x in ends] for ends in found.values()])
    value, low, high = np.moveaxis(np.array(told), -1, 0)  # [simulated, quantity] each
    known = np.isfinite(value)
    assert known.mean() > (0.5 if n == 8 else 0.98)
    assert np.all((low <= value) & (value <= high) | ~known)
    covered = np.sum((low <= truth) & (truth <= high) & known, axis=0) / known.sum(axis=0)
    assert np.all(covered >= 0.9), covered
    if n > 8:  # where few batches are almost hidden by noise, the intervals are on the safe side
        assert np.all(covered <= 0.995), covered
        np.testing.assert_allclose(np.mean(value, axis=0, where=known), truth, atol=0.06)


@pytest.mark.parametrize(("room", "passes"), [(2**31, 1), (2 * 4 * 3 * 5 * 8, 3), (1, 4)])
def test_products_in_one_pass_or_several(room, passes, monkeypatch):
    monkeypatch.setattr(estimates, "_BYTES", room)  # of 4 kinds, 3 batches, float64
    rng, begun = np.random.RandomState(0), []
    shapes = {
        "backbone": {
            "stem": {"kernel": (2, 5)},
            "stage1_block0": {"conv": {"kernel": (5, 1)}, "norm": {"scale": (3,)}},
        },
        "classifier": {"kernel": (2, 4)},
    }
    made = [
        {
            kind: jax.tree.map(
                lambda shape: rng.randn(*shape), shapes, is_leaf=lambda x: isinstance(x, tuple)
            )
            for kind in estimates.KINDS
        }
        for _ in range(3)
    ]

    def batches():
        begun.append(True)
        for i, trees in enumerate(made):
            yield trees, {"used": np.float32(i)}

    grams, sums = estimates.products(batches, made[0]["true"], 3)
    assert len(begun) == passes
    assert sums == {"used": 1.0}
    assert list(grams) == ["stem", "stage1_block0", "classifier"]
    of_layer = {
        "stem": lambda tree: tree["backbone"]["stem"]["kernel"].ravel(),
        "stage1_block0": lambda tree: np.concatenate(
            [
                tree["backbone"]["stage1_block0"]["conv"]["kernel"].ravel(),
                tree["backbone"]["stage1_block0"]["norm"]["scale"],
            ]
        ),
        "classifier": lambda tree: tree["classifier"]["kernel"].ravel(),
    }
    for name, flat in of_layer.items():
        vectors = [[flat(trees[kind]) for trees in made] for kind in estimates.KINDS]
        np.testing.assert_allclose(grams[name], gram(np.array(vectors)), rtol=1e-12)
