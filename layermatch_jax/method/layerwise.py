"""The paper's idea: which gradient of the unsupervised loss each layer gets.

With z = h_θ(image) the features and g_φ(z) = z·W + b the linear classifier, one step follows

    ∇θ = J_θᵀ [ ∂L_s/∂z + λ_u · ∂L_u(H = centers)/∂z ]     features: pulled to clustering centers
    ∇φ =        ∂L_s/∂φ + γ · λ_u · ∂L_u(H = g_φ)/∂φ       classifier: gated

*Grad-ReLU* is γ = 0: pseudo-labels do not train the linear classifier, because their noise harms
it. *Avg-Clustering* computes the gradient of the features through an averaged head H. FixMatch is
γ = 1 and H = g_φ. ("Do Pseudo-labels Benefit All Layers?", arXiv 2406.14207. The
formulas are our reading of its abstract; docs/method.md says what is known and what is not.)
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Float

from layermatch_jax.errors import InputError


def mask_multipliers(gradient_mask: Sequence[tuple[str, float]], params) -> dict:
    """Returns the multiplier of the unsupervised gradient for each parameter.

    Args:
      gradient_mask: ordered (regular expression, multiplier) pairs. The expression must match
        the full path of a parameter ('backbone/stem/kernel'); the first match counts, no match
        means 1. (('classifier/.*', 0.0),) is Grad-ReLU, () is FixMatch.
      params: the tree of parameters; only its structure is read.

    Returns:
      A tree of the same structure, of Python floats.

    Raises:
      InputError: an expression matches no parameter.
    """
    of_leaves = paths(params)
    for pattern, _ in gradient_mask:
        if not any(re.fullmatch(pattern, path) for path in of_leaves):
            raise InputError(
                f"gradient mask {pattern!r} matches no parameter. It must match a whole path; the "
                "paths are:\n  " + "\n  ".join(of_leaves)
            )

    def multiplier(path: str) -> float:
        return next((float(m) for pattern, m in gradient_mask if re.fullmatch(pattern, path)), 1.0)

    return jax.tree.unflatten(jax.tree.structure(params), [multiplier(path) for path in of_leaves])


def paths(params) -> list[str]:
    """Lists the paths of the parameters, such as 'backbone/stem/kernel', in the tree's order."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]


class HeadGradients(NamedTuple):
    """The gradients of this device's share of a loss, down to the features."""

    heads: dict[str, Any]  # {'classifier': tree}; with policy heads also {'heads': tree}
    features: Float[jax.Array, "B V D"]


def masked_gradients(
    pull_back: Callable,
    supervised: HeadGradients,
    unsupervised: HeadGradients,
    multipliers,
) -> dict:
    """Adds the gradients of the two losses; each layer gets its own share of that of L_u.

    If all backbone parameters have the same multiplier, the two cotangents are added and pulled
    back once, at the cost of plain FixMatch. Other masks need a second pull-back.

    Args:
      pull_back: z-cotangent [B, V, D] -> (gradient of the backbone's parameters,).
      supervised: ∂L_s/∂φ and ∂L_s/∂z.
      unsupervised: λ_u·∂L_u(H = g_φ)/∂φ and λ_u·∂L_u(H = centers)/∂z.
      multipliers: from `mask_multipliers`, for all parameters.

    Returns:
      This device's share of the gradient of the global objective, for all parameters.
    """

    def add(gradient, extra, multiplier):
        # A multiplier of 0 removes the gradient even if it is infinite (0 · inf would be NaN).
        return gradient if multiplier == 0.0 else gradient + multiplier * extra

    of_heads = {name: multipliers[name] for name in supervised.heads}
    heads = jax.tree.map(add, supervised.heads, unsupervised.heads, of_heads)
    distinct = set(jax.tree.leaves(multipliers["backbone"]))
    if len(distinct) == 1:
        (backbone,) = pull_back(add(supervised.features, unsupervised.features, distinct.pop()))
    else:
        backbone = jax.tree.map(
            add,
            *pull_back(supervised.features),
            *pull_back(unsupervised.features),
            multipliers["backbone"],
        )
    return {"backbone": backbone, **heads}
