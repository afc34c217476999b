"""What a pseudo-label policy gets and what it returns. It knows nothing of layers or devices.

A policy sees the global batch, in global row order: B labeled rows, μB unlabeled rows, K classes.
Logits are float32. Arrays by view have the names that the policy's `views` give them.
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
    labels: np.ndarray  # [N_l] int32, of the labeled images by position


class Outputs(NamedTuple):
    """What the unsupervised loss is a function of, and is differentiated by."""

    # By unlabeled view, of the head that the loss goes through
    logits: dict[str, Float32[jax.Array, "μB K"]]
    heads: dict[str, ByView]  # {policy head: its output for every view}


class Inputs(NamedTuple):
    """What a policy sees, without gradient."""

    target_logits: dict[str, Float32[jax.Array, "μB K"]]  # by unlabeled view, of the target head
    # Of the head that the features see the loss through, and of the policy's heads
    outputs: Outputs
    labeled_logits: dict[str, Float32[jax.Array, "B K"]]  # by labeled view, of the classifier
    labels: Int32[Array, " B"]
    labeled_indices: Int32[Array, " B"]  # positions in the labeled set
    unlabeled_indices: Int32[Array, " μB"]  # positions in the unlabeled set
    draws: Any = ()  # the policy's own, a tree of arrays [B, ...]
    # The EMA model's of the target view, for a policy that needs a teacher
    teacher_logits: Float32[jax.Array, "μB K"] | None = None


class Assignment(NamedTuple):
    """What a policy assigns to the same rows."""

    targets: Float32[jax.Array, "μB K"]  # probabilities
    weights: Float32[jax.Array, " μB"]  # 0 for a rejected row
    labeled_weights: Float32[jax.Array, " B"]  # of the supervised loss
    scale: Float32[jax.Array, ""]  # multiplies λ_u (ramps)
    state: Any  # the next state
    diagnostics: dict[str, Float32[jax.Array, ""] | Float32[jax.Array, " K"]]  # for the log
    extra: Any = ()  # what else the policy's loss needs


class Policy(NamedTuple):
    """A policy: functions, and what it needs of the step."""

    init: Callable[[Spec], Any]  # spec -> state
    assign: Callable[[Any, Inputs], Assignment]  # (state, inputs) -> assignment, without gradient
    # (outputs, assignment) -> {name: [] float32}, the terms of the unsupervised loss, whose sum is
    # multiplied by λ_u · scale. A function of the global batch, the same on every device. The term
    # "unsupervised" is the loss by `targets` and `weights`; the others do not depend on them.
    loss: Callable[[Outputs, Assignment], dict[str, jax.Array]]
    views: Views = Views()
    target_view: str = "weak"  # the unlabeled view that pseudo-labels are made of
    needs_teacher: bool = False  # whether the EMA model looks at the target view, too
    # Whether its targets say which class an image is of. If they only say how another view should
    # be classified, a layer report does not compare them with true labels.
    pseudo_labels: bool = True
    # Heads of its own beside the classifier, on the pooled features of all views:
    # {name: (D, K, device axis for BatchNorm) -> module whose call takes (features [n, D], train)}
    heads: Mapping[str, Callable[[int, int, str | None], nn.Module]] = {}
    # (generator, B, μ) -> random draws of its own, a tree of arrays [B, ...]; None = it has none
    draws: Callable[[np.random.Generator, int, int], Any] | None = None
    # Makes the unlabeled views of kind MADE, before the pass and without gradient:
    # (apply, images, draws, state) -> {made view: images [n, H, W, 3] float32}. It gets the other
    # views' normalized images and its own draws, both of this device's rows alone, and its state.
    # `apply` is the network in training, images [n, H, W, 3] -> logits [n, K] of the classifier. It
    # can be differentiated. BatchNorm uses the statistics of what it is given, over all devices,
    # and keeps nothing of them.
    prepare: Callable[[Callable, ByView, Any, Any], dict[str, jax.Array]] | None = None


def make_assignment(
    inputs: Inputs,
    targets: Float[jax.Array, "μB K"],
    weights: Float[jax.Array, " μB"] | Bool[jax.Array, " μB"],
    **others,
) -> Assignment:
    """An Assignment in which what most policies do not use stands at its neutral value.

    Args:
      inputs: of the policy; its shapes are read.
      targets: of Assignment.
      weights: of Assignment, or whether a row counts.
      **others: further fields of Assignment.
    """
    neutral = {
        "labeled_weights": jnp.ones(inputs.labels.shape, jnp.float32),
        "scale": jnp.float32(1.0),
        "state": (),
        "diagnostics": {},
    }
    return Assignment(targets=targets, weights=weights.astype(jnp.float32), **(neutral | others))
