"""The train step and the evaluation step: pure functions, the same on one device and on many."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

from layermatch_jax.batch import EvalBatch, TrainBatch
from layermatch_jax.method import layerwise, losses, optimizer, policies
from layermatch_jax.method.state import TrainState
from layermatch_jax.runtime import parallel
from layermatch_jax.views import Layout


class Method(NamedTuple):
    """What a step is made of apart from its state."""

    policy: policies.Policy
    layout: Layout  # of the policy's views
    heads: Mapping[str, nn.Module]  # the policy's own
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

    Args:
      config: the whole config.
      params: the tree of parameters, or of their shapes.
      channel_statistics: means and standard deviations of red, green and blue, in [0, 1].

    Raises:
      InputError: an expression of the gradient mask matches none of `params`.
    """
    mean, std = channel_statistics
    policy = policies.create(config)
    size = params["classifier"]["kernel"].shape
    axis_name = parallel.axis_name(config.parallelism)
    return Method(
        policy=policy,
        layout=create_layout(config, policy),
        heads={name: create(*size, axis_name) for name, create in policy.heads.items()},
        centres=layerwise.create_centres(config),
        multipliers=layerwise.mask_multipliers(config.layerwise.gradient_mask, params),
        unsupervised_weight=config.unsupervised_weight,
        ema_decay=config.ema_decay,
        mean=mean,
        std=std,
        learning_rate=optimizer.learning_rate(config),
    )


def create_layout(config: ml_collections.ConfigDict, policy: policies.Policy) -> Layout:
    """The layout of a batch of the views that the policy wants."""
    # Without a loss on them, unlabeled images would only change BatchNorm's statistics.
    return Layout(policy.views, config.unlabeled_ratio if config.unsupervised_weight > 0 else 0)


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
    seen = forward(state, batch, method, axis_name)
    answer = seen.answer
    loss_s, supervised = supervised_gradients(state, batch, seen, method, axis_name)
    terms, unsupervised = unsupervised_gradients(state, seen, answer, method, axis_name)

    # Each layer's own mixture of the two, pulled back once, and summed over devices.
    strength = method.unsupervised_weight * answer.scale
    gradients, loss_s, head_gradients = parallel.total(
        (
            layerwise.masked_gradients(
                seen.pull_back,
                supervised,
                jax.tree.map(lambda g: strength * g, unsupervised),
                method.multipliers,
            ),
            loss_s,
            (supervised.heads["classifier"], unsupervised.heads["classifier"]),
        ),
        axis_name,
    )

    # The update, and then what averages over updates.
    new = state.apply_gradients(
        grads=gradients, batch_stats=seen.batch_stats, head_stats=seen.head_stats
    )
    new = new.replace(
        ema_params=optax.incremental_update(new.params, state.ema_params, 1 - method.ema_decay),
        centres=method.centres.update(
            seen.centres,
            new.params["classifier"],
            state.step,
            _members(seen, batch, method, axis_name),
            axis_name,
        ),
        policy=answer.state,
    )

    # What a step does not define is left out of the means: a weight of 0.
    any_labeled = jnp.any(answer.labeled_weights > 0)
    any_unlabeled = method.layout.mu > 0
    metrics = {
        "loss": (loss_s + strength * sum(terms.values()), 1),
        "loss_supervised": (loss_s, any_labeled),
        **{f"loss_{name}": (term, any_unlabeled) for name, term in terms.items()},
        "learning_rate": (method.learning_rate(state.step), 1),
        "classifier_gradient_cosine": cosine(*head_gradients),
        "gradient_norm": (optax.tree.norm(gradients), 1),
        "parameter_norm": (optax.tree.norm(new.params), 1),
        **_pseudo_label_metrics(answer, seen.true_labels),
        **{name: (value, any_unlabeled) for name, value in answer.diagnostics.items()},
    }
    return new, {name: _pair(*pair) for name, pair in metrics.items()}


class Forward(NamedTuple):
    """The forward half of a step: features, what the heads make of them, and pseudo-labels."""

    features: jax.Array  # [B, V, D] float32, of this device's rows
    pull_back: Callable  # of them -> (gradient of the backbone's parameters,)
    outputs: policies.Outputs  # of the global batch, by the head that features see the loss through
    # of this device's rows of `outputs` -> (gradient of the own heads' parameters, of features)
    pull_back_outputs: Callable
    classifier_logits: dict[str, jax.Array]  # {unlabeled view: [μB, K]}, global, of the classifier
    # of this device's rows of `classifier_logits` -> (gradient of the classifier,)
    pull_back_classifier: Callable
    batch_stats: Any  # BatchNorm's next running statistics of the backbone
    head_stats: Any  # and of the own heads
    centres: Any  # Avg-Clustering's state, with the batch seen
    answer: policies.Assignment  # for the global batch
    true_labels: jax.Array  # [μB] int32, of the global batch


