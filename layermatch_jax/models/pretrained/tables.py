"""Tables that translate the names of pretrained weights to the paths of this package."""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from layermatch_jax.errors import InputError
from layermatch_jax.models.pretrained.weights import Normalization

Path = str | Callable[[re.Match], str]  # a template as in re.sub, or a function of the match


class Row(NamedTuple):
    """A row of a table: the new path of arrays with a full name that matches `pattern`."""

    pattern: str
    # With several paths, `change` returns an array for each. "block7/…" is the block with index 7
    # of Family.blocks.
    path: Path | tuple[str, ...]
    change: Callable[[np.ndarray], np.ndarray] = lambda x: x


class Family(NamedTuple):
    """A family of networks with one table of names."""

    rows: tuple[Row, ...]
    blocks: tuple[str, ...]  # module names of the blocks in this package, in order
    dropped: str  # expression for names of arrays that the networks here do not need
    classifier: str  # expression for the names of the file's own classifier
    bn_epsilon: float | None
    normalization: Callable[[dict[str, np.ndarray]], Normalization]  # from the arrays by path
    describe: Callable[[dict[str, np.ndarray]], str | None]  # the network, in words
    finish: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda arrays: arrays


class Translated(NamedTuple):
    """The arrays of a file by the paths of this package."""

    arrays: dict[str, np.ndarray]
    classifier: dict[str, np.ndarray]  # {'kernel': …, 'bias': …}
    dropped: list[str]  # names that match Family.dropped
    unknown: list[str]  # names that no row matches


def conv(pattern: str, path: Path) -> tuple[Row, ...]:
    """Makes the rows of a PyTorch convolution, [out, in, rows, columns]; in = 1 if depthwise."""

    def change(x):
        return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x

    return Row(pattern + r"\.weight", _join(path, "kernel"), change), _same(pattern, path, "bias")


def dense(pattern: str, path: Path) -> tuple[Row, ...]:
    """Makes the rows of a PyTorch linear layer, [out, in]."""
    kernel = Row(pattern + r"\.weight", _join(path, "kernel"), np.transpose)
    return kernel, _same(pattern, path, "bias")


def norm(pattern: str, path: Path) -> tuple[Row, ...]:
    """Makes the rows of a PyTorch BatchNorm or LayerNorm."""
    leaves = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return tuple(_same(pattern, path, leaf, here) for leaf, here in leaves.items())


def _same(pattern: str, path: Path, leaf: str, here: str | None = None) -> Row:
    return Row(rf"{pattern}\.{leaf}", _join(path, here or leaf))


def _join(path: Path, leaf: str) -> Path:
    return (lambda match: f"{path(match)}/{leaf}") if callable(path) else f"{path}/{leaf}"


def translate(arrays: dict[str, np.ndarray], family: Family) -> Translated:
    """Translates names by the table of a family; the first row that matches counts.

    Raises:
      InputError: two arrays have the same path, or the row cannot change the shape of an array.
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
                raise InputError(
                    f"the file holds two arrays for {path}; one of them is {name}. Remove one"
                )
            of[path] = np.ascontiguousarray(x)
    return found._replace(arrays=family.finish(found.arrays))


def _placed(row: Row, match: re.Match, array: np.ndarray, blocks: tuple[str, ...]):
    paths = row.path if isinstance(row.path, tuple) else (row.path,)
    try:
        parts = row.change(array) if isinstance(row.path, tuple) else (row.change(array),)
    except (ValueError, IndexError):
        raise InputError(
            f"{match[0]} has the shape {list(array.shape)}, which this layer cannot have. Is the "
            "file of another network?"
        ) from None
    for path, part in zip(paths, parts, strict=True):
        path = path(match) if callable(path) else match.expand(path)
        yield re.sub(r"^block(\d+)", lambda m: _block(int(m[1]), blocks), path), part


def _block(number: int, blocks: tuple[str, ...]) -> str:
    return blocks[number] if number < len(blocks) else f"block{number}"
