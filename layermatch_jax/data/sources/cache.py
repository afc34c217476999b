"""Decoded images on the disk, so that an image file is decoded only once, whatever its size.

A cache is a folder for the images below one root, at one size: the files of `cache_files`, the file
about.json, which says for people what it is, and a lock, held while rows are appended.
"""

import contextlib
import errno
import functools
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import PIL
from ml_collections import ConfigDict

from layermatch_jax.data.images import Images, moments
from layermatch_jax.data.sources import cache_files, checking, decoding, names
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import files as small_files

NONE = "none"  # value of dataset.cache_dir: no cache
ABOUT, LOCK = "about.json", ".lock"
_COMMIT = 30.0  # seconds after which the index is written; a killed process loses less than this
_WITHOUT = f"decode each image whenever it is needed, with --config.dataset.cache_dir={NONE}"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Row(NamedTuple):
    """What `cache_files.Appender.add` gets of an image."""

    pixels: np.ndarray  # uint8 [side, side, 3]
    sums: np.ndarray  # uint64 [3]
    squares: np.ndarray  # uint64 [3]
    remarks: tuple[str, ...]


def open_images(
    files: Sequence[str], labels: np.ndarray, dataset: ConfigDict
) -> tuple[Images, checking.Findings]:
    """Opens the cache of a data set; decodes the images that it does not have yet.

    An image is decoded again if the size, the modification time or the change time (ctime) of its
    file has changed. It prints to stderr where the cache is, its size, and how far it is. A process
    that is killed leaves what it has decoded so far. If another process decodes images of the same
    data set, this one waits for it.

    Args:
      files: [N] paths of the images, all below dataset.data_dir.
      labels: int32 [N].
      dataset: config.dataset. Read: data_dir, stored_size, alpha, cache_dir ('' for the user's
        cache folder, $XDG_CACHE_HOME or ~/.cache).

    Returns:
      The images, whose pixels are read from the cache (those of a broken one must not be read), and
      what `checking.check` finds. Broken images are not in the cache: each start tries them again.

    Raises:
      InputError: the cache cannot be written, or the disk has no room for it. Reading raises it if
        the cache was damaged after this call.
      MemoryError, OSError: the machine failed: see `decoding.attempt`.
    """
    side, folder = dataset.stored_size, _folder(dataset)
    states = _states(files, dataset.data_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        index = _read_index(folder, side)
        found, broken = cache_files.find(index, states), {}
        if (found < 0).any():
            with _locked(folder):
                index = _read_index(folder, side)  # another process may have appended rows
                missing = np.flatnonzero(cache_files.find(index, states) < 0)
                if missing.size:
                    index, broken = _append(folder, index, files, states, missing, dataset)
            found = cache_files.find(index, states)
        else:
            size = _size(len(index.rows), side)
            _say(f"{len(files):,} decoded images are read from {folder} ({size})")
        read = cache_files.reader(folder, side, found)
    except (OSError, NotImplementedError) as error:  # the second on file systems without locks
        if isinstance(error, OSError) and error.errno in decoding.OF_THE_MACHINE:
            raise
        raise InputError(
            f"The cache of decoded images {folder} cannot be used ({error}). Choose"
            f" another folder with --config.dataset.cache_dir=FOLDER, or {_WITHOUT}."
        ) from error

    def of_images(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = index.rows[found[indices]]
        return rows["sums"], rows["squares"]

    results = (
        (broken[i], ()) if row < 0 else (None, index.remarks[index.rows["remarks"][row]])
        for i, row in enumerate(found)
    )
    made = Images(labels, read, np.array(files, object), of_images)
    return made, checking.tally(files, results)


def _folder(dataset: ConfigDict) -> Path:
    """Returns the folder of the cache of a data set; its name begins with that of the root."""
    if "://" in dataset.cache_dir:
        raise InputError(
            f"--config.dataset.cache_dir={dataset.cache_dir}: give a local folder, or {NONE}."
        )
    above = Path(dataset.cache_dir) if dataset.cache_dir else checking.user_cache() / "images"
    key = hashlib.sha256(repr(_about(dataset)).encode("utf-8", "surrogateescape")).hexdigest()
    name = re.sub(r"[^\w.-]+", "_", os.path.basename(_root(dataset)), flags=re.ASCII)[:40]
    return above / f"{name}-{dataset.stored_size}px-{key[:12]}"


def _root(dataset: ConfigDict) -> str:
    return os.path.realpath(dataset.data_dir)


def _about(dataset: ConfigDict) -> dict:
    """Describes what all pixels of a cache depend on."""
    return {
        "root": _root(dataset),
        "stored_size": dataset.stored_size,
        "alpha": dataset.alpha,
        "pillow": PIL.__version__,
        "decoding": decoding.VERSION,
    }


def _states(files: Sequence[str], root: str) -> list[bytes]:
    """Returns for each file a hash, 16 bytes, of its path below the root and its present state."""
    start = len(os.path.join(Path(root), ""))  # Path: as in `layout`, without ./ at the front

    def state_of(path: str) -> bytes:
        state = None
        with contextlib.suppress(OSError):  # decoding reports it
            found = os.stat(path)
            state = found.st_size, found.st_mtime_ns, found.st_ctime_ns
        text = repr((path[start:], state)).encode("utf-8", "surrogateescape")
        return hashlib.blake2b(text, digest_size=16).digest()

    return decoding.of_each(state_of, files)


def _read_index(folder: Path, side: int) -> cache_files.Index:
    index = cache_files.read_index(folder, side)
    if index is None:
        _say(f"the cache {folder} is damaged: its images are decoded again")
        index = cache_files.Index(np.zeros(0, cache_files.ROW), [[]])
    return index


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        _say("another process decodes these images: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _append(
    folder: Path,
    index: cache_files.Index,
    files: Sequence[str],
    states: list[bytes],
    missing: np.ndarray,
    dataset: ConfigDict,
) -> tuple[cache_files.Index, dict[int, str]]:
    """Decodes the files at the missing positions, and appends their rows.

    Returns:
      The new index; {position of a broken image: why it cannot be decoded}.
    """
    side, alpha = dataset.stored_size, dataset.alpha
    there = f"; {len(files) - len(missing):,} others are there" if len(missing) < len(files) else ""
    _say(
        f"decoding {len(missing):,} images, once, to {side} x {side} pixels:"
        f" {_size(len(missing), side)} in {folder}{there}"
    )
    broken = {}
    try:
        _require_room(folder, len(missing), side)
        small_files.write_json(folder / ABOUT, _about(dataset))
        with cache_files.Appender(folder, side, index) as rows:
            decode = functools.partial(_decode, side=side, alpha=alpha)
            decoded = decoding.ahead(decode, [files[i] for i in map(int, missing)], side)
            shown = checking.shown(decoded, len(missing), "decoding images")
            committed = time.monotonic()
            for position, row in zip(missing.tolist(), shown, strict=True):
                if isinstance(row, str):
                    broken[position] = row
                    continue
                rows.add(states[position], *row)
                if time.monotonic() - committed > _COMMIT:
                    rows.commit()
                    committed = time.monotonic()
            return rows.commit(), broken
    except OSError as error:
        if error.errno in _FULL:
            _require_room(folder, len(missing), side, full=True)
        raise


def _decode(path: str, side: int, alpha: str) -> _Row | str:
    """Decodes an image; returns the reason if it is broken."""
    decoded = decoding.attempt(path, side, alpha)
    if isinstance(decoded, str):
        return decoded
    return _Row(decoded.pixels, *moments(decoded.pixels), decoded.remarks)


def _require_room(folder: Path, images: int, side: int, full: bool = False) -> None:
    """Raises an InputError if so many images do not fit on the disk, or if it was found full."""
    free = shutil.disk_usage(folder).free
    if full or images * side * side * 3 > free:
        raise InputError(
            f"{images:,} decoded images of {side} x {side} pixels need {_size(images, side)} in"
            f" {folder}, where {_in_units(free)} are free. Make room, choose a folder on another"
            f" disk with --config.dataset.cache_dir=FOLDER, or {_WITHOUT}."
        )


def _size(images: int, side: int) -> str:
    return _in_units(images * side * side * 3)


def _in_units(count: int) -> str:
    unit, size = next((u for u in (("GB", 1e9), ("MB", 1e6)) if count >= u[1]), ("kB", 1e3))
    return f"{count / size:.1f} {unit}"


def _say(text: str) -> None:
    print(names.text(text), file=sys.stderr, flush=True)
