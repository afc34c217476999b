"""Compares three train steps with literal numbers, derived from the method's equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import assert_informative, make_config
from objectives import softmax

from layermatch_jax.batches import TrainBatch
from layermatch_jax.method import assembly, state, steps

pytestmark = pytest.mark.usefixtures("float64")

PIXEL_MEAN, PIXEL_STD = (0.5, 0.4, 0.6), (0.25, 0.2, 0.3)


def literal_problem():
    """Makes a state and three batches: 2 labeled, 4 unlabeled images, 2x2 pixels, K = D = 3.

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
    """Computes LayerMatch on z = x·S in float64 by the method's equations and the chain rule.

    λ_u = 0.75, τ = 0.5, lr = 0.2·cos(7πk / 16·4), Nesterov 0.9, decay 0.02, EMA 0.8, centers 0.15.

    Returns:
      The final parameters, their EMA and the centers; lists of (L_s, L_u) and of q, by step.
    """
    p, ema, centers = dict(start), dict(start), dict(start)
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
        prob = softmax(strong @ p["stem"] @ centers["kernel"] + centers["bias"])
        loss_u = -(accepted * np.log(prob[[0, 1, 2, 3], pseudo])).sum() / 4
        error = accepted[:, None] * (prob - np.eye(3)[pseudo]) / 4
        gradient["stem"] = gradient["stem"] + 0.75 * strong.T @ error @ centers["kernel"].T

        rate = 0.2 * np.cos(7 * np.pi * t / (16 * 4))
        m = min(0.15, (1 + t) / (10 + t))
        for name in p:
            decay = 0.0 if name == "bias" else 0.02 * p[name]
            d = gradient[name] + decay
            velocity[name] = 0.9 * velocity[name] + d
            p[name] = p[name] - rate * (d + 0.9 * velocity[name])
            ema[name] = 0.8 * ema[name] + 0.2 * p[name]
            centers[name] = m * centers[name] + (1 - m) * p[name]
        step_losses.append((loss_s, loss_u))
        step_probabilities.append(q)
    return p, ema, centers, step_losses, step_probabilities


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
    "centers_kernel": [
        [-0.354370304566, 0.437590059262, -0.23898933698],
        [0.447175001095, -0.256217456627, -0.220164341146],
        [-0.182273667538, 1.27413012303, 0.0180018182893],
    ],
    "centers_bias": [0.363375657194, -0.544240052018, 0.170864394824],
    "losses": [
        [0.463130769276, 2.31260547258],
        [1.84872054043, 0.88346602131],
        [0.932485895983, 0.404237771071],
    ],  # (L_s, L_u) of the steps
}
CHANGED = (
    "The numbers of a train step changed. If you did not mean to change the method, you just "
    "did. If you did, derive them again with numpy_layermatch_steps, never with the tested code."
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


def assert_literal(p, ema, centers, step_losses, rtol):
    for name, actual in {
        "stem": p["stem"],
        "kernel": p["kernel"],
        "bias": p["bias"],
        "ema_stem": ema["stem"][:2],
        "ema_kernel": ema["kernel"],
        "ema_bias": ema["bias"],
        "centers_kernel": centers["kernel"],
        "centers_bias": centers["bias"],
        "losses": np.array(step_losses),
    }.items():
        np.testing.assert_allclose(actual, LITERAL[name], rtol=rtol, atol=rtol, err_msg=CHANGED)


def test_the_literal_numbers_are_those_of_the_equations():
    *assignment, probabilities = numpy_layermatch_steps(*literal_problem())
    for q in probabilities:
        assert_informative(q, 0.5)
    assert_literal(*assignment, rtol=1e-11)


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
            centers=method.centers.init(params["classifier"], 4),
        )

        def exact(variables, images, train, mutable):
            """The linear backbone on pixels in float64; the step has normalized them in float32."""
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
        # Metrics are always float32.
        np.testing.assert_allclose(step_losses, LITERAL["losses"], rtol=1e-5, err_msg=CHANGED)
        np.testing.assert_allclose(rates, 0.2 * np.array([1, 0.941544065, 0.773010453]), rtol=1e-6)
        assert current.step == 3
        assert_literal(
            stem(current.params),
            stem(current.ema_params),
            current.centers,
            LITERAL["losses"],
            rtol=1e-11 if dtype == "float64" else 1e-5,
        )
