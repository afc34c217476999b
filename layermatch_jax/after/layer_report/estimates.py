"""Estimates the quantities of a layer report, with intervals, from gradients of many batches."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import scipy.special

KINDS = ("supervised", "true", "right", "wrong")
QUANTITIES = {
    "cosine_true": "cos(g_u, g_true)",
    "cosine_supervised": "cos(g_u, g_s)",
    "norm_ratio": "λ_u ‖g_u‖ / ‖g_s‖",
    "noise_share": "‖g_wrong‖² / (‖g_right‖² + ‖g_wrong‖²)",
}
# The quantities that need to know whether pseudo-labels are right.
OF_PSEUDO_LABELS = ("cosine_true", "noise_share")
_LIMITS = {  # of the quantities; estimates beyond them are clipped
    "cosine_true": (-1, 1),
    "cosine_supervised": (-1, 1),
    "norm_ratio": (0, np.inf),
    "noise_share": (0, 1),
}
# Bytes of gradients that the host keeps at a time. Larger amounts take several passes over the
# batches, each for some of the parameters: with 128 batches, WRN-28-2 (3 GB) takes 2 passes and
# WRN-28-8 (48 GB) 24; with 32 batches, WRN-28-8 takes 6.
_BYTES = 2**31


def layer(path: str) -> str:
    """Returns a parameter's layer: 'backbone/stage1_block0/conv1/kernel' -> 'stage1_block0'."""
    whose, name = path.split("/")[:2]
    return name if whose == "backbone" else whose


def forward_order(layers: Iterable[str]) -> list[str]:
    """Sorts layers: stem, blocks by stage, other layers, final norm, classifier; no duplicates."""

    def place(name: str) -> tuple:
        block = re.fullmatch(r"stage(\d+)_block(\d+)", name)
        known = {"stem": 0, "final_norm": 3, "classifier": 4}
        return (1, *map(int, block.groups())) if block else (known.get(name, 2), 0, 0)

    return sorted(set(layers), key=place)


def products(
    batches: Callable[[], Iterator[tuple[dict, dict]]], params: Any, count: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Computes the scalar products between the gradients of all kinds and batches, by layer.

    Args:
      batches: () -> the outputs of `gradients` for each batch. It is called several times if the
        gradients exceed 2 GiB; then each pass keeps at most 2 GiB (or one parameter's gradients).
      params: tree of parameters; only shapes and dtypes are used.
      count: number of batches, n.

    Returns:
      ({layer, in forward order: float64 [4, n, 4, n], by kind of KINDS and batch}; the means over
      batches of the sums in the outputs of `gradients`).
    """
    params = {
        name: params[name] for name in ("backbone", "classifier")
    }  # policy heads have no part
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    order = forward_order(layer(path) for path in leaves)
    size = len(KINDS) * count
    grams, sums = {name: np.zeros((size, size)) for name in order}, {}
    for part in _parts({p: size * leaf.size * leaf.dtype.itemsize for p, leaf in leaves.items()}):
        kept = {p: np.empty((len(KINDS), count, leaves[p].size), leaves[p].dtype) for p in part}
        sums = []
        for i, (trees, of_batch) in enumerate(batches()):
            sums.append(jax.device_get(of_batch))
            for k, kind in enumerate(KINDS):
                for path, leaf in jax.tree_util.tree_leaves_with_path(trees[kind]):
                    if path_name(path) in kept:
                        kept[path_name(path)][k, i] = np.ravel(leaf)
        for path in part:
            rows = kept.pop(path).reshape(size, -1)
            grams[layer(path)] += rows @ rows.T
    shape = (len(KINDS), count, len(KINDS), count)
    means = {name: float(np.mean([one[name] for one in sums])) for name in sums[0]}
    return {name: gram.reshape(shape) for name, gram in grams.items()}, means


def path_name(path) -> str:
    """Returns a parameter's path as 'backbone/stem/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _parts(sizes: dict[str, int]) -> list[list[str]]:
    """Divides names, in order, into groups of at most _BYTES; a larger one is its own group."""
    parts, room = [], 0
    for name, size in sizes.items():
        if not parts or size > room:
            parts, room = [*parts, []], _BYTES
        parts[-1].append(name)
        room -= size
    return parts


def compare(gram: np.ndarray, strength: float = 1.0) -> dict[str, list[float | None]]:
    """Estimates the quantities of a layer for the mean gradients over infinitely many batches.

    The mean over pairs of different batches (a U-statistic) estimates each scalar product of two
    mean gradients without bias. The 95 % interval is value ± t · standard error, clipped at the
    quantity's limits. The standard error is the jackknife's (Arvesen 1969, "Jackknifing
    U-statistics"; Efron and Stein 1981: on average it is not too small), and t is Student's with
    n − 1 degrees of freedom.

    Args:
      gram: float [4, n, 4, n], from `products`; n is 3 or more.
      strength: λ_u.

    Returns:
      {name of QUANTITIES: [value, low, high]}. All three are None if the quantity is not known.
      This happens if it divides by a gradient of length 0 (for example, no pseudo-label was used),
      or if the estimate of a squared length is negative, for all batches or without one of them
      (the noise of too few batches hides the gradient).
    """
    count = gram.shape[1]
    apart = np.array(gram)
    apart[:, np.arange(count), :, np.arange(count)] = 0
    total = np.sum(apart, axis=(1, 3))
    with_batch = np.sum(apart, axis=3).swapaxes(1, 2) + np.sum(apart, axis=1)
    # Sums over all pairs, and over the pairs without each of the batches: [4, 4, 1 + n]. Means are
    # not needed, because the number of pairs cancels in every ratio.
    dots = np.concatenate([total[..., None], total[..., None] - with_batch], axis=2)

    s, t, right, wrong = range(len(KINDS))
    uu = dots[right, right] + dots[wrong, wrong] + 2 * dots[right, wrong]
    rows = dots[right, right] + dots[wrong, wrong]
    with np.errstate(divide="ignore", invalid="ignore"):
        length_u, length_t, length_s = np.sqrt(uu), np.sqrt(dots[t, t]), np.sqrt(dots[s, s])
        values = {
            "cosine_true": (dots[right, t] + dots[wrong, t]) / (length_u * length_t),
            "cosine_supervised": (dots[right, s] + dots[wrong, s]) / (length_u * length_s),
            "norm_ratio": strength * length_u / length_s,
            "noise_share": np.where(rows > 0, dots[wrong, wrong] / rows, np.nan),
        }
    return {name: _with_interval(value, *_LIMITS[name]) for name, value in values.items()}


def _with_interval(estimates: np.ndarray, least: float, most: float) -> list[float | None]:
    """Makes [value, low, high] of estimates [1 + n]: of all batches, and without each of them."""
    if not np.isfinite(estimates).all():
        return [None, None, None]
    value, without = estimates[0], estimates[1:]
    degrees = len(without) - 1
    error = np.sqrt(degrees * np.var(without))
    half = scipy.special.stdtrit(degrees, 0.975) * error
    return [float(np.clip(x, least, most)) for x in (value, value - half, value + half)]
