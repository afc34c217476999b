"""Reads PyTorch's files of weights (.pth, .pt, .bin) without PyTorch.

Such a file is a pickle, which can call any function of any module when it is loaded. This reader
only allows containers and the few functions that make tensors; it raises an error before it calls
anything else. There are two formats: a zip archive since PyTorch 1.6; before that, several pickles
followed by the bytes of the storages.
"""

import collections
import io
import math
import pickle
import zipfile
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from layermatch_jax.errors import InputError

_MAGIC = 0x1950A86A20F9469CFC6C  # of the format before 1.6
_DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": jnp.dtype(jnp.bfloat16),
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


class _Storage(NamedTuple):
    """A block of bytes of the file; tensors are views of it."""

    dtype: np.dtype
    key: str
    size: int  # in elements


class _Tensor(NamedTuple):
    """A view of a storage; offset, sizes and strides are in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(data: bytes, path: str) -> Any:
    """Returns the content of a file: containers with NumPy arrays in place of tensors.

    Args:
      data: the bytes of the whole file.
      path: its path, for messages.

    Raises:
      InputError: the file is not PyTorch's, is cut off, or needs functions that are not allowed.
    """
    try:
        return _read_zip(data, path) if data[:2] == b"PK" else _read_pickles(data, path)
    except InputError:
        raise
    except Exception as error:  # any error, because a file may hold anything
        raise InputError(
            f"{path} is not a complete PyTorch file ({type(error).__name__}: {error}). If the "
            "download was cut off, repeat it"
        ) from None


def _read_zip(data: bytes, path: str) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise InputError(
                f"{path} is a zip archive, but not a PyTorch file: it must hold one data.pkl"
            )
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise InputError(
                f"{path} was written on a big-endian machine. Save it again on a little-endian one"
            )
        content = _Reader(io.BytesIO(archive.read(pickles[0])), path).load()
        return _materialize(content, lambda storage: archive.read(f"{root}data/{storage.key}"))


def _read_pickles(data: bytes, path: str) -> Any:
    file = io.BytesIO(data)
    if _Reader(file, path).load() != _MAGIC:
        raise InputError(
            f"{path} is a pickle, but not a PyTorch file. Save the weights with torch.save"
        )
    _Reader(file, path).load()  # version of the format
    _Reader(file, path).load()  # sizes of C types
    reader = _Reader(file, path)
    content = reader.load()
    bytes_of = {}
    for key in _Reader(file, path).load():
        count = int.from_bytes(file.read(8), "little")
        size = count * reader.storages[key].dtype.itemsize
        bytes_of[key] = file.read(size)
        if len(bytes_of[key]) != size:
            raise InputError(
                f"{path} is cut off: its end must hold {size} bytes of weights. Download it again"
            )
    return _materialize(content, lambda storage: bytes_of[storage.key])


class _Reader(pickle.Unpickler):
    """An Unpickler that can only call the functions in `find_class`."""

    def __init__(self, file, path: str):
        super().__init__(file)
        self.path = path
        self.storages = {}

    def find_class(self, module: str, name: str) -> Any:
        """Returns an allowed function or type; raises InputError for any other name."""
        known = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor"): _Tensor,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _Tensor(*args[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in _DTYPES:
            return np.dtype(_DTYPES[name])
        raise InputError(
            f"{self.path} is a pickle that would call {module}.{name}. Only tensors and plain "
            "containers are allowed, and no code of the file was run. If you trust the file, save "
            "only its weights with PyTorch: torch.save(model.state_dict(), FILE)"
        )

    def persistent_load(self, pid: tuple) -> _Storage:
        """Returns a storage by its key; its bytes are outside the pickle."""
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(view):
            raise InputError(
                f"{self.path} holds {kind!r}, which is not the plain storage of a tensor"
            )
        self.storages[key] = _Storage(dtype, key, count)
        return self.storages[key]


def _materialize(content: Any, bytes_of) -> Any:
    if isinstance(content, _Tensor):
        return _array(content, bytes_of(content.storage))
    if isinstance(content, dict):
        return {key: _materialize(value, bytes_of) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_materialize(value, bytes_of) for value in content]
    return content


def _array(tensor: _Tensor, data: bytes) -> np.ndarray:
    dtype, (_, offset, shape, strides) = tensor.storage.dtype, tensor
    values = np.frombuffer(data, dtype)
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    numbers = (offset, *shape, *strides)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if min(numbers) < 0 or last >= len(values):
        raise ValueError(f"a tensor reaches element {last} of {len(values)}")
    steps = [stride * dtype.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False).copy()
