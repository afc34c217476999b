"""PyTorch's files of weights (.pth, .pt, .bin), read without PyTorch.

Such a file is a pickle, which may call any function of any module when it is loaded. The reader
here knows containers and the few names that tensors are made of, and refuses everything else
before it is called. PyTorch wrote two forms: a zip archive since version 1.6, and before that
pickles and the storages' bytes behind each other.
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

_MAGIC = 0x1950A86A20F9469CFC6C  # of the form before 1.6
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
    """Bytes of the file that tensors are views of."""

    dtype: np.dtype
    key: str
    size: int  # in elements


class _Tensor(NamedTuple):
    """A view of a storage: sizes and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(data: bytes, path: str) -> Any:
    """What a file holds: containers, with NumPy arrays in place of tensors.

    Args:
      data: the whole file.
      path: for messages.

    Raises:
      InputError: it is no such file, or cut off; or it holds more than tensors and containers.
    """
    try:
        return _read_zip(data, path) if data[:2] == b"PK" else _read_pickles(data, path)
    except InputError:
        raise
    except Exception as error:  # of any kind: the file may hold anything
        raise InputError(
            f"{path} is no whole file of PyTorch's ({type(error).__name__}: {error}). Was its "
            "download cut off?"
        ) from None


def _read_zip(data: bytes, path: str) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise InputError(f"{path} is an archive, but none of PyTorch's: it has no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise InputError(f"{path} was written on a big-endian machine, which is not read here")
        content = _Reader(io.BytesIO(archive.read(pickles[0])), path).load()
        return _materialize(content, lambda storage: archive.read(f"{root}data/{storage.key}"))


def _read_pickles(data: bytes, path: str) -> Any:
    file = io.BytesIO(data)
    if _Reader(file, path).load() != _MAGIC:
        raise InputError(f"{path} is a pickle, but no file of PyTorch's")
    _Reader(file, path).load()  # version of the form
    _Reader(file, path).load()  # sizes of C's types
    reader = _Reader(file, path)
    content = reader.load()
    bytes_of = {}
    for key in _Reader(file, path).load():
        count = int.from_bytes(file.read(8), "little")
        size = count * reader.storages[key].dtype.itemsize
        bytes_of[key] = file.read(size)
        if len(bytes_of[key]) != size:
            raise InputError(f"{path} is cut off: {size} bytes of weights should be where it ends")
    return _materialize(content, lambda storage: bytes_of[storage.key])


class _Reader(pickle.Unpickler):
    """An Unpickler that can call nothing but the functions below."""

    def __init__(self, file, path: str):
        super().__init__(file)
        self.path = path
        self.storages = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may call, by its name."""
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
            "containers are read, and nothing of it was run. If you trust the file, save its "
            "weights alone with PyTorch: torch.save(model.state_dict(), FILE)"
        )

    def persistent_load(self, pid: tuple) -> _Storage:
        """A storage, of which the pickle has the name alone."""
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or any(view):
            raise InputError(f"{self.path} holds {kind!r}, which is no plain storage of a tensor")
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
