"""Loads a data set by its name."""

import hashlib
import os
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from layermatch_jax.data.images import (
    Images,
    Source,
    channel_statistics,
    concatenate,
    digest,
    from_array,
    take,
)
from layermatch_jax.data.sources import arrays, folder, tfds_sets
from layermatch_jax.errors import InputError, unknown

__all__ = [
    "LOADERS",
    "Images",
    "Source",
    "channel_statistics",
    "concatenate",
    "digest",
    "drop_test_duplicates",
    "from_array",
    "load",
    "take",
]

# Each takes the data set's settings (config.dataset) and returns a Source.
LOADERS = {
    "cifar10": tfds_sets.load,
    "cifar100": tfds_sets.load,
    "digits": arrays.load_digits,
    "fake": arrays.load_fake,
    "folder": folder.load,
    "npz": arrays.load_npz,
    "stl10": tfds_sets.load,
}
# Settings of folders, with their defaults.
_FOLDER_ALONE = {"class_list": "", "on_broken": "error", "alpha": "white", "cache_dir": ""}
_CHUNK = 256  # images hashed at a time


def load(dataset: ConfigDict) -> Source:
    """Loads the data set that the settings name.

    The order of the images is the same on every call and every machine, because split files store
    positions.

    Args:
      dataset: config.dataset. Read for every set: name (a key of LOADERS), stored_size (side in
        pixels of the stored images, before the crop) and drop_test_duplicates. Read for some:
        data_dir (tfds sets: folder of prepared sets, '' for TFDS_DATA_DIR or tfds's default;
        folder: its root; npz: the file), class_list (folder: file with a class folder on each
        line, '' for all), evaluate_on, on_broken, alpha and cache_dir (folder), num_classes
        (fake).

    Returns:
      A Source. Its pixels are in memory, those of 'folder' in a file. Its notes are for the user.

    Raises:
      InputError: the name or a setting is not allowed, or the data are missing or malformed.
        Reading an image of a folder raises it if the file broke after this call.
    """
    if dataset.name not in LOADERS:
        raise unknown("--config.dataset.name", dataset.name, LOADERS)
    if dataset.stored_size < 1:
        raise InputError(
            f"--config.dataset.stored_size={dataset.stored_size}: allowed are sides of at least"
            " 1 pixel (32 for CIFAR, 96 for STL-10, 256 for ImageNet)."
        )
    dataset = dataset.copy_and_resolve_references()
    for name in ("data_dir", "class_list", "cache_dir"):
        dataset[name] = os.path.expanduser(dataset[name])
    source = LOADERS[dataset.name](dataset)
    if dataset.drop_test_duplicates:
        source, dropped = drop_test_duplicates(source)
        said = f"left out: {dropped:,} unlabeled images that equal a test image"
        source = source._replace(notes=(*source.notes, said))
    if dataset.name != "folder":
        unread = [name for name, value in _FOLDER_ALONE.items() if dataset[name] != value]
        if unread:
            said = f"not used: {', '.join(unread)} (a setting of image folders only)"
            source = source._replace(notes=(*source.notes, said))
    return source


def drop_test_duplicates(source: Source) -> tuple[Source, int]:
    """Drops the extra unlabeled images that have the same pixels as a test image.

    Training images are never dropped, because split files store their positions.

    Returns:
      (the source, the number of dropped images).
    """
    if source.unlabeled is None:
        return source, 0
    test = set(_digests(source.test))
    keep = np.array([digest not in test for digest in _digests(source.unlabeled)], bool)
    unlabeled = take(source.unlabeled, np.flatnonzero(keep))
    return source._replace(unlabeled=unlabeled), int((~keep).sum())


def _digests(images: Images) -> Iterator[bytes]:
    for start in range(0, len(images.labels), _CHUNK):
        stop = min(start + _CHUNK, len(images.labels))
        for image in images.read(np.arange(start, stop)):
            yield hashlib.blake2b(image.tobytes(), digest_size=16).digest()
