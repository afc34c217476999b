"""CoMatch: pseudo-labels smoothed by a memory, and embeddings trained on their graph."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax

from layermatch_jax.arrays import Array
from layermatch_jax.method.policies import parts
from layermatch_jax.method.policies.interface import (
    Assignment,
    Inputs,
    Outputs,
    Policy,
    Spec,
    make_assignment,
)
from layermatch_jax.views import Views

# Values from Li 2021 and its authors' code, for CIFAR-10 and STL-10.
TEMPERATURE = 0.2  # of similarities
SMOOTHING = 0.9  # α, the weight of an image's own prediction; the memory has 1 − α
CONTRAST_THRESHOLD = 0.8  # T: rows are neighbors if p_i · p_j is at least T
CONTRAST_WEIGHT = 1.0  # λ_c, relative to λ_u
DIMENSIONS = 64  # of the embeddings
MEMORY = 5  # batches
ALIGNED_OVER = 32  # batches over which distribution alignment averages predictions


class Projection(nn.Module):
    """Maps features [n, D] to unit-length embeddings [n, 64]: D → D, LeakyReLU (0.1), D → 64."""

    @nn.compact
    def __call__(self, features: Array, train: bool) -> jax.Array:
        """Embeds features; `train` changes nothing."""
        del train
        x = nn.leaky_relu(nn.Dense(features.shape[-1])(features), 0.1)
        x = nn.Dense(DIMENSIONS)(x)
        return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-12)


def similarities(a: Array, b: Array) -> jax.Array:
    """Computes the similarities a_i · b_j / 0.2, [n, m], of embeddings [n, d] and [m, d]."""
    cosines = jnp.dot(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return cosines / TEMPERATURE


def neighbors(targets: jax.Array) -> jax.Array:
    """Makes the graph of pseudo-labels, [n, n] with row sums 1 (Li 2021, eq. 7 and section 3.3).

    Rows i ≠ j of targets [n, K] have an edge of weight p_i · p_j if that is at least 0.8. Each row
    has an edge of weight 1 to itself. Then each row of the graph is divided by its sum.
    """
    agreement = jnp.dot(targets, targets.T, precision=jax.lax.Precision.HIGHEST)
    itself = jnp.eye(len(targets), dtype=bool)
    agreement = jnp.where(itself, 1.0, agreement)
    agreement = jnp.where(agreement >= CONTRAST_THRESHOLD, agreement, 0.0)
    return agreement / jnp.sum(agreement, axis=-1, keepdims=True)


SETTINGS = {"threshold": parts.THRESHOLD}
CENTERS = ("none", "classifier")


def create(config: ml_collections.ConfigDict) -> Policy:
    """Rule: p = 0.9·q̃ + 0.1·Σ_m s_m·p_m, w = 1[max p ≥ τ]; soft cross-entropy, and a contrast.

    Li 2021 (CoMatch), Algorithm 1, as in its authors' code. q̃ is the prediction for the weak view,
    divided by the mean prediction of the last 32 batches and normalized. The memory holds the
    embeddings of the last 5 batches with their probabilities p_m: one-hot labels of labeled rows
    and q̃ (not smoothed) of unlabeled rows. s_m is the softmax over the similarities between the
    embedding of the weak view and those in the memory. In the first 5 steps the memory is not
    full, and p = q̃ (the authors' code waits one step longer).

    The loss has a second term, a mean over the rows of the global batch: the cross-entropy between
    the graph of p (`neighbors`) and the softmax over the similarities between the embeddings of the
    two strong views. The authors' code adds 1e-7 inside its logarithm; a log-softmax does not need
    that. BatchNorm's running statistics are those of all views, as in the authors' code.

    Args:
      config: the whole config; reads policy.threshold, τ in [0, 1].

    Returns:
      A policy. Its state holds the memory (`embeddings` [M, 64] and `probabilities` [M, K] float32,
      M = 5·(1 + μ)·B), the last 32 mean predictions (`predictions` [32, K]) and the number of
      batches so far (`batches` int32). Diagnostics: class_threshold [K]; neighbors, the mean number
      of neighbors that a row has besides itself.
    """
    threshold = config.policy.threshold

    def init(spec: Spec) -> dict:
        rows = MEMORY * (1 + spec.unlabeled_ratio) * spec.batch_size
        return {
            "embeddings": jnp.zeros((rows, DIMENSIONS), jnp.float32),
            "probabilities": jnp.zeros((rows, spec.num_classes), jnp.float32),
            "predictions": jnp.zeros((ALIGNED_OVER, spec.num_classes), jnp.float32),
            "batches": jnp.int32(0),
        }

    def assign(state: dict, inputs: Inputs) -> Assignment:
        embeddings = inputs.outputs.heads["projection"]
        weak, num_classes = embeddings.unlabeled["weak"], inputs.target_logits["weak"].shape[-1]
        batches = state["batches"]

        # Distribution alignment; in the first 32 steps, over the batches so far.
        probabilities = jax.nn.softmax(inputs.target_logits["weak"])
        predictions = (
            state["predictions"]
            .at[batches % ALIGNED_OVER]
            .set(jnp.sum(probabilities, axis=0) / max(len(weak), 1))
        )
        known = jnp.minimum(batches + 1, ALIGNED_OVER)
        aligned = parts.ratio(probabilities, (jnp.sum(predictions, axis=0) / known)[None, :])

        # Smoothing, once the memory is full.
        remembered = jnp.dot(
            jax.nn.softmax(similarities(weak, state["embeddings"])),
            state["probabilities"],
            precision=jax.lax.Precision.HIGHEST,
        )
        smoothed = SMOOTHING * aligned + (1 - SMOOTHING) * remembered
        targets = jnp.where(batches >= MEMORY, smoothed, aligned)

        # This batch replaces the oldest one in the memory.
        labels = jax.nn.one_hot(inputs.labels, num_classes)
        rows = len(weak) + len(labels)
        start = batches % MEMORY * rows
        new_embeddings = jnp.concatenate([weak, embeddings.labeled["weak"]])
        new_probabilities = jnp.concatenate([aligned, labels])
        update = jax.lax.dynamic_update_slice_in_dim
        graph = neighbors(targets)
        return make_assignment(
            inputs,
            targets=targets,
            weights=jnp.max(targets, axis=-1) >= threshold,
            extra={"graph": graph},
            state={
                "embeddings": update(state["embeddings"], new_embeddings, start, axis=0),
                "probabilities": update(state["probabilities"], new_probabilities, start, axis=0),
                "predictions": predictions,
                "batches": batches + 1,
            },
            diagnostics={
                "class_threshold": jnp.full(num_classes, threshold),
                "neighbors": jnp.sum(graph > 0) / max(len(graph), 1) - 1,
            },
        )

    unsupervised = parts.unsupervised(optax.softmax_cross_entropy)

    def loss(outputs: Outputs, assignment: Assignment) -> dict[str, jax.Array]:
        embeddings = outputs.heads["projection"].unlabeled
        similar = similarities(embeddings["strong"], embeddings["second_strong"])
        contrast = optax.softmax_cross_entropy(similar, assignment.extra["graph"])
        return unsupervised(outputs, assignment) | {
            "contrast": CONTRAST_WEIGHT * jnp.sum(contrast) / max(len(contrast), 1)
        }

    return Policy(
        init,
        assign,
        loss,
        views=Views(unlabeled={"weak": "weak", "strong": "strong", "second_strong": "strong"}),
        heads={"projection": lambda dim, num_classes, axis_name: Projection()},
    )
