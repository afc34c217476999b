"""From the names of others to the paths of this package: what a table is, and how it is applied."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from layermatch_jax.errors import InputError
from layermatch_jax.models.pretrained.weights import Normalization

Path = str | Callable[[re.Match], str]  # as in re.sub; or of a match


class Row(NamedTuple):
    """What becomes of the arrays whose whole name matches an expression."""

    pattern: str
    # Several paths: `change` returns an array for each of them.
    # "block7/…" stands for the eighth of Family.blocks.
    path: Path | tuple[str, ...]
    change: Callable[[np.ndarray], np.ndarray] = lambda x: x


class Family(NamedTuple):
    """Networks whose weights one table reads."""

    rows: tuple[Row, ...]
    blocks: tuple[str, ...]  # their modules here, from the first to the last
    dropped: str  # expression for what a network here does not have, and need not
    classifier: str  # expression for the file's own classifier
    bn_epsilon: float | None
    normalization: Callable[[dict[str, np.ndarray]], Normalization]  # of the paths
    describe: Callable[[dict[str, np.ndarray]], str | None]  # the network that has such paths
    finish: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda arrays: arrays


class Translated(NamedTuple):
    """A file's arrays by the paths of this package."""

    arrays: dict[str, np.ndarray]
    classifier: dict[str, np.ndarray]  # by the names kernel and bias
    dropped: list[str]  # names
    unknown: list[str]  # names that no row matches


def conv(pattern: str, path: Path) -> tuple[Row, ...]:
    """A convolution of PyTorch's, [out, in, rows, columns]; depthwise ones have one `in`."""

    def change(x):
        return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x

    return Row(pattern + r"\.weight", _join(path, "kernel"), change), _same(pattern, path, "bias")


def dense(pattern: str, path: Path) -> tuple[Row, ...]:
    """A linear layer of PyTorch's, [out, in]."""
    kernel = Row(pattern + r"\.weight", _join(path, "kernel"), np.transpose)
    return kernel, _same(pattern, path, "bias")


def norm(pattern: str, path: Path) -> tuple[Row, ...]:
    """A BatchNorm or LayerNorm of PyTorch's."""
    leaves = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return tuple(_same(pattern, path, leaf, here) for leaf, here in leaves.items())


def _same(pattern: str, path: Path, leaf: str, here: str | None = None) -> Row:
    return Row(rf"{pattern}\.{leaf}", _join(path, here or leaf))


def _join(path: Path, leaf: str) -> Path:
    return (lambda match: f"{path(match)}/{leaf}") if callable(path) else f"{path}/{leaf}"


def translate(arrays: dict[str, np.ndarray], family: Family) -> Translated:
    """Applies a family's table; the first row that matches counts.

    Raises:
      InputError: two arrays would go to one path, or one has a form that its row cannot change.
    """
    found = Translated({}, {}, [], [])
    for name, array in arrays.items():
        if re.fullmatch(family.dropped, name):
            found.dropped.append(name)
            continue
        matches = ((row, re.fullmatch(row.pattern, name)) for row in family.rows)
        first = next(((row, match) for row, match in matches if match), None)
        if first is None:
            found.unknown.append(name)
            continue
        for path, x in _placed(*first, array, family.blocks):
            of = found.arrays
            if re.fullmatch(family.classifier, name):
                of, path = found.classifier, path.split("/")[-1]
            if path in of:
                raise InputError(f"the file holds {path} twice, once as {name}")
            of[path] = np.ascontiguousarray(x)
    return found._replace(arrays=family.finish(found.arrays))


def _placed(row: Row, match: re.Match, array: np.ndarray, blocks: tuple[str, ...]):
    paths = row.path if isinstance(row.path, tuple) else (row.path,)
    try:
        parts = row.change(array) if isinstance(row.path, tuple) else (row.change(array),)
    except (ValueError, IndexError):
        raise InputError(f"{match[0]} cannot have the shape {list(array.shape)}") from None
    for path, part in zip(paths, parts, strict=True):
        path = path(match) if callable(path) else match.expand(path)
        yield re.sub(r"^block(\d+)", lambda m: _block(int(m[1]), blocks), path), part


def _block(number: int, blocks: tuple[str, ...]) -> str:
    return blocks[number] if number < len(blocks) else f"block{number}"
