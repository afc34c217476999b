"""Reads files of weights into arrays by name."""

import hashlib
import io
import json
import os
import pathlib
import zipfile
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from layermatch_jax.errors import InputError
from layermatch_jax.models.pretrained import torch_file
from layermatch_jax.models.pretrained.weights import Normalization

INSTALL = 'pip install "layermatch_jax[pretrained]"'
# Names of the entry for the weights in files that training scripts write.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
_PREFIXES = ("module.", "_orig_mod.")  # of models that were wrapped when they were saved
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class File(NamedTuple):
    """The content of a file, with the normalization and license from files beside it."""

    arrays: dict[str, np.ndarray]  # float32
    sha256: str
    normalization: Normalization | None
    license: str | None
    notes: tuple[str, ...]


def read(path: str) -> File:
    """Reads a file of weights.

    Args:
      path: path of a .safetensors, .npz, .pth, .pt or .bin file. The normalization is read from a
        config.json (timm) or preprocessor_config.json (Hugging Face) in the same folder.

    Raises:
      InputError: the file does not exist, is damaged, or is not a file of weights.
    """
    path = os.path.expanduser(path)
    ending = os.path.splitext(path)[1].lower()
    if ending not in _READERS:
        raise InputError(
            f"{path}: names of files of weights end with {', '.join(_READERS)}. Rename the file if "
            "it holds weights"
        )
    try:
        data = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    _refuse_pages(data, path)
    content = _READERS[ending](data, path)
    arrays, notes = _unwrapped(content, path)
    arrays = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
    if broken := [name for name, x in arrays.items() if not np.isfinite(x).all()]:
        raise InputError(f"{path} holds NaN or infinite numbers in: {some(broken)}")
    return File(arrays, hashlib.sha256(data).hexdigest(), *_beside(path), tuple(notes))


def _refuse_pages(data: bytes, path: str) -> None:
    start = data[:200].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(f"{path} is a web page, not a file of weights. Download the file itself")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a pointer of Git LFS, not the file. Fetch it: git lfs pull")
    if not data:
        raise InputError(f"{path} is empty")


def _read_safetensors(data: bytes, path: str) -> dict[str, np.ndarray]:
    try:
        from safetensors import SafetensorError, deserialize
    except ImportError:
        raise InputError(f"{path} needs the package safetensors: {INSTALL}") from None
    try:
        entries = deserialize(data)
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a complete safetensors file ({error}). If the download was cut off, "
            "repeat it"
        ) from None
    dtypes = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": jnp.bfloat16, "I64": "<i8"}
    arrays = {}
    for name, entry in entries:
        if entry["dtype"] not in dtypes:
            raise InputError(
                f"{path}: {name} has the type {entry['dtype']}. Allowed are {', '.join(dtypes)}"
            )
        values = np.frombuffer(entry["data"], jnp.dtype(dtypes[entry["dtype"]]))
        arrays[name] = values.reshape(entry["shape"])
    return arrays


def _read_npz(data: bytes, path: str) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is not a complete .npz file of arrays ({error}). If the download was cut off, "
            "repeat it"
        ) from None


_READERS = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pth": torch_file.read,
    ".pt": torch_file.read,
    ".bin": torch_file.read,
}


def _unwrapped(content: Any, path: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the arrays by name, and notes on entries that were not read."""
    notes = []
    if isinstance(content, dict) and not _arrays(content):
        wrapper = next((w for w in _WRAPPERS if _arrays(content.get(w))), None)
        if wrapper:
            others = some(sorted(map(str, content.keys() - {wrapper})))
            notes = [f"only the entry {wrapper!r} of {path} was read; not read: {others}"]
            content = content[wrapper]
    arrays = _arrays(content)
    if not arrays:
        raise InputError(f"{path} holds no arrays by name. Save the weights as a state_dict")
    if left := sorted(str(name) for name in content if name not in arrays):
        notes += [f"entries of {path} that are not arrays were not read: {some(left)}"]
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): x for name, x in arrays.items()}
    return arrays, notes


def _arrays(content: Any) -> dict[str, np.ndarray]:
    if not isinstance(content, dict):
        return {}
    return {
        name: x
        for name, x in content.items()
        if isinstance(name, str) and isinstance(x, np.ndarray)
    }


def _beside(path: str) -> tuple[Normalization | None, str | None]:
    """Reads timm's config.json or Hugging Face's preprocessor_config.json beside `path`."""
    folder = os.path.dirname(path)
    timm = _json(os.path.join(folder, "config.json"))
    timm = timm.get("pretrained_cfg", timm)
    if {"mean", "std"} <= timm.keys():
        filter_name = timm.get("interpolation", "bicubic")
        found = Normalization(tuple(timm["mean"]), tuple(timm["std"]), filter_name)
        return found, timm.get("license")
    other = _json(os.path.join(folder, "preprocessor_config.json"))
    if {"image_mean", "image_std"} <= other.keys():
        mean, std = tuple(other["image_mean"]), tuple(other["image_std"])
        return Normalization(mean, std, _RESAMPLING.get(other.get("resample", 3), "bicubic")), None
    return None, None


def _json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError:
        return {}
    except ValueError as error:
        raise InputError(f"{path} is damaged: it is not valid JSON ({error}). Replace it") from None
    return content if isinstance(content, dict) else {}


def some(names: list[str], shown: int = 5) -> str:
    """Lists the first `shown` names for a message, and counts the rest."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