def forward(state: TrainState, batch: TrainBatch, method: Method, axis_name: str | None) -> Forward:
    """Runs the network once over all views and has the policy assign pseudo-labels.

    It changes nothing; arguments as of `train_step`.
    """
    policy, centres, layout = method.policy, method.centres, method.layout
    backbone, classifier = state.params["backbone"], state.params["classifier"]

    # One backbone pass over all views, with BatchNorm statistics over the global batch.
    def apply_backbone(backbone, images):
        features, updates = state.apply_fn(
            {"params": backbone, "batch_stats": state.batch_stats},
            normalize(images, method),
            train=True,
            mutable=["batch_stats"],
        )
        return features, updates.get("batch_stats", {})

    def apply_to_views(backbone):
        rows, views, *image = batch.images.shape
        features, batch_stats = apply_backbone(backbone, batch.images.reshape(-1, *image))
        return features.reshape(rows, views, -1), batch_stats

    features, pull_back, batch_stats = jax.vjp(apply_to_views, backbone, has_aux=True)
    views = layout.split(features)

    # The heads, each by itself: a loss on their outputs can then be seen through another head.
    def apply_heads(own_heads, features):
        logits = {
            name: centres.head(state.centres, classifier, x)
            for name, x in layout.split(features).unlabeled.items()
        }
        outputs, stats = {}, {}
        for name, head in method.heads.items():
            variables = {"params": own_heads[name], "batch_stats": state.head_stats.get(name, {})}
            flat = features.reshape(-1, features.shape[-1])
            output, updates = head.apply(variables, flat, train=True, mutable=["batch_stats"])
            outputs[name] = layout.split(output.reshape(*features.shape[:2], -1))
            stats |= {name: updates["batch_stats"]} if "batch_stats" in updates else {}
        return policies.Outputs(logits, outputs), stats

    outputs, pull_back_outputs, head_stats = jax.vjp(
        apply_heads, state.params.get("heads", {}), features, has_aux=True
    )
    classifier_logits, pull_back_classifier = jax.vjp(
        lambda classifier: {
            name: layerwise.linear(classifier, x) for name, x in views.unlabeled.items()
        },
        classifier,
    )

    # Pseudo-labels: a decision on the global batch, without gradient.
    def teacher_logits():  # a pass of its own, whose BatchNorm statistics are not kept
        images = layout.split(batch.images).unlabeled[policy.target_view]
        features, _ = apply_backbone(state.ema_params["backbone"], images)
        return layerwise.linear(state.ema_params["classifier"], features)

    inputs, classifier_logits, true_labels = parallel.gather_rows(
        (
            policies.Inputs(
                target_logits={
                    name: centres.target_logits(state.centres, classifier, x)
                    for name, x in views.unlabeled.items()
                },
                outputs=outputs,
                labeled_logits={
                    name: layerwise.linear(classifier, x) for name, x in views.labeled.items()
                },
                labels=batch.labels,
                labeled_indices=batch.labeled_indices,
                unlabeled_indices=batch.unlabeled_indices.reshape(-1),
                draws=batch.draws,
                teacher_logits=teacher_logits() if policy.needs_teacher else None,
            ),
            classifier_logits,
            batch.true_labels.reshape(-1),
        ),
        axis_name,
    )
    centres_state, target_logits = centres.observe(
        state.centres, inputs.target_logits[policy.target_view], inputs.unlabeled_indices
    )
    target_logits = inputs.target_logits | {policy.target_view: target_logits}
    answer = policy.assign(state.policy, inputs._replace(target_logits=target_logits))
    return Forward(
        features=features,
        pull_back=pull_back,
        outputs=inputs.outputs,
        pull_back_outputs=pull_back_outputs,
        classifier_logits=classifier_logits,
        pull_back_classifier=pull_back_classifier,
        batch_stats=batch_stats,
        head_stats=head_stats,
        centres=centres_state,
        answer=answer,
        true_labels=true_labels,
    )


