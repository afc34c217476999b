"""From the name of a data set to its images: the one entrance of the data wing."""

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
_FOLDER_ALONE = {"class_list": "", "on_broken": "error", "alpha": "white"}  # and the defaults
_CHUNK = 256  # images hashed at a time


def load(dataset: ConfigDict) -> Source:
    """The data set that the settings name.

    The order of the images is the same on every call and every machine, so positions in it can be
    written down (splits.py does).

    Args:
      dataset: config.dataset. Read for every set: name (a key of LOADERS), stored_size (side in
        pixels to which images are brought and at which they are kept, before the crop) and
        drop_test_duplicates. Read by some: data_dir (tfds sets: folder of prepared sets, '' for
        TFDS_DATA_DIR or tfds's default; folder: its root; npz: the file), class_list (folder:
        file with one class folder a line, '' for all), evaluate_on, on_broken and alpha (folder),
        num_classes (fake).

    Returns:
      A Source; the pixels of all but 'folder' are in memory. What the user should know of the data
      is in its notes.

    Raises:
      InputError: the name or a setting is not allowed, or the data are missing or malformed. The
        message says how to mend it. An image of a folder that breaks later raises when it is read.
    """
    if dataset.name not in LOADERS:
        raise unknown("--config.dataset.name", dataset.name, LOADERS)
    if dataset.stored_size < 1:
        raise InputError(
            f"--config.dataset.stored_size={dataset.stored_size}: images need a side of at least"
            " 1 pixel (32 for CIFAR, 96 for STL-10, 256 for ImageNet)."
        )
    dataset = dataset.copy_and_resolve_references()
    for name in ("data_dir", "class_list"):
        dataset[name] = os.path.expanduser(dataset[name])
    source = LOADERS[dataset.name](dataset)
    if dataset.drop_test_duplicates:
        source, dropped = drop_test_duplicates(source)
        said = f"left out: {dropped:,} unlabeled images that equal a test image"
        source = source._replace(notes=(*source.notes, said))
    if dataset.name != "folder":
        unread = [name for name, value in _FOLDER_ALONE.items() if dataset[name] != value]
        if unread:
            said = f"only an image folder has these settings: {', '.join(unread)}; not used"
            source = source._replace(notes=(*source.notes, said))
    return source


def drop_test_duplicates(source: Source) -> tuple[Source, int]:
    """Without those of the extra unlabeled images whose pixels equal a test image's.

    Labeled training images stay: their positions are what a split file is made of.

    Returns:
      (the source, how many were dropped).
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
