"""Avg-Clustering: the centers that features are pulled to, in four readings.

The paper (arXiv 2406.14207) names the idea. Its formulas were not available to us, so each reading
is one way to understand the idea.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Float, Int32

from layermatch_jax.arrays import Array
from layermatch_jax.method import per_sample, reductions
from layermatch_jax.method.linear_head import linear

# Divides the cosine similarities of the `features` reading.
TEMPERATURE = 0.1


# The logit of a class that has no center yet. The probability of the class is exactly 0 in float32.
# Unlike -inf, this number gives no NaN when it is multiplied by a target of 0.
_NO_CENTER = -1e9


class Rows(NamedTuple):
    """The features that class centers average, with the targets and weights on this device.

    A row has n = 1 + μ views: the weak view of its labeled image, then the target views of its μ
    unlabeled images.
    """

    features: Float[jax.Array, "B n D"]
    targets: Float[jax.Array, "B n K"]  # labels and pseudo-labels
    weights: Float[jax.Array, "B n"]  # 1 for labeled images


class Centers(NamedTuple):
    """A reading: its state, its effect on the pseudo-labels, and the head H that pulls features.

    The state is float32 (counts are int32) and the same on every device. It holds no parameters.
    """

    # (classifier, num_unlabeled) -> state
    init: Callable[[Any, int], Any]
    # (state, classifier, features of an unlabeled view) -> logits of the target head
    target_logits: Callable[[Any, Any, Float[Array, "n D"]], Float[jax.Array, "n K"]]
    # (state, target logits of the global batch, indices of the images) -> (next state, the logits
    # from which pseudo-labels are computed)
    observe: Callable[
        [Any, Float[jax.Array, "μB K"], Int32[Array, " μB"]], tuple[Any, Float[jax.Array, "μB K"]]
    ]
    # (state, classifier, features) -> logits of the head H
    head: Callable[[Any, Any, Float[Array, "n D"]], Float[jax.Array, "n K"]]
    # (state, targets [n, K], weights [n]) -> (targets, weights) for ∂L_u(H)/∂z
    pullable: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    # (state, new classifier, step [] int32, Rows, axis_name) -> the state after the update
    update: Callable[[Any, Any, jax.Array, Rows, str | None], Any]


# Without averaging, H is the classifier itself.
_NONE = Centers(
    init=lambda classifier, num_unlabeled: (),
    target_logits=lambda state, classifier, features: linear(classifier, features),
    observe=lambda state, logits, indices: (state, logits),
    head=lambda state, classifier, features: linear(classifier, features),
    pullable=lambda state, targets, weights: (targets, weights),
    update=lambda state, classifier, step, rows, axis_name: state,
)


def _warmed_up(momentum: float, warm_up: float, count: jax.Array) -> jax.Array:
    """min(m, (1 + t) / (w + t)): averages over few updates at first; w = 1 is no warm-up."""
    return jnp.minimum(momentum, (1.0 + count) / (warm_up + count))


def _classifier_centers(momentum: float, warm_up: float, target_head: str) -> Centers:
    """φ̄ ← m·φ̄ + (1 − m)·φ after each update, φ̄₀ = φ₀; H = g_φ̄.

    With softmax cross-entropy, ∂L/∂z = W(p − ŷ): features are pulled to the columns of W. Averaging
    the weights of a linear head averages its outputs for a given feature.
    """

    def update(state, classifier, step, rows, axis_name):
        del rows, axis_name
        m = _warmed_up(momentum, warm_up, step)
        return optax.incremental_update(classifier, state, 1 - m)

    averaged = lambda state, classifier, features: linear(state, features)  # noqa: E731
    return _NONE._replace(
        init=lambda classifier, num_unlabeled: jax.tree.map(jnp.array, classifier),
        target_logits=averaged if target_head == "centers" else _NONE.target_logits,
        head=averaged,
        update=update,
    )


def _feature_centers(momentum: float, warm_up: float) -> Centers:
    """c_k ← m_k·c_k + (1 − m_k)·(weighted mean feature of class k); H = cosine(z, c_k) / 0.1.

    The mean is over the labeled images and the target views of the global batch. A class without
    weight keeps its center. m_k warms up with the number of updates of class k.
    """

    def init(classifier, num_unlabeled):
        del num_unlabeled
        dim, num_classes = classifier["kernel"].shape
        return {
            "centers": jnp.zeros((num_classes, dim), jnp.float32),
            "updates": jnp.zeros(num_classes, jnp.int32),
        }

    def head(state, classifier, features):
        del classifier
        cosine = jnp.dot(
            _unit(features), _unit(state["centers"]).T, precision=jax.lax.Precision.HIGHEST
        )
        return jnp.where(state["updates"][None, :] > 0, cosine / TEMPERATURE, _NO_CENTER)

    def pullable(state, targets, weights):
        seen = (state["updates"] > 0).astype(jnp.float32)
        return targets * seen[None, :], weights * seen[jnp.argmax(targets, axis=-1)]

    def update(state, classifier, step, rows, axis_name):
        del classifier, step
        members = rows.targets * rows.weights[..., None]
        sums = jnp.einsum(
            "bvk,bvd->kd", members, rows.features, precision=jax.lax.Precision.HIGHEST
        )
        sums, weight = reductions.total((sums, jnp.sum(members, axis=(0, 1))), axis_name)
        present = weight > 0
        mean = sums / jnp.where(present, weight, 1.0)[:, None]
        m = _warmed_up(momentum, warm_up, state["updates"])[:, None]
        centers = optax.incremental_update(mean, state["centers"], 1 - m)
        return {
            "centers": jnp.where(present[:, None], centers, state["centers"]),
            "updates": state["updates"] + present.astype(jnp.int32),
        }

    return _NONE._replace(init=init, head=head, pullable=pullable, update=update)


def _output_centers(momentum: float) -> Centers:
    """o_j ← m·o_j + (1 − m)·q_j per sample; labels from o_j / (1 − m^n_j) (Laine 2017, eq. 3).

    Temporal ensembling: o_j averages the probabilities q_j of the target view of sample j, and n_j
    counts its visits. If a sample occurs twice in a batch, its last row in global order counts.
    """

    def init(classifier, num_unlabeled):
        num_classes = classifier["bias"].shape[0]
        return {
            "outputs": jnp.zeros((num_unlabeled, num_classes), jnp.float32),
            "visits": jnp.zeros(num_unlabeled, jnp.int32),
        }

    def observe(state, logits, indices):
        outputs = optax.incremental_update(
            jax.nn.softmax(logits), state["outputs"][indices], 1 - momentum
        )
        visits = state["visits"][indices] + 1
        last = per_sample.last_of_each(indices)
        state = {
            "outputs": per_sample.write(state["outputs"], indices, outputs, last),
            "visits": per_sample.write(state["visits"], indices, visits, last),
        }
        debias = 1 - momentum ** state["visits"][indices].astype(jnp.float32)
        mean = state["outputs"][indices] / debias[:, None]
        return state, jnp.log(jnp.maximum(mean, jnp.finfo(jnp.float32).tiny))

    return _NONE._replace(init=init, observe=observe)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-12)


def create_centers(config: ml_collections.ConfigDict) -> Centers:
    """Makes the reading that `config.avg_clustering.centers` names.

    Args:
      config: the whole config, from automatic.resolve; reads avg_clustering.{centers, momentum,
        warm_up, target_head}. The momentum is per step for `classifier`, per update of a class for
        `features`, per visit of an image for `outputs`.
    """
    settings = config.avg_clustering
    momentum = settings.momentum
    return {
        "classifier": lambda: _classifier_centers(momentum, settings.warm_up, settings.target_head),
        "features": lambda: _feature_centers(momentum, settings.warm_up),
        "outputs": lambda: _output_centers(momentum),
        "none": lambda: _NONE,
    }[settings.centers]()
