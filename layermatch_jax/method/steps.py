"""The train step and the evaluation step: pure functions, the same on one device and on many."""

import jax
import jax.numpy as jnp
import optax

from layermatch_jax.arrays import Array
from layermatch_jax.batches import EvalBatch, TrainBatch
from layermatch_jax.method import (
    avg_clustering,
    backprop,
    freezing,
    layerwise,
    linear_head,
    policies,
    reductions,
)
from layermatch_jax.method.assembly import Method
from layermatch_jax.method.state import TrainState

# A metric is [sum, weight], so that steps are averaged without a mean of means. Metrics by class
# are [2, K].
Metrics = dict[str, jax.Array]


def train_step(
    state: TrainState, batch: TrainBatch, *, method: Method, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """Runs one train step: updates parameters, optimizer, statistics, averages and policy.

    Each device differentiates its share of the global objective (its rows, divided by the global
    count); gradients are summed over devices.

    Args:
      state: the same on every device.
      batch: this device's rows.
      method: the parts of a step.
      axis_name: the device axis to reduce over; None when `batch` is the global batch.

    Returns:
      The next state and the metrics of the global batch, the same on every device.
    """
    forward = backprop.run_forward(state, batch, method, axis_name)
    assignment = forward.assignment
    loss_s, supervised = backprop.supervised_gradients(state, batch, forward, method, axis_name)
    terms, unsupervised = backprop.unsupervised_gradients(
        state, forward, assignment, method, axis_name
    )

    # Each layer gets its own combination of the two gradients, summed over devices.
    strength = method.unsupervised_weight * assignment.scale
    gradients, loss_s, head_gradients = reductions.total(
        (
            layerwise.masked_gradients(
                forward.pull_back,
                supervised,
                jax.tree.map(lambda g: strength * g, unsupervised),
                method.multipliers,
            ),
            loss_s,
            (supervised.heads["classifier"], unsupervised.heads["classifier"]),
        ),
        axis_name,
    )

    zeros = jax.tree.map(jnp.zeros_like, gradients)
    gradients = freezing.keep(method.frozen, zeros, gradients)

    # First the update, then the averages over updates (EMA and centers).
    new = state.apply_gradients(
        grads=gradients, batch_stats=forward.batch_stats, head_stats=forward.head_stats
    )
    averaged = optax.incremental_update(new.params, state.ema_params, 1 - method.ema_decay)
    new = new.replace(
        ema_params=freezing.keep(method.frozen, state.ema_params, averaged),  # not even rounded
        centers=method.centers.update(
            forward.centers,
            new.params["classifier"],
            state.step,
            _members(forward, batch, method, axis_name),
            axis_name,
        ),
        policy=assignment.state,
    )

    # A metric that this step does not define gets the weight 0, so that the means leave it out.
    any_labeled = jnp.any(assignment.labeled_weights > 0)
    any_unlabeled = method.layout.mu > 0
    metrics = {
        "loss": (loss_s + strength * sum(terms.values()), 1),
        "loss_supervised": (loss_s, any_labeled),
        **{f"loss_{name}": (term, any_unlabeled) for name, term in terms.items()},
        "learning_rate": (method.learning_rate(state.step), 1),
        "classifier_gradient_cosine": cosine(*head_gradients),
        "gradient_norm": (optax.tree.norm(gradients), 1),
        "parameter_norm": (optax.tree.norm(new.params), 1),
        **_pseudo_label_metrics(assignment, forward.true_labels),
        **{name: (value, any_unlabeled) for name, value in assignment.diagnostics.items()},
    }
    return new, {name: _pair(*pair) for name, pair in metrics.items()}


def _members(
    forward: backprop.Forward, batch: TrainBatch, method: Method, axis_name: str | None
) -> avg_clustering.Rows:
    """Collects the features that class centers average: labeled images and target views."""
    layout = method.layout
    targets, weights = reductions.local_rows(
        (forward.assignment.targets, forward.assignment.weights), axis_name
    )
    rows, K = len(batch.labels), targets.shape[-1]
    labeled = layout.labeled("weak")
    target_view = layout.unlabeled(method.policy.target_view)
    labels = jax.nn.one_hot(batch.labels, K)
    # By labeled row, so that the order does not depend on the number of devices.
    return avg_clustering.Rows(
        features=jnp.concatenate(
            [forward.features[:, labeled : labeled + 1], forward.features[:, target_view]], axis=1
        ),
        targets=jnp.concatenate([labels[:, None], targets.reshape(rows, layout.mu, K)], axis=1),
        weights=jnp.concatenate([jnp.ones((rows, 1)), weights.reshape(rows, layout.mu)], axis=1),
    )


def _pseudo_label_metrics(assignment: policies.Assignment, true_labels: Array) -> dict[str, tuple]:
    """Returns the mask rate, the accuracy of pseudo-labels, and counts for each class.

    `mask_rate` is the mean weight over all rows. Accuracies are over the rows with a known true
    label; −1 marks rows where it is unknown or where the image is a labeled one.

    By class: `class_acceptance` is the mean weight of its pseudo-labels, over all rows.
    `class_pseudo_labels` is the sum of the weights of its pseudo-labels, and `class_truths` the
    number of images of this class; both are per step, over the rows with a known true label.
    """
    weights, pseudo_labels = assignment.weights, jnp.argmax(assignment.targets, axis=-1)
    num_classes = assignment.targets.shape[-1]
    by_class = jax.nn.one_hot(pseudo_labels, num_classes)
    known = (true_labels >= 0).astype(jnp.float32)
    correct = known * (pseudo_labels == true_labels)
    return {
        "mask_rate": (jnp.sum(weights), weights.size),
        "pseudo_label_accuracy": (jnp.vdot(weights, correct), jnp.vdot(weights, known)),
        "pseudo_label_accuracy_all": (jnp.sum(correct), jnp.sum(known)),
        "class_acceptance": (weights @ by_class, jnp.sum(by_class, axis=0)),
        "class_pseudo_labels": ((weights * known) @ by_class, weights.size > 0),
        # one_hot(−1) is all zeros
        "class_truths": (
            jnp.sum(jax.nn.one_hot(true_labels, num_classes), axis=0),
            weights.size > 0,
        ),
    }


def _pair(total, weight) -> jax.Array:
    """Stacks a sum and its weight: [2] float32, or [2, K] for a metric by class."""
    return jnp.stack(jnp.broadcast_arrays(jnp.float32(total), jnp.float32(weight)))


def eval_step(
    state: TrainState, batch: EvalBatch, *, method: Method, axis_name: str | None = None
) -> Metrics:
    """Computes accuracy and loss of the raw and of the EMA parameters on a batch.

    Both use the running BatchNorm statistics of the state; there is no EMA of these.

    Args:
      state: the same on every device.
      batch: this device's rows; rows with mask 0 do not count.
      method: the parts of a step; reads mean and std.
      axis_name: the device axis to reduce over; None when `batch` is the global batch.

    Returns:
      {'accuracy', 'loss', 'accuracy_ema', 'loss_ema'} as [sum, weight] float32, and
      'confusion_ema': counts [K, K] by the EMA parameters; rows are true classes.
    """
    images = backprop.normalize(batch.images, method.mean, method.std)
    labels = jnp.maximum(batch.labels, 0)
    metrics, confusion = {}, None
    for suffix, params in (("", state.params), ("_ema", state.ema_params)):
        variables = {"params": params["backbone"], "batch_stats": state.batch_stats}
        features = state.apply_fn(variables, images, train=False)
        logits = linear_head.linear(params["classifier"], features)
        loss = optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1]))
        correct = jnp.argmax(logits, axis=-1) == batch.labels
        metrics["accuracy" + suffix] = (jnp.vdot(batch.mask, correct), jnp.sum(batch.mask))
        metrics["loss" + suffix] = (jnp.vdot(batch.mask, loss), jnp.sum(batch.mask))
        guesses = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
        confusion = jax.nn.one_hot(labels, logits.shape[-1]).T @ (batch.mask[:, None] * guesses)
    metrics = {name: _pair(*pair) for name, pair in metrics.items()}
    metrics["confusion_ema"] = confusion
    return reductions.total(metrics, axis_name)


def cosine(a, b) -> tuple[jax.Array, jax.Array]:
    """Computes the cosine between two trees as vectors, and its weight in a mean.

    Returns:
      (cosine, True); (0, False) if one of the vectors is 0 and so has no direction.
    """
    norms = optax.tree.norm(a) * optax.tree.norm(b)
    defined = norms > 0
    return jnp.where(defined, optax.tree.vdot(a, b) / jnp.where(defined, norms, 1), 0), defined
