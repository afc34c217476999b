"""Runs the forward pass and computes the gradients of both losses down to the features.

The supervised loss L_s compares predictions with labels, the unsupervised loss L_u with
pseudo-labels. layerwise.py combines their gradients layer by layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Float32, Int32, UInt8

from layermatch_jax.arrays import Array
from layermatch_jax.batches import TrainBatch
from layermatch_jax.method import freezing, layerwise, linear_head, policies, reductions
from layermatch_jax.method.assembly import Method
from layermatch_jax.method.state import TrainState


class Forward(NamedTuple):
    """The forward half of a step: features, outputs of the heads, and pseudo-labels."""

    features: Float[jax.Array, "B V D"]  # of this device's rows
    pull_back: Callable  # gradient of `features` -> (gradient of the backbone's parameters,)
    outputs: policies.Outputs  # of the global batch, with the logits of the head H of the centers
    # gradient of this device's rows of `outputs` -> (gradients of the policy heads, of `features`)
    pull_back_outputs: Callable
    # {unlabeled view: logits of the classifier}, of the global batch
    classifier_logits: dict[str, Float[jax.Array, "μB K"]]
    # gradient of this device's rows of `classifier_logits` -> (gradient of the classifier,)
    pull_back_classifier: Callable
    batch_stats: Any  # next running statistics of BatchNorm in the backbone
    head_stats: Any  # and in the policy heads
    centers: Any  # state of Avg-Clustering after `Centers.observe` of this batch
    assignment: policies.Assignment  # for the global batch
    true_labels: Int32[Array, " μB"]  # of the global batch


def run_forward(
    state: TrainState, batch: TrainBatch, method: Method, axis_name: str | None
) -> Forward:
    """Runs the network once over all views and assigns pseudo-labels.

    Pure. The arguments are those of `train_step`.
    """
    policy, centers, layout = method.policy, method.centers, method.layout
    backbone, classifier = state.params["backbone"], state.params["classifier"]
    options: dict[str, Any] = {"after": method.after} if method.after else {}
    if method.drop_path_seed is not None:
        options["rngs"] = {"drop_path": drop_path_key(method.drop_path_seed, state.step)}

    def apply_backbone(backbone, images):
        features, updates = state.apply_fn(
            {"params": backbone, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            **options,
        )
        return features, updates.get("batch_stats", {})

    def apply_network(images):
        features, _ = apply_backbone(backbone, images)
        return linear_head.linear(classifier, features)

    # The policy makes its views of kind MADE from the augmented ones.
    images = batch.images
    if not method.after:
        pixels = images.reshape(-1, *images.shape[2:])
        images = normalize(pixels, method.mean, method.std).reshape(images.shape)
    if policy.prepare:
        drawn = layout.drawn.split(images)
        made = policy.prepare(apply_network, drawn, batch.draws, state.policy)
        images = layout.join(drawn._replace(unlabeled=drawn.unlabeled | made))

    # One backbone pass over all views, with BatchNorm statistics over the global batch.
    def apply_to_views(backbone):
        # The compiler leaves out the backward pass below the first layer that is trained.
        fixed = jax.lax.stop_gradient(backbone)
        backbone = freezing.keep(method.frozen["backbone"], fixed, backbone)
        rows, views, *image = images.shape
        features, batch_stats = apply_backbone(backbone, images.reshape(-1, *image))
        return features.reshape(rows, views, -1), batch_stats

    features, pull_back, batch_stats = jax.vjp(apply_to_views, backbone, has_aux=True)
    views = layout.split(features)

    # The heads are a function of their own, apart from the backbone: the gradient of the features
    # can then pass through another head than that of the classifier.
    def apply_heads(policy_heads, features):
        logits = {
            name: centers.head(state.centers, classifier, x)
            for name, x in layout.split(features).unlabeled.items()
        }
        outputs, stats = {}, {}
        for name, head in method.heads.items():
            variables = {
                "params": policy_heads[name],
                "batch_stats": state.head_stats.get(name, {}),
            }
            flat = features.reshape(-1, features.shape[-1])
            output, updates = head.apply(variables, flat, train=True, mutable=["batch_stats"])
            outputs[name] = layout.split(output.reshape(*features.shape[:2], -1))
            if norms := updates.get("batch_stats"):  # Flax gives {} for a head without BatchNorm
                stats[name] = norms
        return policies.Outputs(logits, outputs), stats

    outputs, pull_back_outputs, head_stats = jax.vjp(
        apply_heads, state.params.get("heads", {}), features, has_aux=True
    )
    classifier_logits, pull_back_classifier = jax.vjp(
        lambda classifier: {
            name: linear_head.linear(classifier, x) for name, x in views.unlabeled.items()
        },
        classifier,
    )

    # The policy assigns pseudo-labels for the global batch, without gradient.
    def teacher_logits():  # a separate pass; its BatchNorm statistics are not kept
        target_images = layout.split(images).unlabeled[policy.target_view]
        features, _ = apply_backbone(state.ema_params["backbone"], target_images)
        return linear_head.linear(state.ema_params["classifier"], features)

    inputs, classifier_logits, true_labels = reductions.gather_rows(
        (
            policies.Inputs(
                target_logits={
                    name: centers.target_logits(state.centers, classifier, x)
                    for name, x in views.unlabeled.items()
                },
                outputs=outputs,
                labeled_logits={
                    name: linear_head.linear(classifier, x) for name, x in views.labeled.items()
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
    centers_state, target_logits = centers.observe(
        state.centers, inputs.target_logits[policy.target_view], inputs.unlabeled_indices
    )
    target_logits = inputs.target_logits | {policy.target_view: target_logits}
    assignment = policy.assign(state.policy, inputs._replace(target_logits=target_logits))
    return Forward(
        features=features,
        pull_back=pull_back,
        outputs=inputs.outputs,
        pull_back_outputs=pull_back_outputs,
        classifier_logits=classifier_logits,
        pull_back_classifier=pull_back_classifier,
        batch_stats=batch_stats,
        head_stats=head_stats,
        centers=centers_state,
        assignment=assignment,
        true_labels=true_labels,
    )


def supervised_gradients(
    state: TrainState, batch: TrainBatch, forward: Forward, method: Method, axis_name: str | None
) -> tuple[jax.Array, layerwise.HeadGradients]:
    """Returns this device's share of L_s, the mean over the labeled views, and of its gradients."""
    views = method.layout.views.labeled
    count = len(views) * batch.labels.size * reductions.num_shards(axis_name)
    labels = jax.nn.one_hot(batch.labels, state.params["classifier"]["bias"].shape[0])
    labeled_weights = reductions.local_rows(forward.assignment.labeled_weights, axis_name)

    def loss(classifier, features):
        features = method.layout.split(features).labeled
        by_view = [
            optax.softmax_cross_entropy(linear_head.linear(classifier, features[name]), labels)
            for name in views
        ]
        return sum(jnp.sum(labeled_weights * of_view) for of_view in by_view) / count

    loss_s, (by_classifier, by_features) = jax.value_and_grad(loss, (0, 1))(
        state.params["classifier"], forward.features
    )
    heads = {"classifier": by_classifier}
    if "heads" in state.params:  # labels do not train policy heads
        heads["heads"] = jax.tree.map(jnp.zeros_like, state.params["heads"])
    return loss_s, layerwise.HeadGradients(heads, by_features)


