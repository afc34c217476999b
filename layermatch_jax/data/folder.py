"""A data set as a folder of image files (ImageNet-100, one's own photographs).

The files are listed at the start and decoded when they are read.
"""

import concurrent.futures
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from layermatch_jax.data.images import Images, Source, square
from layermatch_jax.errors import InputError

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
_LAYOUT = (
    "Expected: ROOT/train/CLASS/*.jpg and ROOT/test/CLASS/*.jpg (or ROOT/val/...), at any depth"
    " below CLASS, and if you like ROOT/unlabeled/*.jpg; image files end in "
    + ", ".join(EXTENSIONS)
    + ". Set --config.dataset.data_dir to ROOT."
)


def load(dataset: ConfigDict) -> Source:
    """The images below dataset.data_dir, each cut to its central square of dataset.stored_size.

    ROOT/train/CLASS/ and ROOT/test/CLASS/ (ROOT/val/ where there is no ROOT/test/) hold the images
    of a class, at any depth; ROOT/unlabeled/, if there, holds more, at any depth. Classes are the
    folders of train sorted by name, or those named in dataset.class_list, in its order (one a line;
    empty lines and lines that begin with # are skipped; other folders are ignored). The images of a
    class come sorted by path. Hidden files and folders are passed over.

    Images are turned as their EXIF orientation says, as a photograph is meant to be seen; an alpha
    channel is dropped; of an animation the first frame counts.

    Raises:
      InputError: the folder is not of this form. Reading a broken image raises it too, with the
        file's name.
    """
    root = Path(dataset.data_dir).expanduser()
    if not dataset.data_dir or not root.is_dir():
        raise InputError(
            f"Data set 'folder': --config.dataset.data_dir={dataset.data_dir!r} is not a folder."
            f" {_LAYOUT}"
        )
    train, test = root / "train", root / "test"
    if not test.is_dir():
        test = root / "val"
    for folder in (train, test):
        if not folder.is_dir() or not _subfolders(folder):
            state = "has no class folders" if folder.is_dir() else "is missing"
            raise InputError(f"{folder} {state}. {_LAYOUT}")

    if dataset.class_list:
        names = _read_class_list(dataset.class_list)
        there = set(_subfolders(train))
        missing = [name for name in names if name not in there]
        source = f"named in {dataset.class_list}"
    else:
        names = _subfolders(train)
        missing = [name for name in _subfolders(test) if name not in names]
        source = f"found in {test}"
    if missing:
        raise InputError(
            f"{len(missing)} of the classes {source} have no folder in {train}:"
            f" {_some(missing)}. Every class needs training images: add them, or take the class"
            f" out of {'the list' if dataset.class_list else test}."
        )

    size = dataset.stored_size
    files = [_files(train / name) for name in names]
    empty = [name for name, found in zip(names, files, strict=True) if not found]
    if empty:
        raise InputError(f"No images in these folders of {train}: {_some(empty)}. {_LAYOUT}")
    test_files = [_files(test / name) for name in names]
    empty = [name for name, found in zip(names, test_files, strict=True) if not found]
    if len(empty) == len(names):
        raise InputError(f"No images of these classes in {test}: {_some(names)}. {_LAYOUT}")
    if empty:
        logging.warning("No test images in %s for: %s.", test, _some(empty))

    unlabeled = None
    if (root / "unlabeled").is_dir():
        found = _files(root / "unlabeled")
        if not found:
            raise InputError(f"{root / 'unlabeled'} has no images: fill or remove it. {_LAYOUT}")
        unlabeled = _images(found, np.full(len(found), -1), size)
    return Source(
        class_names=tuple(names),
        train=_images(*_flat(files), size),
        unlabeled=unlabeled,
        test=_images(*_flat(test_files), size),
    )


def decode(path: str, side: int) -> np.ndarray:
    """One image file as uint8 [side, side, 3]; see `load`. InputError if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            # A JPEG far larger than needed is decoded at 1/2, 1/4 or 1/8 of its size; twice what
            # is needed is left, so that the resizing after it still decides the quality.
            image.draft("RGB", (2 * side, 2 * side))
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):  # Pillow's own conversion would clip to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode == "P":  # by way of RGBA: a palette may hold transparency
                image = image.convert("RGBA")
            return np.asarray(square(image.convert("RGB"), side))
    # Decoders raise whatever the broken bytes lead them to: OSError, SyntaxError, struct.error...
    except Exception as error:
        raise InputError(
            f"Cannot decode the image {path} ({type(error).__name__}: {error}). Remove or replace"
            " it. (Replaced, a run that has begun goes on; removed, a new one is needed: the"
            " positions in the data set shift.)"
        ) from error


def from_files(paths: Sequence[str | os.PathLike], side: int) -> Images:
    """Image files without known classes, in this order, cut and resized to `side` pixels."""
    return _images(list(map(os.fspath, paths)), np.full(len(paths), -1), side)


def _images(files: list[str], labels: np.ndarray, side: int) -> Images:
    def read(indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), side, side, 3), np.uint8)
        decoded = _pool().map(lambda i: decode(files[i], side), indices)
        for row, image in zip(out, decoded, strict=True):
            row[:] = image
        return out

    return Images(np.asarray(labels, np.int32), read, np.array(files, object))


@functools.cache
def _pool() -> concurrent.futures.Executor:
    # Pillow decodes without the GIL, so threads are enough.
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "decode")


def _flat(files: list[list[str]]) -> tuple[list[str], np.ndarray]:
    labels = np.repeat(np.arange(len(files)), [len(f) for f in files])
    return [path for found in files for path in found], labels


def _subfolders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(folder: Path) -> list[str]:
    """Paths of the images at any depth, sorted by their path below the folder."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(where).relative_to(folder)
        found += [
            (below / name).as_posix()
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return [str(folder / path) for path in sorted(found)]


def _read_class_list(path: str) -> list[str]:
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--config.dataset.class_list={path!r} cannot be read ({error}). It must be a text"
            " file with the name of one class folder a line; '' takes all folders."
        ) from error
    names = [line.strip() for line in lines]
    names = [name for name in names if name and not name.startswith("#")]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        wrong = f"names these twice: {_some(twice)}" if twice else "names no class"
        raise InputError(f"The class list {path} {wrong}. It must name each class folder once.")
    return names


def _some(names: list[str]) -> str:
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
