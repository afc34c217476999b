"""The formula of every policy, implemented independently in NumPy float64.

An oracle is a function (config, s, x). `s` is a dict, its state, which it changes; `x` holds the
inputs. It returns the diagnostics, the fields of an Assignment that are not neutral (of type bool
where they must be equal exactly), and `margin`: the distance of each row from its threshold. Tests
need it because rounding could change a decision close to the threshold.
"""

import functools
from typing import Any, NamedTuple

import builders
import jax
import jax.numpy as jnp
import numpy as np

from layermatch_jax import automatic
from layermatch_jax import config as config_lib
from layermatch_jax.method import policies

STEPS, TRAIN_STEPS = 24, 40
ROWS, LABELED, NUM_UNLABELED = 48, 16, 60
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # for a few dozen float32 operations in sequence


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def softmax(logits):
    return np.exp(log_softmax(logits))


def cross_entropy(logits, targets):
    return -(targets * log_softmax(logits)).sum(-1)


def norm(a):
    return a / a.sum(-1, keepdims=True)


def hard(q):
    return np.arange(q.shape[-1]) == q.argmax(-1)[:, None]


def ema(s, name, start, momentum, value):
    s[name] = momentum * s.get(name, start) + (1 - momentum) * value
    return s[name]


def ramp(config, s):
    return min(s["step"] / (config.policy.ramp * config.train_steps), 1)


def fixed_threshold(config, s, x):
    q, tau = softmax(x.weak_logits), config.policy.threshold
    margin = q.max(-1) - tau
    return {"targets": hard(q), "weights": margin >= 0, "margin": margin, "class_threshold": tau}


def pseudo_label(config, s, x):
    scale = ramp(config, s)
    return fixed_threshold(config, s, x) | {"scale": scale, "ramp": scale}


def mean_teacher(config, s, x):
    scale, rows = ramp(config, s), len(x.weak_logits)
    return {
        "targets": softmax(x.teacher_logits),
        "weights": np.full(rows, True),
        "margin": np.ones(rows),
        "scale": scale,
        "ramp": scale,
    }


def uda(config, s, x):
    temperature = 0.4 if config.policy.temperature is None else config.policy.temperature
    assignment = fixed_threshold(config, s, x)
    assignment["targets"] = softmax(np.float64(x.weak_logits) / temperature)
    if config.policy.signal_annealing == "none":
        return assignment
    progress, K = s["step"] / config.train_steps, x.labeled_logits.shape[-1]
    alpha = {
        "linear": progress,
        "log": 1 - np.exp(-5 * progress),
        "exp": np.exp(5 * (progress - 1)),
    }[config.policy.signal_annealing]
    eta = alpha * (1 - 1 / K) + 1 / K
    true = softmax(x.labeled_logits)[np.arange(len(x.labels)), x.labels]
    kept = true <= eta
    return assignment | {
        "labeled_weights": kept * len(kept) / max(kept.sum(), 1),
        "margin": np.concatenate([assignment["margin"], true - eta]),
        "signal_threshold": eta,
    }


def flexmatch(config, s, x):
    q, tau, K = softmax(x.weak_logits), config.policy.threshold, x.weak_logits.shape[-1]
    last = s.setdefault("last", np.full(NUM_UNLABELED, -1))
    sigma, never = np.bincount(last[last >= 0], minlength=K), (last < 0).sum()
    beta = sigma / max(sigma.max(), never)
    thresholds = tau * beta / (2 - beta)
    margin = q.max(-1) - thresholds[q.argmax(-1)]
    for index, row in zip(x.indices, q, strict=True):
        if row.max() >= tau:
            last[index] = row.argmax()
    return {
        "targets": hard(q),
        "weights": margin >= 0,
        "margin": np.concatenate([margin, q.max(-1) - tau]),
        "class_threshold": thresholds,
        "never_selected": never / len(last),
    }


