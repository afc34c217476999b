"""Files of predictions that grow batch by batch, and go on where a process that ended left them.

Beside OUT lies OUT.about.json: which images, which model and which columns. It is written first.
A line of OUT is there when the features of its image are.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import IO, Any

import filelock
import numpy as np
from absl import logging
from etils import epath

from layermatch_jax.after.predict import lines
from layermatch_jax.after.predict.inputs import Inputs
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import files

ABOUT = ".about.json"
# What must be the same to go on, as the user knows it.
_SAME = {
    "images_sha256": "the list of images",
    "images": "the number of images",
    "model_sha256": "the model",
    "top": "--top",
    "features": "--features",
}


class Output:
    """The files of one prediction, of which `done` rows are there; each tells `top` classes."""

    def __init__(self, table: IO, features: IO | None, form: lines.Form, top: int, row_bytes: int):
        self._table, self._features, self._form, self.top = table, features, form, top
        self._row_bytes, self._start = row_bytes, features.tell() if features else 0
        self.done = 0

    def earlier(self, inputs: Inputs) -> Iterator[lines.Row]:
        """The rows that are there, checked; cuts off what is behind the last whole line.

        Raises:
          InputError: a line is not the one that belongs there.
        """
        path, header = self._table.name, self._form.header(self.top)
        self._table.seek(0)
        end = 0
        for number, line in enumerate(self._table, 1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            if header and number == 1:
                if line != header.encode():
                    raise InputError(_altered(path, number))
                continue
            try:
                row = self._form.row(line.decode())
                expected = inputs.shown(self.done)
            except (ValueError, TypeError, KeyError, IndexError):
                raise InputError(_altered(path, number)) from None
            if row.path != expected:
                raise InputError(_altered(path, number))
            self.done += 1
            yield row
        self._table.truncate(end)
        if not end:
            self._table.write(header.encode())

    def append(self, rows: Sequence[lines.Row], features: np.ndarray | None) -> None:
        """Writes a batch: its features (float32 [n, D]), and then its lines."""
        if self._features:
            self._features.seek(self._start + self.done * self._row_bytes)
            self._features.write(np.ascontiguousarray(features, np.float32))
            self._features.flush()
        self._table.write("".join(self._form.line(row, self.top) for row in rows).encode())
        self._table.flush()
        self.done += len(rows)

    def to_disk(self) -> None:
        """Returns when a power cut would take nothing away."""
        for file in filter(None, (self._features, self._table)):
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def opened(
    out: str, features: str | None, feature_dim: int, about: dict[str, Any]
) -> Iterator[Output]:
    """Begins the files of a prediction, or opens those that are to go on.

    Args:
      out: path of the table, .csv or .jsonl.
      features: path of the .npy file, float32 [images, feature_dim]; None for none.
      feature_dim: D.
      about: what OUT.about.json is to hold: the keys of _SAME, and others that may differ.

    Raises:
      InputError: a path cannot be used, is in use, or holds something else.
    """
    place = epath.Path(out + ABOUT)
    with contextlib.ExitStack() as stack:
        if place.exists():
            _check_same(out, files.read_json(place, _anew(out)), about)
        else:
            _check_new(place, {"--out": out, "--features": features})
        stack.enter_context(_locked(out))
        if not place.exists():
            files.write_json(place, about)
        form = lines.FORMS[os.path.splitext(out)[1]]
        table = stack.enter_context(open(out, "a+b"))
        of_features = None
        if features:
            shape = (about["images"], feature_dim)
            of_features = stack.enter_context(_features(features, shape, os.path.getsize(out)))
        yield Output(table, of_features, form, about["top"], 4 * feature_dim)


def check(out: str | None, features: str | None) -> None:
    """Refuses paths at which nothing can be written, before anything is computed."""
    endings = " or ".join(lines.FORMS)
    if not out:
        raise InputError("--out is needed: the file of the predictions, as predictions.csv")
    if os.path.splitext(out)[1] not in lines.FORMS:
        raise InputError(f"--out={out}: the name must end with {endings}")
    files.check_place(out, f"--out={out}")
    if features:
        if not features.endswith(".npy"):
            raise InputError(f"--features={features}: the name must end with .npy")
        files.check_place(features, f"--features={features}")


def _check_new(place: epath.Path, paths: dict[str, str | None]) -> None:
    for flag, path in paths.items():
        if path and os.path.exists(path):
            raise InputError(
                f"{flag}={path} is there already, and there is no {place} that says what it is. "
                "Remove it, or take another name"
            )


def _check_same(out: str, before: dict[str, Any], about: dict[str, Any]) -> None:
    different = [said for key, said in _SAME.items() if before.get(key) != about[key]]
    if different:
        raise InputError(
            f"--out={out} holds predictions that were begun otherwise: {', '.join(different)} "
            f"differed. Give the same again to go on with them, or {_anew(out)}"
        )


@contextlib.contextmanager
def _features(path: str, shape: tuple[int, int], begun: int):
    """The .npy file, open behind its header."""
    if not os.path.exists(path):
        if begun:
            raise InputError(f"--features={path} is gone, and the predictions go on. Bring it back")
        np.lib.format.open_memmap(path, "w+", np.float32, shape)  # takes room as it is filled
    with open(path, "r+b") as file:
        try:
            np.lib.format.read_magic(file)
            found = np.lib.format.read_array_header_1_0(file)
        except ValueError:
            found = None
        if found != (shape, False, np.dtype(np.float32)):
            raise InputError(
                f"--features={path} is no file of float32 {list(shape)}. Take another name, and "
                "another --out"
            )
        yield file


@contextlib.contextmanager
def _locked(out: str) -> Iterator[None]:
    """Keeps other processes from writing the same table while this one lives, however it ends."""
    folder, name = os.path.split(out)
    with contextlib.ExitStack() as held:
        try:
            lock = filelock.FileLock(os.path.join(folder, f".{name}.lock"), blocking=False)
            held.enter_context(lock)
        except filelock.Timeout:
            raise InputError(
                f"--out={out} is being written by another process. Wait for it, or take another "
                "name"
            ) from None
        except (OSError, NotImplementedError) as error:  # of file systems that know no locks
            logging.warning("%s cannot be locked (%s): start no second prediction.", out, error)
        yield


def _altered(path: str, number: int) -> str:
    return (
        f"--out={path}: line {number} is not what was written there. Take the file as it was to go "
        f"on with it, or {_anew(path)}"
    )


def _anew(out: str) -> str:
    return f"begin anew with another --out (or without {out} and {out}{ABOUT})"
