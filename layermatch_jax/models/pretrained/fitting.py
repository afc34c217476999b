"""Whether weights are those of a network, all of them and nothing else."""

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
    """The weights in the form of a network's variables.

    Position embeddings of another image size are resampled; every other array must be there in
    its shape, and every array of the weights is used.

    Args:
      weights: of `read`.
      params: the network's tree of parameters, or of their shapes.
      batch_stats: and of its running statistics.

    Returns:
      (params, batch_stats), of float32 arrays.

    Raises:
      InputError: names what is missing, of another shape or left over.
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
            f"{weights.looks_like} (fields of --config.model)"
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
    """The network, in words, that has weights by these names."""
    for family in dict.fromkeys(map(id, families.values())):
        family = next(f for f in families.values() if id(f) == family)
        try:
            found = translate(arrays, family)
        except InputError:
            continue
        if len(found.unknown) < len(arrays) / 2 and (said := family.describe(found.arrays)):
            return said
    return f"no network that is known here (it has {some(list(arrays), 3)})"