def dash(config, s, x):
    temperature = 0.5 if config.policy.temperature is None else config.policy.temperature
    warm_up = max(round(config.policy.warm_up * config.train_steps), 1)
    period = max(round(config.policy.period * config.train_steps), 1)
    if s["step"] < warm_up:
        labels = np.eye(x.labeled_logits.shape[-1])[x.labels]
        s["sum"] = s.get("sum", 0) + cross_entropy(x.labeled_logits, labels).mean()
        rho = np.inf
    else:
        t = (s["step"] - warm_up) // period
        rho = max(1.0001 * 1.27 ** (-t) * s["sum"] / warm_up, 0.05)
    q = softmax(x.weak_logits)
    targets = hard(q) if rho <= 0.05 else softmax(np.float64(x.weak_logits) / temperature)
    margin = rho - cross_entropy(x.weak_logits, targets)
    return {
        "targets": targets,
        "weights": margin >= 0,
        "margin": margin,
        "loss_threshold": rho,
        "class_threshold": np.exp(-rho),
    }


def adamatch(config, s, x):
    q, labeled, m = softmax(x.weak_logits), softmax(x.labeled_logits), config.policy.momentum
    K = q.shape[-1]
    ratio = ema(s, "l", 1 / K, m, labeled.mean(0)) / ema(s, "u", 1 / K, m, q.mean(0))
    aligned = norm(q * ratio)
    threshold = config.policy.relative_threshold * labeled.max(-1).mean()
    margin = aligned.max(-1) - threshold
    return {
        "targets": hard(aligned),
        "weights": margin >= 0,
        "margin": margin,
        "class_threshold": threshold,
    }


def fairness(config, strong_logits, accepted, prediction, histogram):
    """Computes w_f · Σ_c A_c log B_c and its gradient with respect to the strong logits."""
    if not accepted.any():
        return 0.0, np.zeros(strong_logits.shape)
    p = softmax(strong_logits)
    mean, bins = p[accepted].mean(0), hard(p)[accepted].mean(0)
    seen = bins > 0  # other classes are left out of B
    inverse = np.where(seen, 1 / np.where(seen, bins, 1), 0)
    A, B = norm(prediction / histogram), norm(mean * inverse)
    weight = config.policy.fairness_weight
    value = weight * (A[seen] * np.log(B[seen])).sum()
    # log B_c = log mean_c − log Σ_k mean_k / bins_k + a constant
    by_mean = weight * (
        A * seen / np.where(seen, mean, 1) - A[seen].sum() * inverse / (mean @ inverse)
    )
    by_p = accepted[:, None] / accepted.sum() * by_mean
    return value, p * (by_p - (p * by_p).sum(-1, keepdims=True))


def freematch(config, s, x):
    q, m, K = softmax(x.weak_logits), config.policy.momentum, x.weak_logits.shape[-1]
    tau = ema(s, "tau", 1 / K, m, q.max(-1).mean())
    prediction = ema(s, "p", 1 / K, m, q.mean(0))
    histogram = ema(s, "h", 1 / K, m, hard(q).mean(0))
    thresholds = tau * prediction / prediction.max()
    margin = q.max(-1) - thresholds[q.argmax(-1)]
    value, gradient = fairness(config, x.strong_logits, margin >= 0, prediction, histogram)
    return {
        "targets": hard(q),
        "weights": margin >= 0,
        "margin": margin,
        "regularizer": value,
        "regularizer_gradient": gradient,
        "global_threshold": tau,
        "class_threshold": thresholds,
    }


