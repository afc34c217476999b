"""A small problem in float64 on which every part of the method does something."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from layermatch_jax import automatic, presets
from layermatch_jax import config as config_lib
from layermatch_jax.batches import TrainBatch
from layermatch_jax.method import assembly, policies, steps
from layermatch_jax.method.state import TrainState
from layermatch_jax.views import ByView

B, MU, K, D = 4, 3, 3, 4
SIDE = 2
NUM_UNLABELED = 20
THRESHOLD = 0.6
RATE = 0.1  # learning rate of `recording`


def backbone(variables, images, train, mutable=()):
    """Two layers with a BatchNorm between them: every row's features depend on all rows."""
    params, statistics = variables["params"], variables["batch_stats"]
    # The step normalizes in float32; whole pixel values give float64 back.
    pixels = jnp.rint(images.astype(jnp.float64) * 255) / 255 - 0.5
    x = pixels.reshape(len(images), -1) @ params["stem"]["kernel"] + params["stem"]["bias"][None]
    if train:
        statistics = {"mean": jnp.mean(x, axis=0), "var": jnp.var(x, axis=0)}
    x = (x - statistics["mean"][None]) / jnp.sqrt(statistics["var"][None] + 1e-3)
    features = jnp.tanh(x) @ params["block"]["kernel"]
    return (features, {"batch_stats": statistics}) if mutable else features


def recording():
    """Plain gradient descent whose state is the last gradient."""
    return optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda grads, state, params: (jax.tree.map(lambda g: -RATE * g, grads), grads),
    )


def make_params(seed=0):
    rng = np.random.RandomState(seed)  # RandomState: its streams never change
    return {
        "backbone": {
            "stem": {"kernel": jnp.array(rng.randn(12, D)), "bias": jnp.array(rng.randn(D))},
            "block": {"kernel": jnp.array(rng.randn(D, D))},
        },
        "classifier": make_classifier(seed + 100),
    }


def make_classifier(seed):
    """Parameters, scaled so that a third to two thirds of the rows are confident."""
    rng = np.random.RandomState(seed)
    return {"kernel": jnp.array(0.6 * rng.randn(D, K)), "bias": jnp.array(0.2 * rng.randn(K))}


def make_batch(seed=0, mu=MU):
    rng = np.random.RandomState(seed)
    return TrainBatch(
        images=rng.randint(0, 256, (B, 1 + 2 * mu, SIDE, SIDE, 3)).astype(np.uint8),
        labels=rng.randint(0, K, B).astype(np.int32),
        labeled_indices=np.random.RandomState(seed + 1000).randint(0, B, B).astype(np.int32),
        unlabeled_indices=rng.randint(0, NUM_UNLABELED, (B, mu)).astype(np.int32),
        true_labels=rng.randint(-1, K, (B, mu)).astype(np.int32),
    )


def make_config(method="fixmatch", **fields):
    """A config; `fields` are dotted names with '__' for the dot."""
    config = presets.apply_method(config_lib.base(), method)
    config.policy.threshold = THRESHOLD
    config.batch_size, config.unlabeled_ratio = B, MU
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in fields.items()}
    )
    return automatic.resolve(config)


def make_spec(num_classes=K, num_unlabeled=NUM_UNLABELED):
    return policies.Spec(
        num_classes=num_classes,
        feature_dim=D,
        batch_size=B,
        unlabeled_ratio=MU,
        num_unlabeled=num_unlabeled,
        labels=np.arange(B) % num_classes,
    )


def make_inputs(weak, strong, labeled, labels, indices, teacher=None):
    """Inputs of a policy with one weak and one strong view, from their logits."""
    return policies.Inputs(
        target_logits={"weak": weak, "strong": strong},
        outputs=policies.Outputs({"weak": weak, "strong": strong}, {}),
        labeled_logits={"weak": labeled},
        labels=labels,
        labeled_indices=jnp.arange(len(labels), dtype=jnp.int32),
        unlabeled_indices=indices,
        teacher_logits=teacher,
    )


def make_inputs_of(policy, num_labeled=B, mu=MU, num_classes=K, seed=0):
    """Random inputs of a policy with any views and heads."""
    rng = np.random.RandomState(seed)
    rows = {"labeled": num_labeled, "unlabeled": mu * num_labeled}

    def by_view(kind, width):
        return {
            name: jnp.array(2 * rng.randn(rows[kind], width), jnp.float32)
            for name in getattr(policy.views, kind)
        }

    def output(create, features):
        head = create(D, num_classes, None)
        return head.init_with_output(jax.random.key(seed), features, train=False)[0]

    heads = {
        name: ByView(
            *(
                {view: output(create, x) for view, x in by_view(kind, D).items()}
                for kind in ByView._fields
            )
        )
        for name, create in policy.heads.items()
    }
    return policies.Inputs(
        target_logits=by_view("unlabeled", num_classes),
        outputs=policies.Outputs(by_view("unlabeled", num_classes), heads),
        labeled_logits=by_view("labeled", num_classes),
        labels=jnp.arange(num_labeled, dtype=jnp.int32) % num_classes,
        labeled_indices=jnp.arange(num_labeled, dtype=jnp.int32),
        unlabeled_indices=jnp.arange(mu * num_labeled, dtype=jnp.int32),
        teacher_logits=by_view("unlabeled", num_classes)[policy.target_view],
    )


def make_method(params, method="fixmatch", **fields):
    return assembly.create_method(make_config(method, **fields), params, ((0.0,) * 3, (1.0,) * 3))


def make_state(params, method, tx=None, apply_fn=backbone):
    """The state before a step, in float64 throughout."""
    tx = recording() if tx is None else tx
    to_float64 = lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
    return TrainState(
        step=jnp.int32(0),
        apply_fn=apply_fn,
        params=params,
        tx=tx,
        opt_state=tx.init(params),
        batch_stats={"mean": jnp.zeros(D), "var": jnp.ones(D)},
        head_stats={},
        ema_params=params,
        centers=jax.tree.map(to_float64, method.centers.init(params["classifier"], NUM_UNLABELED)),
        policy=method.policy.init(make_spec()),
    )


def gradients(method, params, batch, centers=None):
    """The gradients that one step passes to the optimizer."""
    state = make_state(params, method)
    state = state if centers is None else state.replace(centers=centers)
    # Not compiled as a whole: the compiled single operations are shared by all tests.
    new, _ = steps.train_step(state, batch, method=method)
    return new.opt_state


def views(params, batch):
    """Features of the labeled [B, D], weak and strong [μB, D] rows, from one backbone pass."""
    images = batch.images.reshape(-1, SIDE, SIDE, 3) / 255
    features = backbone({"params": params, "batch_stats": {}}, images, train=True)
    features = features.reshape(B, -1, D)
    mu = batch.unlabeled_indices.shape[1]
    weak, strong = features[:, 1 : mu + 1], features[:, mu + 1 :]
    return features[:, 0], weak.reshape(-1, D), strong.reshape(-1, D)


def logits_of(classifier, features):
    return features @ classifier["kernel"] + classifier["bias"][None]


def assert_informative(probabilities, threshold=THRESHOLD):
    """Asserts that some rows are accepted and some are not; otherwise tests would prove nothing."""
    probabilities = np.asarray(probabilities)
    confidence = probabilities.max(axis=-1)
    assert 0.2 <= np.mean(confidence >= threshold) <= 0.8
    assert set(probabilities.argmax(axis=-1)) == set(range(K))
    assert np.abs(confidence - threshold).min() > 1e-4
