"""Checks that weights fit a network: none is missing, none is left over, all shapes match."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from layermatch_jax.errors import InputError
from layermatch_jax.models.pretrained.files import some
from layermatch_jax.models.pretrained.tables import Family, translate
from layermatch_jax.models.pretrained.weights import Weights
from layermatch_jax.models.vit import resample_positions

_POSITIONS = "stem/positions"


def fit(weights: Weights, params: Any, batch_stats: Any) -> tuple[Any, Any]:
    """Converts weights to the variables of a network.

    Position embeddings of another image size are resampled. Every other array must have the shape
    of the variable, and every array of the weights is used.

    Args:
      weights: from `read`.
      params: the tree of the network's parameters, or of their shapes.
      batch_stats: the tree of its running statistics, or of their shapes.

    Returns:
      (params, batch_stats), trees of float32 arrays.

    Raises:
      InputError: weights are missing, are left over or have another shape; the message lists them.
    """
    wanted = {
        path: tuple(leaf.shape)
        for tree in (params, batch_stats)
        for path, leaf in _flat(tree).items()
    }
    found = weights.params | weights.batch_stats
    if _POSITIONS in found and _POSITIONS in wanted:
        found |= {_POSITIONS: _positions(found[_POSITIONS], wanted[_POSITIONS])}
    wrong = [
        f"{path} is {list(found[path].shape)}, not {list(wanted[path])}"
        for path in wanted
        if path in found and found[path].shape != wanted[path]
    ]
    problems = {
        "missing": [path for path in wanted if path not in found],
        "left over": [path for path in found if path not in wanted],
        "of another shape": wrong,
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {some(names)}" for kind, names in problems.items() if names)
        raise InputError(
            f"the weights of {weights.source} do not fit the network. {listed}. They look like "
            f"{weights.looks_like}. Set the fields of --config.model to that network, or give "
            "other weights"
        )
    fitted, statistics = (
        traverse_util.unflatten_dict({path: found[path] for path in of}, sep="/")
        for of in (weights.params, weights.batch_stats)
    )
    return fitted, statistics


def _flat(tree: Any) -> dict[str, Any]:
    return dict(traverse_util.flatten_dict(tree, sep="/"))


def _positions(positions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    side, wanted = (round(count**0.5) for count in (positions.shape[1], shape[1]))
    if side**2 != positions.shape[1] or wanted**2 != shape[1]:
        return positions
    return np.asarray(resample_positions(positions, (wanted, wanted)))


def looks_like(arrays: dict[str, np.ndarray], families: Mapping[str, Family]) -> str:
    """Describes, in words, the network to which weights with these names belong."""
    for family in dict.fromkeys(map(id, families.values())):
        family = next(f for f in families.values() if id(f) == family)
        try:
            found = translate(arrays, family)
        except InputError:
            continue
        if len(found.unknown) < len(arrays) / 2 and (said := family.describe(found.arrays)):
            return said
    return f"no known network (it has {some(list(arrays), 3)})"
