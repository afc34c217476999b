"""Bundles: a model in one safetensors file, with everything but the arrays in its metadata.

The metadata have one entry, `layermatch`: JSON of the model's card (`model.card`), `format` (the
version of the format) and `sha256` (`model.fingerprint`). Other programs can read the arrays, too.
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
FORMAT = 1  # raise it when earlier programs would misread the new files
_ENTRY = "layermatch"
_HEAD = 64  # bytes at the start; they contain `__metadata__` if the file has metadata


def write(model: Model, path: str) -> None:
    """Writes a model as a bundle; an interruption leaves no partial file.

    The same model gives the same bytes. If the file already holds this model, it stays.

    Raises:
      InputError: the path does not end with .layermatch, cannot be written, or is another file.
    """
    place = epath.Path(path).expanduser()
    said = f"--out={path}"
    if place.suffix != ENDING:
        raise InputError(f"{said}: the name must end with {ENDING}, such as flowers{ENDING}")
    files.check_place(str(place), said)
    header = {"format": FORMAT, "sha256": model_lib.fingerprint(model), **model_lib.card(model)}
    content = safetensors.numpy.save(
        model_lib.flat(model.variables), {_ENTRY: json.dumps(header, sort_keys=True)}
    )
    if place.exists():
        if place.read_bytes() == content:
            return
        raise InputError(f"{said} already exists and is not this model. Choose another name")
    files.write_bytes(place, content)


def read(path: str) -> Model:
    """Reads the model from a bundle.

    Raises:
      InputError: the file is not a bundle, is incomplete or damaged, or has a later format.
    """
    path = os.path.expanduser(path)
    again = "Copy it again, or write a new one: --mode=export --format=bundle"
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        with open(path, "rb") as file:
            begun = b"__metadata__" in file.read(_HEAD)
        if begun:
            raise InputError(f"The bundle {path} is incomplete or damaged. {again}") from error
        metadata = {}
    if _ENTRY not in metadata:
        raise InputError(
            f"{path} is not a bundle. Use the folder of a run, or a file from "
            "--mode=export --format=bundle"
        )
    try:
        header = json.loads(metadata[_ENTRY])
        version, expected = header.pop("format"), header.pop("sha256")
        if version > FORMAT:
            raise InputError(
                f"The bundle {path} has format {version}, but this version of layermatch_jax only "
                f"reads formats up to {FORMAT}. Install a later version"
            )
        model = Model(
            **{name: tuple(x) if isinstance(x, list) else x for name, x in header.items()},
            variables=traverse_util.unflatten_dict(arrays, sep="/"),
        )
        whole = model_lib.fingerprint(model) == expected
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise InputError(f"The bundle {path} is damaged. {again}")
    return model