def supervised_gradients(
    state: TrainState, batch: TrainBatch, seen: Forward, method: Method, axis_name: str | None
) -> tuple[jax.Array, layerwise.HeadGradients]:
    """This device's share of L_s, the mean over the labeled views, and of its gradients."""
    views = method.layout.views.labeled
    count = len(views) * batch.labels.size * parallel.num_shards(axis_name)
    labels = jax.nn.one_hot(batch.labels, state.params["classifier"]["bias"].shape[0])
    labeled_weights = parallel.own_rows(seen.answer.labeled_weights, axis_name)

    def loss(classifier, features):
        features = method.layout.split(features).labeled
        by_view = [
            losses.cross_entropy(layerwise.linear(classifier, features[name]), labels)
            for name in views
        ]
        return sum(jnp.sum(labeled_weights * of_view) for of_view in by_view) / count

    loss_s, (by_classifier, by_features) = jax.value_and_grad(loss, (0, 1))(
        state.params["classifier"], seen.features
    )
    heads = {"classifier": by_classifier}
    if "heads" in state.params:  # labels do not teach a policy's own heads
        heads["heads"] = jax.tree.map(jnp.zeros_like, state.params["heads"])
    return loss_s, layerwise.HeadGradients(heads, by_features)


def unsupervised_gradients(
    state: TrainState,
    seen: Forward,
    answer: policies.Assignment,
    method: Method,
    axis_name: str | None,
    only: str | None = None,
) -> tuple[dict[str, jax.Array], layerwise.HeadGradients]:
    """The terms of L_u, and this device's share of their gradients.

    The classifier's gradient is that of L_u(H = g_φ), the features' that of L_u(H = centres). Both
    are taken at the outputs of the global batch; each device pulls back its own rows.

    Args:
      state: of the step.
      seen: of `forward`.
      answer: for the global batch.
      method: the parts.
      axis_name: of the step.
      only: the one term to differentiate; None = all.

    Returns:
      The terms of the global batch, and the gradients, unmasked and without λ_u.
    """
    policy = method.policy

    def loss(outputs, answer):
        terms = policy.loss(outputs, answer)
        return terms[only] if only else sum(terms.values()), terms

    def own_gradient(outputs, answer):
        (_, terms), gradient = jax.value_and_grad(loss, has_aux=True)(outputs, answer)
        return terms, parallel.own_rows(gradient, axis_name)

    targets, weights = method.centres.pullable(state.centres, answer.targets, answer.weights)
    pulled = answer._replace(targets=targets, weights=weights)
    terms, by_outputs = own_gradient(seen.outputs, pulled)
    by_own_heads, by_features = seen.pull_back_outputs(by_outputs)

    through_classifier = seen.outputs._replace(logits=seen.classifier_logits)
    _, by_outputs = own_gradient(through_classifier, answer)
    (by_classifier,) = seen.pull_back_classifier(by_outputs.logits)
    heads = {"classifier": by_classifier}
    if "heads" in state.params:
        heads["heads"] = by_own_heads
    return terms, layerwise.HeadGradients(heads, by_features)


def _members(
    seen: Forward, batch: TrainBatch, method: Method, axis_name: str | None
) -> layerwise.Rows:
    """What class centers average: the labeled images' and the target views' features."""
    layout = method.layout
    targets, weights = parallel.own_rows((seen.answer.targets, seen.answer.weights), axis_name)
    rows, K = len(batch.labels), targets.shape[-1]
    labeled = layout.labeled("weak")
    target_view = layout.unlabeled(method.policy.target_view)
    labels = jax.nn.one_hot(batch.labels, K)
    return layerwise.Rows(  # kept by labeled row: joined end to end, devices would swap them
        features=jnp.concatenate(
            [seen.features[:, labeled : labeled + 1], seen.features[:, target_view]], axis=1
        ),
        targets=jnp.concatenate([labels[:, None], targets.reshape(rows, layout.mu, K)], axis=1),
        weights=jnp.concatenate([jnp.ones((rows, 1)), weights.reshape(rows, layout.mu)], axis=1),
    )


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
) -> Metrics:
    """Accuracy and loss of the raw and of the EMA parameters on a batch.

    Both use the live BatchNorm statistics.

    Args:
      state: the same on every device.
      batch: this device's rows; those with mask 0 count for nothing.
      method: the parts; reads mean and std.
      axis_name: the device axis to reduce over; None when `batch` is the global batch.

    Returns:
      {'accuracy', 'loss', 'accuracy_ema', 'loss_ema'} as [sum, weight] float32.
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
    return parallel.total(metrics, axis_name)


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
