"""Finds the images that --images names."""

import hashlib
import os
from typing import NamedTuple

from layermatch_jax.data.sources import listing, names
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import files

_ALLOWED = (
    "Use a folder, a text file (.txt) with the path of an image on each line, or image files "
    "separated by commas"
)


class Inputs(NamedTuple):
    """N image files, in the order of the predictions."""

    root: str  # the folder of the relative paths; '' for the current folder
    paths: list[str]
    note: str  # a sentence on what was passed over; '' for nothing

    def path(self, position: int) -> str:
        """Returns the path for opening a file."""
        return os.path.join(self.root, self.paths[position])

    def shown(self, position: int) -> str:
        """Returns the path of a file relative to the root, as one line of text."""
        return names.visible(self.paths[position]).replace(os.sep, "/")

    def sha256(self) -> str:
        """Hashes the list of paths; returns hex."""
        found = hashlib.sha256()
        for path in self.paths:
            found.update(os.fsencode(path) + b"\0")
        return found.hexdigest()


def find(images: str) -> Inputs:
    """Finds the images that --images names.

    A folder stands for all images below it in the formats that training takes, sorted by path. A
    list has a path on each line, relative to the folder of the list, as UTF-8 with or without a
    byte order mark.

    Raises:
      InputError: the folder or file does not exist, or has no image.
    """
    said, place = f"--images={images}", os.path.expanduser(images)
    if os.path.isdir(place):
        return _of_folder(place, said)
    if place.lower().endswith(".txt") and os.path.isfile(place):
        return _of_list(place, said)
    paths = files.separate(images, lambda name: os.path.exists(os.path.expanduser(name)))
    paths = list(map(os.path.expanduser, paths))
    if not paths:
        raise InputError(f"--images is needed: it names the images to predict. {_ALLOWED}")
    for path in paths:
        if not os.path.exists(path):
            raise InputError(f"--images: {names.text(path)} does not exist. {_ALLOWED}")
        if os.path.isdir(path) or path.lower().endswith(".txt"):
            raise InputError(
                f"--images: {names.text(path)} cannot be combined with other files. {_ALLOWED}"
            )
    return Inputs("", paths, "")


def _of_folder(folder: str, said: str) -> Inputs:
    found = listing.find(folder)
    note = listing.passed_over(found.passed_over, folder)
    if not found.files:
        raise InputError(
            f"{said}: the folder has no images. {note}{'. ' if note else ''}Files count as images "
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
        raise InputError(f"{said} is empty. Write the path of an image on each line")
    empty = len(lines) - len(paths) - (not lines[-1])
    note = f"passed over: empty lines ({empty:,})" if empty else ""
    return Inputs(os.path.dirname(path), paths, note)