def unsupervised_gradients(
    state: TrainState,
    forward: Forward,
    assignment: policies.Assignment,
    method: Method,
    axis_name: str | None,
    only: str | None = None,
) -> tuple[dict[str, jax.Array], layerwise.HeadGradients]:
    """Returns the terms of L_u, and this device's share of their gradients.

    The classifier gets the gradient of L_u(H = g_φ), the features that of L_u(H = centers). Both
    are computed at the outputs of the global batch; each device then pulls back its own rows.

    Args:
      state: the state before the step.
      forward: from `run_forward`.
      assignment: for the global batch.
      method: the parts of a step.
      axis_name: the device axis; None when the step sees the global batch.
      only: the one term to differentiate; None = all.

    Returns:
      The terms of the global batch, and the gradients, unmasked and without λ_u.
    """
    policy = method.policy

    def loss(outputs, assignment):
        terms = policy.loss(outputs, assignment)
        return terms[only] if only else sum(terms.values()), terms

    def local_gradient(outputs, assignment):
        (_, terms), gradient = jax.value_and_grad(loss, has_aux=True)(outputs, assignment)
        return terms, reductions.local_rows(gradient, axis_name)

    targets, weights = method.centers.pullable(
        state.centers, assignment.targets, assignment.weights
    )
    pulled = assignment._replace(targets=targets, weights=weights)
    terms, by_outputs = local_gradient(forward.outputs, pulled)
    by_policy_heads, by_features = forward.pull_back_outputs(by_outputs)

    through_classifier = forward.outputs._replace(logits=forward.classifier_logits)
    _, by_outputs = local_gradient(through_classifier, assignment)
    (by_classifier,) = forward.pull_back_classifier(by_outputs.logits)
    heads = {"classifier": by_classifier}
    if "heads" in state.params:
        heads["heads"] = by_policy_heads
    return terms, layerwise.HeadGradients(heads, by_features)


def drop_path_key(seed: int, step) -> jax.Array:
    """Returns the key of the branches that a step drops, a function of (seed, step) alone."""
    # The state's random weights come from the keys below 2 + number of heads (state.py).
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 2**20), step)


def normalize(
    images: UInt8[Array, "n H W 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float32[Array, "n H W 3"]:
    """Subtracts `mean` from each channel of images / 255 and divides by `std`."""
    center, scale = (jnp.array(x, jnp.float32)[None, None, None, :] for x in (mean, std))
    return (images.astype(jnp.float32) / 255 - center) / scale
