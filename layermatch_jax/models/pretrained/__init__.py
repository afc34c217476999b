"""Reads pretrained weights for a backbone from a file or an installed package.

files.py and torch_file.py read a file into arrays by name. tables.py defines tables that translate
these names and applies them; efficientnet_lite.py, resnet.py and vit.py contain the tables.
fitting.py checks that all weights fit a network, and names the network that they look like.
packages.py lists the weights that can be given by name.
"""

import collections
import os

from layermatch_jax.errors import InputError
from layermatch_jax.models.pretrained import efficientnet_lite, files, packages, resnet, vit
from layermatch_jax.models.pretrained.fitting import fit, looks_like
from layermatch_jax.models.pretrained.tables import Family, translate
from layermatch_jax.models.pretrained.weights import Normalization, Weights

__all__ = ["FAMILIES", "Normalization", "Weights", "fit", "read"]

_VIT = {name: vit.FAMILY for name in ("vit_s14", "vit_s16", "vit_b14", "vit_b16")}
FAMILIES: dict[str, Family] = {
    "efficientnet_lite0": efficientnet_lite.FAMILY,
    "resnet50": resnet.FAMILY,
    **_VIT,
}


def read(source: str, model: str) -> Weights:
    """Reads pretrained weights for a backbone.

    Args:
      source: a key of packages.PACKAGES, or the path of a file (see `files.read`).
      model: `config.model.name`.

    Raises:
      InputError: the name is unknown, the file does not exist or cannot be read, or its weights
        belong to another network; the message then names the network that they look like.
    """
    packaged = _packaged(source, model)
    if model not in FAMILIES:
        raise InputError(
            f"--config.model.pretrained={source}: model.name={model} can only start from the "
            f"folder of a run of this package. Files and names are read for {', '.join(FAMILIES)}"
        )
    path, called = packaged.find() if packaged else (source, os.path.abspath(source))
    file = files.read(path)
    found = translate(file.arrays, FAMILIES[model])
    if found.unknown:
        raise InputError(
            f"{path} does not fit {model}: it has unknown names, {files.some(found.unknown)}. "
            f"It looks like {looks_like(file.arrays, FAMILIES)}. Set --config.model.name to the "
            f"network of the file, or give a file for {model}"
        )
    family, notes = FAMILIES[model], list(file.notes)
    normalization = file.normalization or family.normalization(found.arrays)
    if packaged:
        normalization = packaged.normalization
    elif not file.normalization:
        notes.append(
            f"uses the usual normalization for {model} (mean {_listed(normalization.mean)}; "
            f"deviation {_listed(normalization.std)}), because no config.json beside the file "
            "gives another one"
        )
    if found.dropped:
        counts = collections.Counter(name.split(".")[-1] for name in found.dropped)
        listed = [f"{count} x {name}" for name, count in counts.items()]
        notes.append(f"not used here: {files.some(listed)}")
    if found.classifier:
        notes.append(
            "the file's own classifier is not used, because it was trained for other classes"
        )
    is_statistic = lambda path: path.endswith(("/mean", "/var"))  # noqa: E731
    return Weights(
        params={path: x for path, x in found.arrays.items() if not is_statistic(path)},
        batch_stats={path: x for path, x in found.arrays.items() if is_statistic(path)},
        classifier=found.classifier or None,
        class_names=None,
        bn_epsilon=family.bn_epsilon,
        normalization=normalization,
        looks_like=family.describe(found.arrays) or "another network",
        source=called,
        sha256=file.sha256,
        license=packaged.license if packaged else file.license or "the file does not say",
        notes=tuple(notes),
    )


def _packaged(source: str, model: str) -> packages.Packaged | None:
    if source not in packages.PACKAGES:
        if not os.path.exists(os.path.expanduser(source)):
            raise InputError(
                f"--config.model.pretrained={source} is neither a file, nor a folder of a run, nor "
                f"the name of weights. Known names: {', '.join(packages.PACKAGES)}"
            )
        return None
    by_model = packages.PACKAGES[source]
    if model not in by_model:
        raise InputError(
            f"--config.model.pretrained={source}: these weights exist for {', '.join(by_model)}, "
            f"not for {model}. Set --config.model.name, or give a file with weights for {model}"
        )
    return by_model[model]


def _listed(numbers) -> str:
    return ", ".join(f"{x:g}" for x in numbers)
