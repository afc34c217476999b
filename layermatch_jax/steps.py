"""The train step and the evaluation step: pure functions, the same on one device and on many."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from layermatch_jax import layerwise, losses, optimizer, parallel, policies
from layermatch_jax.batch import EvalBatch, TrainBatch
from layermatch_jax.state import TrainState


class Method(NamedTuple):
    """What a step is made of apart from its state."""

    policy: policies.Policy
    centres: layerwise.Centres
    multipliers: Any  # of layerwise.mask_multipliers
    unsupervised_weight: float  # λ_u
    ema_decay: float
    mean: tuple[float, ...]  # of the data set's channels, in [0, 1]
    std: tuple[float, ...]
    learning_rate: Callable  # step -> rate, for the log


# A metric is [sum, weight], so that steps can be averaged without a mean of means; [2, K] by class.
Metrics = dict[str, jax.Array]


def create_method(
    config: ml_collections.ConfigDict,
    params,
    channel_statistics: tuple[tuple[float, ...], tuple[float, ...]],
) -> Method:
    """Reads the method's parts out of the config.

    Raises:
      InputError: an expression of the gradient mask matches none of `params`.
    """
    mean, std = channel_statistics
    return Method(
        policy=policies.create(config),
        centres=layerwise.create_centres(config),
        multipliers=layerwise.mask_multipliers(config.layerwise.gradient_mask, params),
        unsupervised_weight=config.unsupervised_weight,
        ema_decay=config.ema_decay,
        mean=mean,
        std=std,
        learning_rate=optimizer.learning_rate(config),
    )


def train_step(
    state: TrainState, batch: TrainBatch, *, method: Method, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """One update of everything.

    Each device differentiates its share of the global objective (its rows, divided by the global
    count); gradients are summed over devices.

    Args:
      state: the same on every device.
      batch: this device's rows.
      method: the parts.
      axis_name: the device axis to reduce over; None when `batch` is the global batch.

    Returns:
      The next state and the metrics of the global batch, the same on every device.
    """
    seen = look(state, batch, method, axis_name)
    features, answer = seen.features, seen.answer
    loss_s, supervised = supervised_gradients(state, batch, seen, axis_name)
    loss_u, unsupervised = unsupervised_gradients(state, features, seen.own, method, axis_name)

    # Each layer's own mixture of the two, pulled back once, and summed over devices.
    strength = method.unsupervised_weight * answer.scale
    gradients, loss_s, loss_u, head_gradients = parallel.total(
        (
            layerwise.masked_gradients(
                seen.pull_back,
                supervised,
                jax.tree.map(lambda g: strength * g, unsupervised),
                method.multipliers,
            ),
            loss_s,
            loss_u,
            (supervised[0], unsupervised[0]),
        ),
        axis_name,
    )

    # The update, and then what averages over updates.
    new = state.apply_gradients(grads=gradients, batch_stats=seen.batch_stats)
    rows, mu = batch.indices.shape
    labels = jax.nn.one_hot(batch.labels, answer.targets.shape[-1])
    targets, weights = seen.own.targets, seen.own.weights
    members = layerwise.Rows(  # kept by labelled row: joined end to end, devices would swap them
        features=features[:, : 1 + mu],
        targets=jnp.concatenate([labels[:, None], targets.reshape(rows, mu, labels.shape[1])], 1),
        weights=jnp.concatenate([jnp.ones((rows, 1)), weights.reshape(rows, mu)], 1),
    )
    new = new.replace(
        ema_params=optax.incremental_update(new.params, state.ema_params, 1 - method.ema_decay),
        centres=method.centres.update(
            seen.centres, new.params["classifier"], state.step, members, axis_name
        ),
        policy=answer.state,
    )

    # What a step does not define is left out of the means: a weight of 0.
    any_labeled = jnp.any(answer.labeled_weights > 0)
    any_unlabeled = mu > 0
    metrics = {
        "loss": (loss_s + strength * (loss_u + answer.regulariser), 1),
        "loss_supervised": (loss_s, any_labeled),
        "loss_unsupervised": (loss_u, any_unlabeled),
        "regulariser": (answer.regulariser, any_unlabeled),
        "learning_rate": (method.learning_rate(state.step), 1),
        "classifier_gradient_cosine": cosine(*head_gradients),
        "gradient_norm": (optax.tree.norm(gradients), 1),
        "parameter_norm": (optax.tree.norm(new.params), 1),
        **_pseudo_label_metrics(answer, seen.true_labels),
        **{name: (value, any_unlabeled) for name, value in answer.diagnostics.items()},
    }
    return new, {name: _pair(*pair) for name, pair in metrics.items()}


class Seen(NamedTuple):
    """A batch, looked at once: its features, and the pseudo-labels made of them."""

    features: jax.Array  # [B, 1 + 2μ, D] float32, of this device's rows
    pull_back: Callable  # of them -> (gradient of the backbone's parameters,)
    batch_stats: Any  # BatchNorm's next running statistics
    centres: Any  # Avg-Clustering's state, with the batch seen
    answer: policies.Assignment  # for the global batch
    own: policies.Assignment  # the same for this device's rows
    true_labels: jax.Array  # [μB] int32, of the global batch


def look(state: TrainState, batch: TrainBatch, method: Method, axis_name: str | None) -> Seen:
    """The forward half of a step. It changes nothing; arguments as of `train_step`."""
    policy, centres = method.policy, method.centres
    backbone, classifier = state.params["backbone"], state.params["classifier"]

    # One backbone pass over all views, with BatchNorm statistics over the global batch.
    def forward(backbone, images):
        features, updates = state.apply_fn(
            {"params": backbone, "batch_stats": state.batch_stats},
            normalize(images, method),
            train=True,
            mutable=["batch_stats"],
        )
        return features, updates.get("batch_stats", {})

    def forward_views(backbone):
        rows, views, *image = batch.images.shape
        features, batch_stats = forward(backbone, batch.images.reshape(-1, *image))
        return features.reshape(rows, views, -1), batch_stats

    features, pull_back, batch_stats = jax.vjp(forward_views, backbone, has_aux=True)

    # Pseudo-labels: a decision on the global batch, without gradient.
    def teacher_logits():  # a pass of its own over the weak views, whose statistics are not kept
        weak, _ = forward(state.ema_params["backbone"], split_views(batch.images).weak)
        return layerwise.linear(state.ema_params["classifier"], weak)

    views = split_views(features)
    inputs, true_labels = parallel.gather_rows(
        (
            policies.Inputs(
                weak_logits=centres.target_logits(state.centres, classifier, views.weak),
                strong_logits=centres.head(state.centres, classifier, views.strong),
                labeled_logits=layerwise.linear(classifier, views.labeled),
                labels=batch.labels,
                indices=batch.indices.reshape(-1),
                teacher_logits=teacher_logits() if policy.needs_teacher else None,
            ),
            batch.true_labels.reshape(-1),
        ),
        axis_name,
    )
    centres_state, weak_logits = centres.observe(state.centres, inputs.weak_logits, inputs.indices)
    answer = policy.assign(state.policy, inputs._replace(weak_logits=weak_logits))
    by_row = ("targets", "weights", "labeled_weights", "regulariser_gradient")
    own = parallel.own_rows({name: getattr(answer, name) for name in by_row}, axis_name)
    return Seen(
        features, pull_back, batch_stats, centres_state, answer, answer._replace(**own), true_labels
    )


def supervised_gradients(
    state: TrainState, batch: TrainBatch, seen: Seen, axis_name: str | None
) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    """This device's share of L_s, and of (∂L_s/∂φ, ∂L_s/∂z [B, 1 + 2μ, D])."""
    num_labeled = batch.labels.size * parallel.num_shards(axis_name)
    labels = jax.nn.one_hot(batch.labels, seen.own.targets.shape[-1])

    def loss(classifier, features):
        logits = layerwise.linear(classifier, split_views(features).labeled)
        weighted = seen.own.labeled_weights * losses.cross_entropy(logits, labels)
        return jnp.sum(weighted) / num_labeled

    return jax.value_and_grad(loss, (0, 1))(state.params["classifier"], seen.features)