def softmatch(config, s, x):
    q, m, K = softmax(x.weak_logits), config.policy.momentum, x.weak_logits.shape[-1]
    confidence = norm(q / K / ema(s, "p", 1 / K, m, q.mean(0))).max(-1)
    mean = ema(s, "mu", 1 / K, m, confidence.mean())
    # Unbiased variance. The paper does not say what holds for one row; here the variance is 0.
    spread = ((confidence - confidence.mean()) ** 2).sum() / max(len(confidence) - 1, 1)
    variance = ema(s, "var", 1.0, m, spread)
    return {
        "targets": hard(q),
        "weights": np.exp(-(np.minimum(confidence - mean, 0) ** 2) / (2 * variance / 4)),
        "margin": np.ones(len(q)),  # its weights are continuous
        "confidence_mean": mean,
        "confidence_deviation": np.sqrt(variance),
    }


# name -> (oracle, loss, view, whether the policy needs a teacher)
ORACLES = {
    "pseudo_label": (pseudo_label, "cross-entropy", "weak", False),
    "mean_teacher": (mean_teacher, "squared error", "strong", True),
    "uda": (uda, "cross-entropy", "strong", False),
    "fixed_threshold": (fixed_threshold, "cross-entropy", "strong", False),
    "flexmatch": (flexmatch, "cross-entropy", "strong", False),
    "dash": (dash, "cross-entropy", "strong", False),
    "adamatch": (adamatch, "cross-entropy", "strong", False),
    "freematch": (freematch, "cross-entropy", "strong", False),
    "softmatch": (softmatch, "cross-entropy", "strong", False),
}
# Settings with which ramps end, averages move and dash reaches its floor within 24 steps.
MOVING = {
    "adamatch": {"momentum": 0.9},
    "dash": {"warm_up": 3 / TRAIN_STEPS, "period": 2 / TRAIN_STEPS},
    "freematch": {"momentum": 0.9, "fairness_weight": 0.5},
    "softmatch": {"momentum": 0.9},
    "uda": {"threshold": 0.8, "signal_annealing": "linear"},
}
MORE = {  # other values for the same fields
    "adamatch": {"momentum": 0.8, "relative_threshold": 0.7},
    "dash": MOVING["dash"] | {"temperature": 0.9},
    "flexmatch": {"threshold": 0.7},
    "freematch": {"momentum": 0.8, "fairness_weight": 0.1},
    "pseudo_label": {"threshold": 0.7, "ramp": 0.25},
    "softmatch": {"momentum": 0.8},
    "uda": {"threshold": 0.7, "temperature": 0.8},
}
ORDINARY = [
    *((name, MOVING.get(name, {}), 10) for name in ORACLES),
    *((name, MORE.get(name, {}), 100) for name in ORACLES),
    ("uda", {"signal_annealing": "log"}, 10),
    ("uda", {"signal_annealing": "exp"}, 10),
]


def first_state(policy, num_classes):
    # NumPy arrays, because a weakly typed jax.Array would make JAX compile twice.
    return jax.device_get(policy.init(builders.make_spec(num_classes, NUM_UNLABELED)))


class Batch(NamedTuple):
    """The inputs of a policy, with the names that the oracles use."""

    weak_logits: np.ndarray
    strong_logits: np.ndarray
    labeled_logits: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    teacher_logits: np.ndarray


class Answer(NamedTuple):
    """The fields of an Assignment, and the further terms of the loss."""

    targets: np.ndarray
    weights: np.ndarray
    labeled_weights: np.ndarray
    scale: np.ndarray
    regularizer: np.ndarray
    regularizer_gradient: np.ndarray  # with respect to the strong logits
    state: Any
    diagnostics: dict


def assignment_of(policy, state, x):
    inputs = builders.make_inputs(*x)
    assignment = policy.assign(state, inputs)

    def others(strong):
        terms = policy.loss(
            policies.Outputs({"weak": x.weak_logits, "strong": strong}, {}), assignment
        )
        return sum((terms[name] for name in terms if name != "unsupervised"), jnp.float32(0))

    value, gradient = jax.value_and_grad(others)(x.strong_logits)
    return Answer(
        regularizer=value,
        regularizer_gradient=gradient,
        **{name: getattr(assignment, name) for name in Answer._fields if hasattr(assignment, name)},
    )


