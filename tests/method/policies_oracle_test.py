"""Compares every policy with its oracle: ordinary batches, degenerate ones, long runs."""

import functools

import builders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import (
    MOVING,
    NUM_UNLABELED,
    ORACLES,
    ORDINARY,
    ROWS,
    STEPS,
    TOLERANCE,
    Answer,
    assignment_of,
    check,
    cross_entropy,
    draw,
    fairness,
    first_state,
    follow,
    freematch,
    make,
    settle,
    softmax,
)

from layermatch_jax import automatic, presets
from layermatch_jax import config as config_lib
from layermatch_jax.method import policies


def test_every_policy_has_its_transcription():
    others = {"comatch", "pi_model", "vat"}  # policies with other views, which have their own tests
    assert set(ORACLES) == set(policies.POLICIES) - others


@pytest.mark.parametrize("name", ORACLES)
def test_policy_has_the_loss_and_the_view_of_its_paper(name):
    policy, (_, kind, view, needs_teacher) = make(name)[1], ORACLES[name]
    assert policy.needs_teacher == needs_teacher
    x, rng = draw(np.random.default_rng(0), 10), np.random.default_rng(1)
    inputs = jax.tree.map(jnp.array, builders.make_inputs(*x))
    weights = rng.random(ROWS).astype(np.float32)
    assignment = policy.assign(policy.init(builders.make_spec(10, NUM_UNLABELED)), inputs)
    assignment = assignment._replace(weights=weights)
    logits = {"weak": x.weak_logits, "strong": x.strong_logits}[view]
    if kind == "cross-entropy":
        rows = cross_entropy(logits, np.float64(assignment.targets))
    else:
        rows = ((softmax(logits) - assignment.targets) ** 2).mean(-1)
    loss = policy.loss(inputs.outputs, assignment)["unsupervised"]
    np.testing.assert_allclose(loss, (weights * rows).mean(), rtol=1e-5)


def test_defaults_are_the_papers():
    def settings(method):
        config = automatic.resolve(presets.apply_method(config_lib.base(), method))
        values = config.policy.to_dict().items()
        return {name: value for name, value in values if value is not None and name != "name"}

    assert settings("fixmatch") == settings("flexmatch") == {"threshold": 0.95}
    assert settings("pseudo_label") == {"threshold": 0.95, "ramp": 0.4}
    assert settings("mean_teacher") == {"ramp": 0.4}
    assert settings("uda") == {"threshold": 0.8, "temperature": 0.4, "signal_annealing": "none"}
    assert settings("adamatch") == {"momentum": 0.999, "relative_threshold": 0.9}
    assert settings("freematch") == {"momentum": 0.999, "fairness_weight": 0.001}
    assert settings("softmatch") == {"momentum": 0.999}
    dash = {"temperature": 0.5, "warm_up": 2048 / 2**20, "period": 10240 / 2**20}
    assert settings("dash") == dash


@pytest.mark.parametrize(("name", "fields", "K"), ORDINARY)
def test_policy_follows_its_formula_over_many_steps(name, fields, K):
    config, *_ = make(name, *fields.items())
    batches, assignments = settle(
        name, config, lambda rng: [draw(rng, K) for _ in range(STEPS)], margin=1e-4
    )
    # The batches are informative: some rows pass and some do not, and some samples occur twice.
    passed = np.mean([assignment["weights"] == 1 for assignment in assignments])
    assert name == "mean_teacher" or 0.2 <= passed <= 0.8, passed
    assert any(len(set(x.indices)) < ROWS for x in batches)
    if name == "dash":  # all three phases
        thresholds = [assignment["loss_threshold"] for assignment in assignments]
        assert thresholds[2] == np.inf
        assert 0.05 < thresholds[3] < np.inf
        assert thresholds[-1] == 0.05
    if "signal_threshold" in assignments[0]:  # some labeled rows are left out, but not all
        assert (
            0.02
            <= np.mean([assignment["labeled_weights"] == 0 for assignment in assignments])
            <= 0.98
        )
    for assignment in follow(name, fields, batches, assignments):
        if name == "flexmatch":  # the counts equal a full count of the classes of all samples
            classes, counts = assignment.state["classes"], assignment.state["counts"]
            np.testing.assert_array_equal(
                counts[:K], np.bincount(classes[classes >= 0], minlength=K)
            )
            assert counts[K] == np.sum(classes < 0)