def unsupervised_gradients(
    state: TrainState,
    features: jax.Array,
    own: policies.Assignment,
    method: Method,
    axis_name: str | None,
) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    """This device's share of L_u, and of (∂L_u(H = g_φ)/∂φ, ∂L_u(H = centres)/∂z).

    Args:
      state: of the step.
      features: [B, 1 + 2μ, D], of this device's rows.
      own: targets, weights and the regulariser's gradient of these rows.
      method: the parts.
      axis_name: of the step.

    Returns:
      L_u without the regulariser, and the two gradients with it, unmasked and without λ_u.
    """
    policy, centres, classifier = method.policy, method.centres, state.params["classifier"]
    # Supervised training has none.
    num_unlabeled = max(own.weights.size * parallel.num_shards(axis_name), 1)

    def loss(head, features, targets, weights):
        logits = head(getattr(split_views(features), policy.view))
        loss = jnp.sum(weights * policy.loss(logits, targets)) / num_unlabeled
        return loss + jnp.vdot(own.regulariser_gradient, logits), loss

    def through_classifier(classifier):
        head = functools.partial(layerwise.linear, classifier)
        return loss(head, features, own.targets, own.weights)[0]

    def through_centres(features):
        head = functools.partial(centres.head, state.centres, classifier)
        return loss(head, features, *centres.pullable(state.centres, own.targets, own.weights))

    (_, loss_u), by_features = jax.value_and_grad(through_centres, has_aux=True)(features)
    return loss_u, (jax.grad(through_classifier)(classifier), by_features)