@functools.cache
def make(name, *fields):
    """Makes (config, policy, compiled `assign`), once for all tests with the same shapes."""
    config = config_lib.base()
    config.policy.name, config.train_steps = name, TRAIN_STEPS
    config.policy.update({"momentum": 0.999} | dict(fields))
    config = automatic.resolve(config)
    policy = policies.create(config)
    return config, policy, jax.jit(functools.partial(assignment_of, policy))


def draw(rng, K):
    """Makes a random batch of rows with various confidence; labeled rows are mostly right."""
    labels = rng.integers(K, size=LABELED).astype(np.int32)
    # With more classes, the same loss needs a larger logit of the true class.
    labeled = 2 * rng.normal(size=(LABELED, K)) + (6 + np.log(K / 10)) * np.eye(K)[labels]
    scale = rng.choice([0.5, 2.0, 20.0], size=(ROWS, 1))
    weak, other, teacher = scale * rng.normal(size=(3, ROWS, K))
    weak += 0.75 * np.log10(K) * scale * (np.arange(K) % 10 == 0)  # frequent classes
    return Batch(
        weak_logits=weak.astype(np.float32),
        strong_logits=(weak + other / 2).astype(np.float32),
        labeled_logits=labeled.astype(np.float32),
        labels=labels,
        indices=rng.integers(NUM_UNLABELED, size=ROWS).astype(np.int32),  # some samples occur twice
        teacher_logits=(weak + teacher / 2).astype(np.float32),
    )


def expect(name, config, batches):
    s, assignments = {}, []
    for s["step"], x in enumerate(batches):
        assignments.append(ORACLES[name][0](config, s, x))
    return assignments


def settle(name, config, make_batches, margin):
    """Finds batches in which rounding decides nothing; returns them and the expected results."""
    for seed in range(100):
        batches = make_batches(np.random.default_rng(seed))
        assignments = expect(name, config, batches)
        if min(np.abs(assignment["margin"]).min() for assignment in assignments) > margin:
            return batches, assignments
    raise AssertionError("no seed keeps all rows away from their thresholds")


def check(assignment, expected, x):
    """Compares the assignment of one step with that of the oracle."""
    rows, K = x.weak_logits.shape
    neutral = {
        "labeled_weights": np.ones(len(x.labels)),
        "scale": 1.0,
        "regularizer": 0.0,
        "regularizer_gradient": np.zeros((rows, K)),
    }
    shapes = {"labeled_weights": x.labels.shape, "scale": (), "regularizer": (), "weights": (rows,)}
    for field, want in (neutral | expected).items():
        if field == "margin":
            continue
        if field in Answer._fields:
            got, shape = getattr(assignment, field), shapes.get(field, (rows, K))
        else:
            got, shape = assignment.diagnostics[field], (K,) if field == "class_threshold" else ()
        got, want = np.asarray(got), np.asarray(want)
        assert got.dtype == np.float32, field
        assert got.shape == shape, field
        if want.dtype == bool:
            np.testing.assert_array_equal(got, want, err_msg=field)
        else:
            np.testing.assert_allclose(
                got, np.broadcast_to(want, shape), err_msg=field, **TOLERANCE
            )
    # The weight of a rejected labeled row is exactly 0.
    want = (neutral | expected)["labeled_weights"]
    np.testing.assert_array_equal(np.asarray(assignment.labeled_weights) == 0, want == 0)


def follow(name, fields, batches, assignments):
    """Runs the policy over the batches and checks every step; yields the assignments."""
    _, policy, assign = make(name, *fields.items())
    state = first_state(policy, batches[0].weak_logits.shape[-1])
    for step, (x, expected) in enumerate(zip(batches, assignments, strict=True)):
        assignment = jax.device_get(assign(state, x))
        try:
            check(assignment, expected, x)
        except AssertionError as error:
            raise AssertionError(f"step {step}: {error}") from error
        yield assignment
        state = assignment.state
