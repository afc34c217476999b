"""CoMatch: pseudo-labels smoothed by a memory, and embeddings that follow the pseudo-labels."""

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

# Of Li 2021 and its authors' code, for CIFAR-10 and STL-10.
TEMPERATURE = 0.2  # of similarities
SMOOTHING = 0.9  # α, the share of a prediction that is its own
CONTRAST_THRESHOLD = 0.8  # T: rows whose pseudo-labels agree more than that are neighbors
CONTRAST_WEIGHT = 1.0  # λ_c, relative to λ_u
DIMENSIONS = 64  # of the embeddings
MEMORY = 5  # batches
ALIGNED_OVER = 32  # batches, that distribution alignment averages predictions over


class Projection(nn.Module):
    """Features [n, D] -> embeddings [n, 64] of unit length: D → D, LeakyReLU (0.1), D → 64."""

    @nn.compact
    def __call__(self, features: Array, train: bool) -> jax.Array:
        """Embeds features; `train` changes nothing."""
        del train
        x = nn.leaky_relu(nn.Dense(features.shape[-1])(features), 0.1)
        x = nn.Dense(DIMENSIONS)(x)
        return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-12)


def similarities(a: Array, b: Array) -> jax.Array:
    """a_i · b_j / 0.2 for embeddings [n, d] and [m, d], logits [n, m] of which j is like i."""
    cosines = jnp.dot(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return cosines / TEMPERATURE


def neighbors(targets: jax.Array) -> jax.Array:
    """The graph of pseudo-labels: [n, n], rows of sum 1 (Li 2021, eq. 7 and section 3.3).

    Rows i and j of targets [n, K] are neighbors by p_i · p_j where that is at least 0.8; each row
    is its own neighbor by 1.
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

    Li 2021 (CoMatch), Algorithm 1, in the form of its authors' code. q̃ is the weak view's
    prediction divided by the mean prediction of the last 32 batches, normalized. s_m is the
    similarity of its embedding with the m-th of the memory: the embeddings of the last 5 batches,
    labeled rows with their one-hot labels, unlabeled rows with q̃ (not smoothed). Until the memory
    is full, in the first 5 steps, p = q̃ (the authors' code waits for one step more). The loss has a
    second term: the cross-entropy of the graph of p (`neighbors`) with the similarities of the two
    strong views' embeddings, a mean over the rows of the global batch. The authors' code adds 1e-7
    inside its logarithm, which a log-softmax does not need.

    BatchNorm's running statistics are those of all views, as in the authors' code.

    Args:
      config: the whole config; reads policy.threshold, τ in [0, 1].

    Returns:
      A policy whose state holds the memory (`embeddings` [M, 64] and `probabilities` [M, K] float32
      with M = 5·(1 + μ)·B), the last 32 mean predictions (`predictions` [32, K]) and the number of
      batches seen (`batches` int32). Diagnostics: class_threshold [K]; neighbors, the mean number
      that a row has beside itself.
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

        # Distribution alignment, by the batches that there have been so far.
        probabilities = jax.nn.softmax(inputs.target_logits["weak"])
        predictions = (
            state["predictions"]
            .at[batches % ALIGNED_OVER]
            .set(jnp.sum(probabilities, axis=0) / max(len(weak), 1))
        )
        known = jnp.minimum(batches + 1, ALIGNED_OVER)
        aligned = parts.ratio(probabilities, (jnp.sum(predictions, axis=0) / known)[None, :])

        # Smoothing by the memory, once it is full.
        remembered = jnp.dot(
            jax.nn.softmax(similarities(weak, state["embeddings"])),
            state["probabilities"],
            precision=jax.lax.Precision.HIGHEST,
        )
        smoothed = SMOOTHING * aligned + (1 - SMOOTHING) * remembered
        targets = jnp.where(batches >= MEMORY, smoothed, aligned)

        # What is remembered of this batch takes the place of the oldest.
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
