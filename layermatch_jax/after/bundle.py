"""A model as one file to carry away: its arrays as safetensors, all else as JSON in the metadata.

The metadata have one entry, `layermatch`: the card of the model (`model.card`) with `format` (the
version of this form) and `sha256` (`model.fingerprint`). Other programs can read the arrays, too.
"""

import json
import os

import safetensors
import safetensors.numpy
from etils import epath
from flax import traverse_util

from layermatch_jax.after import model as model_lib
from layermatch_jax.after.model import Model
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import files

ENDING = ".layermatch"
FORMAT = 1  # to be raised when earlier programs would misread what is written
_ENTRY = "layermatch"
_HEAD = 64  # bytes, of which a safetensors file that has metadata says so


def write(model: Model, path: str) -> None:
    """Writes the bundle of a model, whole or not at all.

    The same model makes the same bytes. A bundle of it that is there already stays.

    Raises:
      InputError: the path cannot be a bundle's, or holds something else.
    """
    place = epath.Path(path).expanduser()
    said = f"--out={path}"
    if place.suffix != ENDING:
        raise InputError(f"{said}: the name of a bundle ends with {ENDING}, as in flowers{ENDING}")
    files.check_place(str(place), said)
    header = {"format": FORMAT, "sha256": model_lib.fingerprint(model), **model_lib.card(model)}
    content = safetensors.numpy.save(
        model_lib.flat(model.variables), {_ENTRY: json.dumps(header, sort_keys=True)}
    )
    if place.exists():
        if place.read_bytes() == content:
            return
        raise InputError(f"{said} is there already, and is not this model. Take another name")
    files.write_bytes(place, content)


def read(path: str) -> Model:
    """The model in a bundle.

    Raises:
      InputError: the file is no bundle, is cut off or damaged, or is of a later version.
    """
    path = os.path.expanduser(path)
    again = "Copy it again, or write it anew: --mode=export --format=bundle"
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        with open(path, "rb") as file:
            begun = b"__metadata__" in file.read(_HEAD)
        if begun:
            raise InputError(f"{path} is a bundle that is cut off or damaged. {again}") from error
        metadata = {}
    if _ENTRY not in metadata:
        raise InputError(
            f"{path} is no bundle. Give the folder of a run, or a file that "
            "--mode=export --format=bundle wrote"
        )
    try:
        header = json.loads(metadata[_ENTRY])
        version, expected = header.pop("format"), header.pop("sha256")
        if version > FORMAT:
            raise InputError(
                f"{path} is a bundle of format {version}; this version of layermatch_jax reads "
                f"those up to format {FORMAT}. Take a later version"
            )
        model = Model(
            **{name: tuple(x) if isinstance(x, list) else x for name, x in header.items()},
            variables=traverse_util.unflatten_dict(arrays, sep="/"),
        )
        whole = model_lib.fingerprint(model) == expected
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise InputError(f"{path} is a bundle that is damaged. {again}")
    return model
