"""Which parameters a run does not train at all.

Freezing is not masking: a masked layer (layerwise.py) sees no gradient of pseudo-labels, but labels
train it; a frozen layer keeps the weights that it started with.
"""

import re

import jax

from layermatch_jax.errors import InputError
from layermatch_jax.method import layerwise


def frozen_parameters(expression: str, params) -> dict:
    """Returns which parameters are frozen.

    Args:
      expression: config.model.freeze, a regular expression that must match the whole path of a
        parameter ('backbone/stem/conv/kernel'); '' = none is frozen.
      params: the tree of parameters; only its structure is read.

    Returns:
      A tree of the same structure, of bools.

    Raises:
      InputError: the expression is none, or it matches no parameter or all of them.
    """
    paths = layerwise.paths(params)
    try:
        frozen = [bool(expression and re.fullmatch(expression, path)) for path in paths]
    except re.error as error:
        raise InputError(
            f"--config.model.freeze={expression} is not a regular expression: {error}"
        ) from None
    if expression and not any(frozen):
        raise InputError(
            f"--config.model.freeze={expression} matches no parameter. It must match a whole path; "
            "the paths are:\n  " + "\n  ".join(paths)
        )
    if all(frozen):
        raise InputError(
            f"--config.model.freeze={expression} freezes all parameters, so nothing is left to "
            "train. Use :method=probe for a classifier on a frozen backbone"
        )
    return jax.tree.unflatten(jax.tree.structure(params), frozen)


def last_frozen_layer(expression: str, params) -> str:
    """Returns the last of the backbone's first layers that are wholly frozen.

    Args:
      expression: config.model.freeze.
      params: the tree of parameters.

    Returns:
      The name of a layer, such as 'stage2_block1'.

    Raises:
      InputError: the stem is not frozen.
    """
    frozen = frozen_parameters(expression, params)["backbone"]
    last = None
    for name in in_order(frozen):
        if not all(jax.tree.leaves(frozen[name])):
            break
        last = name
    if last is None:
        raise InputError(
            "--config.input.cache_views keeps the output of frozen layers, but "
            f"--config.model.freeze={expression!r} does not freeze the first layer, the stem. Set "
            "for example --config.model.freeze='backbone/(stem|stage[1-2]).*'"
        )
    return last


def in_order(names) -> list[str]:
    """Sorts the layers of a backbone: stem, the blocks by stage and number, final_norm."""

    def order(name: str) -> tuple[bool, tuple[int, ...]]:
        return name == "final_norm", tuple(int(number) for number in re.findall(r"\d+", name))

    return sorted(names, key=order)


def keep(frozen, old, new):
    """Selects, for each parameter, `old` if it is frozen and `new` if not."""
    return jax.tree.map(lambda stays, a, b: a if stays else b, frozen, old, new)