def confident(rng, x):
    # The same number of samples of each class, so that all thresholds of FlexMatch are high.
    rows = np.arange(ROWS, dtype=np.int32)
    return x._replace(weak_logits=np.float32(40 * np.eye(10)[rows % 10]), indices=rows)


def unsure(rng, x):
    return x._replace(weak_logits=0.005 * x.weak_logits)


def unsure_labels_too(rng, x):
    return unsure(rng, x)._replace(labeled_logits=0.005 * x.labeled_logits)


def one_class(rng, x):
    def only(logits):
        return logits + np.float32(80) * (np.arange(logits.shape[-1]) == 3)

    return x._replace(
        weak_logits=only(x.weak_logits),
        strong_logits=only(x.strong_logits),
        labeled_logits=only(x.labeled_logits),
        labels=np.full_like(x.labels, 3),
    )


def one_row(rng, x):
    rest = {name: value[:1] for name, value in x._asdict().items() if not name.startswith("label")}
    return x._replace(**rest)


# Four steps of each kind, starting at the first step.
DEGENERATE = [(confident, unsure), (unsure_labels_too, confident), (one_class,) * 2, (one_row,) * 3]


@pytest.mark.parametrize("cases", DEGENERATE)
@pytest.mark.parametrize("name", ORACLES)
def test_policy_follows_its_formula_in_degenerate_batches(name, cases):
    fields = MOVING.get(name, {})
    config, *_ = make(name, *fields.items())

    def make_batches(rng):
        batches = [case(rng, draw(rng, 10)) for case in cases for _ in range(4)]
        return batches if one_row in cases else [*batches, draw(rng, 10)]

    batches, assignments = settle(name, config, make_batches, margin=1e-6)
    if cases == (confident, unsure) and name not in ("mean_teacher", "softmatch"):
        assert all(assignment["weights"].all() for assignment in assignments[:4])
        assert not any(assignment["weights"].any() for assignment in assignments[4:8])
    if cases == (one_class, one_class) and name == "uda":
        assert not assignments[0]["labeled_weights"].any()
    for assignment in follow(name, fields, batches, assignments):
        for leaf in jax.tree.leaves(assignment._replace(diagnostics={})):
            assert np.isfinite(leaf).all()


def test_freematch_gradient_is_that_of_its_regularizer():
    config, policy, assign = make("freematch", *MOVING["freematch"].items())
    rng, s, step = np.random.default_rng(0), {}, 1e-5
    state = first_state(policy, 10)
    for _ in range(4):
        x = draw(rng, 10)
        accepted = freematch(config, s, x)["weights"]
        assignment = jax.device_get(assign(state, x))
        state = assignment.state

        def value(nudge, x=x, accepted=accepted):
            logits = np.float64(x.strong_logits) + nudge
            return fairness(config, logits, accepted, s["p"], s["h"])[0]

        nudges = step * np.eye(ROWS * 10).reshape(-1, ROWS, 10)
        differences = np.array([value(nudge) - value(-nudge) for nudge in nudges]) / (2 * step)
        assert np.abs(differences).max() > 1e-3
        np.testing.assert_allclose(
            assignment.regularizer_gradient, differences.reshape(ROWS, 10), **TOLERANCE
        )


# LONG: number of steps. EXACT: steps after which p̃ and h̃, which fall as 0.9^n, are still normal
# float32 numbers (0.1 · 0.9^600 is 4e-29). BANK: number of batches, which repeat.
LONG, EXACT, BANK = 2000, 600, 8