def _pseudo_label_metrics(answer: policies.Assignment, true_labels: jax.Array) -> dict[str, tuple]:
    """Utilisation, accuracy where the truth is known, and what there is of each class.

    Utilisation (`mask_rate`) is over all rows. Accuracies are over the rows whose truth is not −1:
    it is −1 where it is not known, and for labelled images.

    By class: `class_acceptance`, the mean weight of its pseudo-labels; and of the rows whose truth
    is known, in rows a step, `class_pseudo_labels`, the weight of all its pseudo-labels, beside
    `class_truths`, how many are of it.
    """
    weights, pseudo_labels = answer.weights, jnp.argmax(answer.targets, axis=-1)
    num_classes = answer.targets.shape[-1]
    by_class = jax.nn.one_hot(pseudo_labels, num_classes)
    known = (true_labels >= 0).astype(jnp.float32)
    correct = known * (pseudo_labels == true_labels)
    return {
        "mask_rate": (jnp.sum(weights), weights.size),
        "pseudo_label_accuracy": (jnp.vdot(weights, correct), jnp.vdot(weights, known)),
        "pseudo_label_accuracy_all": (jnp.sum(correct), jnp.sum(known)),
        "class_acceptance": (weights @ by_class, jnp.sum(by_class, axis=0)),
        "class_pseudo_labels": ((weights * known) @ by_class, weights.size > 0),
        # of −1 there is no class
        "class_truths": (
            jnp.sum(jax.nn.one_hot(true_labels, num_classes), axis=0),
            weights.size > 0,
        ),
    }


def _pair(total, weight) -> jax.Array:
    """[2] or, of what is counted by class, [2, K] float32."""
    return jnp.stack(jnp.broadcast_arrays(jnp.float32(total), jnp.float32(weight)))


def eval_step(
    state: TrainState, batch: EvalBatch, *, method: Method, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """Accuracy and loss of the raw and of the EMA parameters on a batch.

    Both use the live BatchNorm statistics.

    Args:
      state: the same on every device; returned as it is.
      batch: this device's rows; those with mask 0 count for nothing.
      method: the parts; reads mean and std.
      axis_name: the device axis to reduce over; None when `batch` is the global batch.

    Returns:
      The state and {'accuracy', 'loss', 'accuracy_ema', 'loss_ema'} as [sum, weight] float32.
    """
    images = normalize(batch.images, method)
    labels = jnp.maximum(batch.labels, 0)
    metrics = {}
    for suffix, params in (("", state.params), ("_ema", state.ema_params)):
        variables = {"params": params["backbone"], "batch_stats": state.batch_stats}
        features = state.apply_fn(variables, images, train=False)
        logits = layerwise.linear(params["classifier"], features)
        loss = losses.cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1]))
        correct = jnp.argmax(logits, axis=-1) == batch.labels
        metrics["accuracy" + suffix] = (jnp.vdot(batch.mask, correct), jnp.sum(batch.mask))
        metrics["loss" + suffix] = (jnp.vdot(batch.mask, loss), jnp.sum(batch.mask))
    metrics = {name: _pair(*pair) for name, pair in metrics.items()}
    return state, parallel.total(metrics, axis_name)


class Views(NamedTuple):
    """A batch's rows by view, flat and in row order."""

    labeled: jax.Array  # [B, ...]
    weak: jax.Array  # [μB, ...]
    strong: jax.Array  # [μB, ...]


def split_views(x: jax.Array) -> Views:
    """[B, 1 + 2μ, ...] by labelled row -> the three views."""
    mu = x.shape[1] // 2
    weak, strong = x[:, 1 : 1 + mu], x[:, 1 + mu :]
    return Views(x[:, 0], *(v.reshape(len(x) * mu, *x.shape[2:]) for v in (weak, strong)))


def normalize(images: jax.Array, method: Method) -> jax.Array:
    """uint8 [n, H, W, 3] -> float32, each channel of the data set at mean 0 and deviation 1."""
    mean, std = (jnp.array(x, jnp.float32)[None, None, None, :] for x in (method.mean, method.std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def cosine(a, b) -> tuple[jax.Array, jax.Array]:
    """The cosine of two trees seen as vectors, and the weight that it has in a mean.

    Returns:
      (cosine, True); (0, False) where one of them is 0, which has no direction.
    """
    norms = optax.tree.norm(a) * optax.tree.norm(b)
    defined = norms > 0
    return jnp.where(defined, optax.tree.vdot(a, b) / jnp.where(defined, norms, 1), 0), defined
