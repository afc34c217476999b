"""The files of a cache of decoded images: their pixels, and an index of them.

  pixels      uint8 [rows, side, side, 3], without a header. Rows are only ever appended.
  index.npz   about each row: which file it holds, in which state; sums of its pixels; remarks

The index is written after its pixels, atomically. So a row that is in the index is complete, and
runs may read it while others append more.
"""

import io
import itertools
import json
import os
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from layermatch_jax.errors import InputError
from layermatch_jax.runtime import files as small_files

PIXELS, INDEX = "pixels", "index.npz"
ROW = np.dtype(
    [
        ("file", "V16"),  # hash of its path and state
        ("sums", "<u8", (3,)),  # of red, green and blue
        ("squares", "<u8", (3,)),
        ("remarks", "<i4"),  # position in Index.remarks
    ]
)


class Index(NamedTuple):
    """What the rows of the pixels are."""

    rows: np.ndarray  # ROW [rows]
    remarks: list[list[str]]  # each combination of remarks once; the first is the empty one


def find(index: Index, states: list[bytes]) -> np.ndarray:
    """Returns the row of each file: int64 [N], -1 if the index lacks it."""
    row_of = {state: row for row, state in enumerate(index.rows["file"].tolist())}
    return np.array([row_of.get(state, -1) for state in states], np.int64)


def read_index(folder: Path, side: int) -> Index | None:
    """Reads the index; an empty one if there is no file, None if it is damaged or lacks pixels."""
    try:
        content = io.BytesIO((folder / INDEX).read_bytes())
        with np.load(content, allow_pickle=False) as saved:
            index = Index(saved["rows"].astype(ROW), json.loads(str(saved["remarks"])))
        complete = os.path.getsize(folder / PIXELS) >= len(index.rows) * side * side * 3
    except FileNotFoundError:
        return Index(np.zeros(0, ROW), [[]])
    except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return index if complete else None


class Appender:
    """Appends rows to a cache; only for a process that holds the lock. A context manager."""

    def __init__(self, folder: Path, side: int, index: Index):
        self._folder, self._rows, self._fresh = folder, index.rows, []
        self._remarks = {tuple(texts): number for number, texts in enumerate(index.remarks)}
        if not len(index.rows):  # runs that have opened the old file keep it
            (folder / PIXELS).unlink(missing_ok=True)
        self._out = open(folder / PIXELS, "ab")  # noqa: SIM115
        self._out.truncate(len(index.rows) * side * side * 3)  # what a killed process left

    def __enter__(self) -> "Appender":
        return self

    def __exit__(self, *_) -> None:
        self._out.close()

    def add(
        self,
        state: bytes,
        pixels: np.ndarray,
        sums: np.ndarray,
        squares: np.ndarray,
        remarks: tuple[str, ...],
    ) -> None:
        """Appends a row: uint8 [side, side, 3], its moments and remarks. `commit` makes it count.

        Args:
          state: 16 bytes, see ROW.
          pixels: uint8 [side, side, 3].
          sums: uint64 [3], from `images.moments`.
          squares: uint64 [3].
          remarks: see `decoding.Decoded`.
        """
        self._out.write(pixels.data)
        number = self._remarks.setdefault(remarks, len(self._remarks))
        self._fresh.append((state, sums, squares, number))

    def commit(self) -> Index:
        """Writes the pixels to the disk and then, atomically, the index; returns it."""
        self._out.flush()
        os.fsync(self._out.fileno())
        self._rows = np.concatenate([self._rows, np.array(self._fresh, ROW)])
        self._fresh.clear()
        index = Index(self._rows, list(map(list, self._remarks)))
        content = io.BytesIO()
        np.savez(content, rows=index.rows, remarks=np.array(json.dumps(index.remarks)))
        small_files.write_bytes(self._folder / INDEX, content.getvalue())
        return index


def reader(folder: Path, side: int, rows: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the function that reads images: positions [n] -> uint8 [n, side, side, 3].

    It reads with `preadv` and not through a memory map. So the pages of a cache larger than memory
    are no part of the process's memory (also not of a limit on its addresses, `ulimit -v`), and a
    disk that fails is an error that can be explained, where a map ends the process (SIGBUS).
    """
    path, row_bytes = folder / PIXELS, side * side * 3
    if not hasattr(os, "preadv"):  # Windows
        pixels = np.memmap(path, np.uint8, "r").reshape(-1, side, side, 3)
        return lambda indices: pixels[rows[indices]]
    descriptor = os.open(path, os.O_RDONLY)

    def read(indices: np.ndarray) -> np.ndarray:
        wanted = rows[indices]
        out = np.empty((len(wanted), side, side, 3), np.uint8)
        first = np.flatnonzero(np.diff(wanted, prepend=-2) != 1)  # of rows that follow each other
        for start, stop in itertools.pairwise([*first, len(wanted)]):
            _fill(descriptor, out[start:stop], int(wanted[start]) * row_bytes, path)
        return out

    weakref.finalize(read, os.close, descriptor)
    return read


def _fill(descriptor: int, out: np.ndarray, offset: int, path: Path) -> None:
    """Fills an array with the bytes of a file from an offset on."""
    left = out.data.cast("B")
    while left:
        try:
            count = os.preadv(descriptor, [left], offset)
            why = "it is too short"
        except OSError as error:
            count, why = 0, error.strerror
        if not count:
            raise InputError(
                f"The decoded images in {path} cannot be read ({why}). Start again: missing images"
                " are decoded again, and a run that was under way goes on."
            )
        left, offset = left[count:], offset + count