@functools.cache
def long_run(name):
    """Compiles a run of LONG steps over a bank of batches: (last state, all assignments)."""
    policy = make(name, *MOVING[name].items())[1]

    def step(state, x):
        assignment = assignment_of(policy, state, x)
        return assignment.state, assignment._replace(state=())

    @jax.jit
    def run(state, bank):
        def round_and_round(state, i):
            return step(state, jax.tree.map(lambda a: a[i % BANK], bank))

        return jax.lax.scan(round_and_round, state, jnp.arange(LONG))

    return run


def sink(x, **depths):
    """Lowers the logit of class 0 to `depth` below the largest of the other classes."""
    lowered = {}
    for field, depth in depths.items():
        lowered[field] = getattr(x, field).copy()
        lowered[field][:, 0] = lowered[field][:, 1:].max(-1) - depth
    return x._replace(**lowered)


# Batches in which class 0 is never predicted.
STARVING = {
    # The probability is exactly 0, also in float64.
    "absent": lambda x: sink(x, weak_logits=1e4, strong_logits=1e4),
    "absent from labeled rows": lambda x: sink(
        x, weak_logits=1e4, strong_logits=1e4, labeled_logits=1e4
    ),
    # The probability is tiny, so alignment divides tiny numbers. The strong view predicts class 0.
    "improbable": lambda x: sink(x, weak_logits=30),
}


@pytest.mark.parametrize("case", STARVING)
@pytest.mark.parametrize("name", ["adamatch", "freematch", "softmatch"])
def test_a_class_that_is_never_predicted_for_thousands_of_steps(name, case):
    config, policy, assign = make(name, *MOVING[name].items())

    def make_batches(rng):
        bank = [STARVING[case](draw(rng, 10)) for _ in range(BANK)]
        return [bank[i % BANK] for i in range(EXACT)] + [draw(rng, 10)]

    batches, expected = settle(name, config, make_batches, margin=1e-5)
    bank = jax.tree.map(lambda *leaves: np.stack(leaves), *batches[:BANK])
    state, assignments = jax.device_get(long_run(name)(first_state(policy, 10), bank))
    for leaf in jax.tree.leaves((state, assignments)):
        assert np.isfinite(leaf).all()
    for field in set(expected[0]) & set(Answer._fields):
        want = np.array([assignment[field] for assignment in expected[:EXACT]])
        np.testing.assert_allclose(
            getattr(assignments, field)[:EXACT], want, err_msg=field, **TOLERANCE
        )
    # By then, the averages that matter repeat with the batches, and so do the weights.
    rounds = assignments.weights[EXACT - BANK :].reshape(-1, BANK, ROWS)
    np.testing.assert_allclose(rounds, np.broadcast_to(rounds[:1], rounds.shape), **TOLERANCE)
    # When the class returns, the result is that after EXACT steps, which end with the same batches.
    check(jax.device_get(assign(state, batches[-1])), expected[-1], batches[-1])


def single(x):
    return one_class(None, x)


def equal(x):
    return x._replace(weak_logits=0 * x.weak_logits, strong_logits=0 * x.strong_logits)


@pytest.mark.parametrize("case", [single, equal])
@pytest.mark.parametrize("name", ["adamatch", "freematch", "softmatch"])
def test_batches_that_say_nothing_new_for_thousands_of_steps(name, case):
    policy, assign = make(name, *MOVING[name].items())[1:]
    rng = np.random.default_rng(0)
    batches = [case(draw(rng, 10)) for _ in range(BANK)]
    bank = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    state, assignments = long_run(name)(first_state(policy, 10), bank)
    later = jax.device_get(assign(jax.device_get(state), draw(rng, 10)))
    for leaf in jax.tree.leaves((state, assignments, later)):
        assert np.isfinite(leaf).all()
    for weights in (assignments.weights, later.weights):
        assert np.min(weights) >= 0
        assert np.max(weights) <= 1
