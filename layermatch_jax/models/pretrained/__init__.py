"""Weights of others that a backbone starts from: a file or an installed package -> `Weights`.

files.py and torch_file.py read a file into arrays, by the names that it has. tables.py says what a
table of names is and applies it; efficientnet_lite.py, resnet.py and vit.py are the tables of the
families. fitting.py checks that all weights fit a network, and says what they look like.
packages.py lists what is there by name.
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
    """Reads the weights of others for a backbone.

    Args:
      source: a key of packages.PACKAGES, or the path of a file (see `files.read`).
      model: `config.model.name`.

    Raises:
      InputError: there are none by this name, no file, or a file that is not of this network; says
        what it looks like.
    """
    packaged = _packaged(source, model)
    if model not in FAMILIES:
        raise InputError(
            f"--config.model.pretrained={source}: for model.name={model} no weights of others are "
            f"read, but for {', '.join(FAMILIES)}. The folder of a run of this package fits any"
        )
    path, called = packaged.find() if packaged else (source, os.path.abspath(source))
    file = files.read(path)
    found = translate(file.arrays, FAMILIES[model])
    if found.unknown:
        raise InputError(
            f"{path} does not fit {model}: nothing is known of {files.some(found.unknown)}. "
            f"It looks like {looks_like(file.arrays, FAMILIES)}"
        )
    family, notes = FAMILIES[model], list(file.notes)
    normalization = file.normalization or family.normalization(found.arrays)
    if packaged:
        normalization = packaged.normalization
    elif not file.normalization:
        notes.append(
            f"normalization as is usual for {model} (mean {_listed(normalization.mean)}; deviation "
            f"{_listed(normalization.std)}); the config.json that such files come with, put beside "
            "it, would be read instead"
        )
    if found.dropped:
        counts = collections.Counter(name.split(".")[-1] for name in found.dropped)
        listed = [f"{count} x {name}" for name, count in counts.items()]
        notes.append(f"not used here: {files.some(listed)}")
    if found.classifier:
        notes.append("the file's own classifier is not used: it knows other classes")
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
                f"--config.model.pretrained={source} is no file, no run's folder, and no name of "
                f"weights ({', '.join(packages.PACKAGES)})"
            )
        return None
    by_model = packages.PACKAGES[source]
    if model not in by_model:
        raise InputError(
            f"--config.model.pretrained={source}: there are such weights for "
            f"{', '.join(by_model)}, not for {model}. Give a file of {model}'s"
        )
    return by_model[model]


def _listed(numbers) -> str:
    return ", ".join(f"{x:g}" for x in numbers)
