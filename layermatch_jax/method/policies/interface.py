"""The interface of pseudo-label policies, which do not depend on layers or devices.

A policy sees the global batch, in global row order: B labeled rows, μB unlabeled rows, K classes.
Logits are float32. The keys of dicts by view are the names in the policy's `views`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32

from layermatch_jax.arrays import Array
from layermatch_jax.views import ByView, Views


class Spec(NamedTuple):
    """The sizes that a policy's state may depend on."""

    num_classes: int  # K
    feature_dim: int  # D, of the backbone's pooled features
    batch_size: int  # B, labeled images a step, all devices together
    unlabeled_ratio: int  # μ
    num_unlabeled: int  # N_u
    labels: np.ndarray  # [N_l] int32, of the labeled images in the order of the labeled set


class Outputs(NamedTuple):
    """The arguments of the unsupervised loss with respect to which it is differentiated."""

    # By unlabeled view: the logits of the classifier, or of the head H of the centers
    logits: dict[str, Float32[jax.Array, "μB K"]]
    heads: dict[str, ByView]  # {policy head: its outputs by view}


class Inputs(NamedTuple):
    """What a policy sees, without gradient."""

    target_logits: dict[str, Float32[jax.Array, "μB K"]]  # by unlabeled view, of the target head
    # From the head H of the centers, and from the policy heads
    outputs: Outputs
    labeled_logits: dict[str, Float32[jax.Array, "B K"]]  # by labeled view, of the classifier
    labels: Int32[Array, " B"]
    labeled_indices: Int32[Array, " B"]  # positions in the labeled set
    unlabeled_indices: Int32[Array, " μB"]  # positions in the unlabeled set
    draws: Any = ()  # the policy's own random draws, a tree of arrays [B, ...]
    # Logits of the EMA model for the target view, if the policy needs a teacher
    teacher_logits: Float32[jax.Array, "μB K"] | None = None


class Assignment(NamedTuple):
    """The result of a policy for a batch, with the rows in the order of the inputs."""

    targets: Float32[jax.Array, "μB K"]  # probabilities
    weights: Float32[jax.Array, " μB"]  # 0 for a rejected row
    labeled_weights: Float32[jax.Array, " B"]  # weights of labeled rows in the supervised loss
    scale: Float32[jax.Array, ""]  # multiplies λ_u (ramps)
    state: Any  # the next state
    diagnostics: dict[str, Float32[jax.Array, ""] | Float32[jax.Array, " K"]]  # for the log
    extra: Any = ()  # further arrays for the policy's loss


class Policy(NamedTuple):
    """A policy: its functions, and the views, heads and draws that it needs from the step."""

    init: Callable[[Spec], Any]  # spec -> state
    assign: Callable[[Any, Inputs], Assignment]  # (state, inputs) -> assignment, without gradient
    # (outputs, assignment) -> {name: [] float32}, the terms of the unsupervised loss for the global
    # batch. λ_u · scale multiplies their sum. The term "unsupervised" is the loss with `targets`
    # and `weights`; no other term depends on these two.
    loss: Callable[[Outputs, Assignment], dict[str, jax.Array]]
    views: Views = Views()
    target_view: str = "weak"  # the unlabeled view from which pseudo-labels are computed
    needs_teacher: bool = False  # whether `Inputs.teacher_logits` is computed
    # True: targets are estimates of the class. False: targets only say how another view should be
    # classified, and a layer report does not compare them with true labels.
    pseudo_labels: bool = True
    # The policy heads, on the pooled features of all views:
    # {name: (D, K, device axis for BatchNorm) -> module whose call takes (features [n, D], train)}
    heads: Mapping[str, Callable[[int, int, str | None], nn.Module]] = {}
    # (generator, B, μ) -> the policy's own random draws, a tree of arrays [B, ...]; None = no draws
    draws: Callable[[np.random.Generator, int, int], Any] | None = None
    # Makes the unlabeled views of kind MADE, before the forward pass and without gradient:
    # (apply, images, draws, state) -> {made view: images [n, H, W, 3] float32}. `images` are the
    # normalized images of the other views, and `draws` the policy's draws, both only for this
    # device's rows. `apply` is the network in training mode, images [n, H, W, 3] -> classifier
    # logits [n, K]. It can be differentiated. Its BatchNorm uses the statistics of these images
    # over all devices and does not change the running statistics.
    prepare: Callable[[Callable, ByView, Any, Any], dict[str, jax.Array]] | None = None


def make_assignment(
    inputs: Inputs,
    targets: Float[jax.Array, "μB K"],
    weights: Float[jax.Array, " μB"] | Bool[jax.Array, " μB"],
    **others,
) -> Assignment:
    """Makes an Assignment; fields that are not given get their neutral values.

    Args:
      inputs: the inputs of the policy; only shapes are read.
      targets: as in Assignment.
      weights: as in Assignment; a bool means 0 or 1.
      **others: further fields of Assignment.
    """
    neutral = {
        "labeled_weights": jnp.ones(inputs.labels.shape, jnp.float32),
        "scale": jnp.float32(1.0),
        "state": (),
        "diagnostics": {},
    }
    return Assignment(targets=targets, weights=weights.astype(jnp.float32), **(neutral | others))
