"""Files of predictions that grow batch by batch and can be continued by a later process.

OUT.about.json, beside OUT, tells the images, the model and the columns; it is written first. The
features of an image are written before its line in OUT.
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
# Keys of OUT.about.json that must agree to continue, with the user's words for them.
_SAME = {
    "images_sha256": "the list of images",
    "images": "the number of images",
    "model_sha256": "the model",
    "top": "--top",
    "features": "--features",
}


class Output:
    """The files of one prediction; they have `done` rows, each with `top` classes."""

    def __init__(self, table: IO, features: IO | None, form: lines.Form, top: int, row_bytes: int):
        self._table, self._features, self._form, self.top = table, features, form, top
        self._row_bytes, self._start = row_bytes, features.tell() if features else 0
        self.done = 0

    def earlier(self, inputs: Inputs) -> Iterator[lines.Row]:
        """Yields the rows in the table, checked; removes an incomplete line at the end.

        Raises:
          InputError: a line was altered or does not belong to its image.
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
        """Writes a batch: first its features (float32 [n, D]), then its lines."""
        if self._features:
            self._features.seek(self._start + self.done * self._row_bytes)
            self._features.write(np.ascontiguousarray(features, np.float32))
            self._features.flush()
        self._table.write("".join(self._form.line(row, self.top) for row in rows).encode())
        self._table.flush()
        self.done += len(rows)

    def to_disk(self) -> None:
        """Writes all data to the disk, so that a power cut does not lose them."""
        for file in filter(None, (self._features, self._table)):
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def opened(
    out: str, features: str | None, feature_dim: int, about: dict[str, Any]
) -> Iterator[Output]:
    """Creates the files of a prediction, or opens them to continue.

    Args:
      out: path of the table, .csv or .jsonl.
      features: path of the .npy file, float32 [images, feature_dim]; None for no file.
      feature_dim: D.
      about: content of OUT.about.json. The keys of _SAME must agree with an existing file.

    Raises:
      InputError: a path cannot be used, is in use, or belongs to something else.
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
    """Checks that the paths can be written, before anything is computed.

    Raises:
      InputError: a path is missing, has a wrong extension or cannot be written.
    """
    endings = " or ".join(lines.FORMS)
    if not out:
        raise InputError("--out is needed: the output file, such as predictions.csv")
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
                f"{flag}={path} already exists, but {place}, which would describe it, is missing. "
                "Remove the file, or choose another name"
            )


def _check_same(out: str, before: dict[str, Any], about: dict[str, Any]) -> None:
    different = [said for key, said in _SAME.items() if before.get(key) != about[key]]
    if different:
        raise InputError(
            f"--out={out} has predictions with different inputs: {', '.join(different)} differed. "
            f"To continue them, use the same inputs; else {_anew(out)}"
        )


@contextlib.contextmanager
def _features(path: str, shape: tuple[int, int], begun: int):
    """Opens the .npy file, positioned after its header; creates it for a new prediction."""
    if not os.path.exists(path):
        if begun:
            raise InputError(
                f"--features={path} is missing, but the predictions have begun. Restore the file"
            )
        np.lib.format.open_memmap(path, "w+", np.float32, shape)  # a sparse file
    with open(path, "r+b") as file:
        try:
            np.lib.format.read_magic(file)
            found = np.lib.format.read_array_header_1_0(file)
        except ValueError:
            found = None
        if found != (shape, False, np.dtype(np.float32)):
            raise InputError(
                f"--features={path} is not a .npy file of float32 {list(shape)}. Choose another "
                "name and another --out"
            )
        yield file


@contextlib.contextmanager
def _locked(out: str) -> Iterator[None]:
    """Locks the table against other processes; the lock ends with this process."""
    folder, name = os.path.split(out)
    with contextlib.ExitStack() as held:
        try:
            lock = filelock.FileLock(os.path.join(folder, f".{name}.lock"), blocking=False)
            held.enter_context(lock)
        except filelock.Timeout:
            raise InputError(
                f"--out={out} is being written by another process. Wait for it, or choose another "
                "name"
            ) from None
        except (OSError, NotImplementedError) as error:  # file systems without locks
            logging.warning("%s cannot be locked (%s): do not start a second process.", out, error)
        yield


def _altered(path: str, number: int) -> str:
    return (
        f"--out={path}: line {number} was altered. To continue, restore the original file; else "
        f"{_anew(path)}"
    )


def _anew(out: str) -> str:
    return f"start again with another --out (or delete {out} and {out}{ABOUT})"
