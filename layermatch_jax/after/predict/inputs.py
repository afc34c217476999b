"""Which images are to be predicted: what --images names."""

import hashlib
import os
from typing import NamedTuple

from layermatch_jax.data.sources import listing, names
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import files

_ALLOWED = (
    "Give a folder, a text file (.txt) with the path of an image on each line, or the files "
    "themselves, comma-separated"
)


class Inputs(NamedTuple):
    """N image files, in the order in which they are predicted."""

    root: str  # the folder that the paths are relative to; '' for the current one
    paths: list[str]
    note: str  # what was passed over; '' for nothing

    def path(self, position: int) -> str:
        """By which the file is opened."""
        return os.path.join(self.root, self.paths[position])

    def shown(self, position: int) -> str:
        """The path as text of one line, relative to the root."""
        return names.visible(self.paths[position]).replace(os.sep, "/")

    def sha256(self) -> str:
        """In hex, of all paths: other for another list."""
        found = hashlib.sha256()
        for path in self.paths:
            found.update(os.fsencode(path) + b"\0")
        return found.hexdigest()


def find(images: str) -> Inputs:
    """The images that --images names.

    Of a folder, all below it that training would take, sorted by path. Of a list, one a line, as
    UTF-8 with or without a byte order mark; its paths are relative to the folder that it lies in.

    Raises:
      InputError: there is no such folder or file, or no image in it.
    """
    said, place = f"--images={images}", os.path.expanduser(images)
    if os.path.isdir(place):
        return _of_folder(place, said)
    if place.lower().endswith(".txt") and os.path.isfile(place):
        return _of_list(place, said)
    paths = files.separate(images, lambda name: os.path.exists(os.path.expanduser(name)))
    paths = list(map(os.path.expanduser, paths))
    if not paths:
        raise InputError(f"--images is needed: which images to predict. {_ALLOWED}")
    for path in paths:
        if not os.path.exists(path):
            raise InputError(f"--images: there is no {names.text(path)}. {_ALLOWED}")
        if os.path.isdir(path) or path.lower().endswith(".txt"):
            raise InputError(f"--images: {names.text(path)} must be given alone. {_ALLOWED}")
    return Inputs("", paths, "")


def _of_folder(folder: str, said: str) -> Inputs:
    found = listing.find(folder)
    note = listing.passed_over(found.passed_over, folder)
    if not found.files:
        raise InputError(
            f"{said}: no image in this folder. {note}{'. ' if note else ''}Files count as images "
            f"if they end in {', '.join(listing.EXTENSIONS)}"
        )
    start = len(os.path.join(folder, ""))
    return Inputs(folder, [path[start:] for path in found.files], note)


def _of_list(path: str, said: str) -> Inputs:
    try:
        text = names.read_list(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{said} cannot be read ({error}). It must be a UTF-8 text file") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    paths = [line for line in lines if line.strip()]
    if not paths:
        raise InputError(f"{said} is empty. It must have the path of an image on each line")
    empty = len(lines) - len(paths) - (not lines[-1])
    note = f"passed over: empty lines ({empty:,})" if empty else ""
    return Inputs(os.path.dirname(path), paths, note)
