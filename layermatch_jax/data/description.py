"""data.json: a description of a run's data set, and the check that the data set is unchanged.

Without the check, a renamed class or replaced images would cause no error: predictions would get
wrong class names, and a resumed run would train on mixed classes.
"""

import hashlib
import os
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from layermatch_jax.data.images import Images, Source, wants_test_images
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import files
from layermatch_jax.runtime import workdir as workdir_lib

FILE = workdir_lib.DATA
_CONTENTS = 256  # images of each part, evenly spaced, whose content is hashed
_SHOWN = 5  # class names in a message


def describe(source: Source, dataset: ConfigDict, statistics: tuple) -> dict[str, Any]:
    """Describes a data set for data.json.

    The description does not depend on the location of the data, so the data may be moved.

    Args:
      source: the data set.
      dataset: config.dataset. Read: name, stored_size and evaluate_on.
      statistics: (mean, standard deviation) from `channel_statistics`.

    Returns:
      A dictionary for JSON: data_set (str), class_names (list of str), channel_mean and channel_std
      (three floats each, white is 1), stored_size (pixels), and train, unlabeled and test. Each of
      these three is None if the data set has no such part (test also with
      another evaluate_on than 'test'), else a dictionary: images (int, their number) and three
      SHA-256 in hex. labels_sha256 hashes the labels (int32, little-endian); names_sha256 hashes
      the paths below the root and the sizes in bytes of all files (None if they are not files);
      content_sha256 hashes at most 256 evenly spaced images: the bytes of their files or, without
      files, their stored pixels.

    Raises:
      InputError: an image file cannot be read; the message names it.
    """
    mean, std = statistics
    parts = {"train": source.train, "unlabeled": source.unlabeled, "test": source.test}
    if not wants_test_images(dataset):
        parts["test"] = None
    of_files = [part for part in parts.values() if part and part.files is not None]
    paths = [path for part in of_files for path in part.files]
    # Paths are hashed below their common folder, so that the data set can be moved.
    root = os.path.commonpath(paths) if paths else ""
    return {
        "data_set": dataset.name,
        "class_names": list(source.class_names),
        "channel_mean": list(mean),
        "channel_std": list(std),
        "stored_size": dataset.stored_size,
        **{name: part and _part(part, root) for name, part in parts.items()},
    }


def check(workdir: epath.Path, now: dict[str, Any]) -> None:
    """Checks that a run's data set is the one that the run started with.

    If earlier versions made the run, data.json is missing, and the check only logs a warning.

    Args:
      workdir: the run's folder; without a run in it, nothing is compared.
      now: the present data set, from `describe`.

    Raises:
      InputError: the data sets differ (the message says in what), or data.json is damaged.
    """
    before = read(workdir)
    if before is None:
        if (workdir / workdir_lib.CONFIG).exists():
            logging.warning(
                "%s has no %s (earlier versions did not write it), so the program cannot check"
                " whether the run's data set is unchanged.",
                workdir,
                FILE,
            )
        return
    if differences := _differences(before, now):
        raise InputError(
            f"The run in {workdir} started with different data:\n"
            + "\n".join(f"  {difference}" for difference in differences)
            + "\nTo open or resume the run, restore the data set; to start a new run, choose"
            " another --workdir."
        )


def write(workdir: epath.Path, description: dict[str, Any]) -> None:
    """Writes data.json; an existing one stays, because it describes the start of the run."""
    if not (workdir / FILE).exists():
        files.write_json(workdir / FILE, description)


def read(workdir: epath.Path) -> dict[str, Any] | None:
    """Reads data.json (see `describe`); returns None if the file does not exist.

    Raises:
      InputError: the file is damaged.
    """
    path = workdir / FILE
    if not path.exists():
        return None
    mend = (
        "Delete it to skip the comparison with the original data set; the next start of training"
        " writes a new one."
    )
    content = files.read_json(path, mend)
    keys = {"class_names", "channel_mean", "channel_std", "train", "unlabeled", "test"}
    if not isinstance(content, dict) or keys - content.keys():
        raise InputError(f"{path} is damaged: it lacks some of {', '.join(sorted(keys))}. {mend}")
    return content


def statistics(description: dict[str, Any]) -> tuple:
    """Returns the channels' (mean, standard deviation) from a description."""
    return tuple(description["channel_mean"]), tuple(description["channel_std"])


def _part(images: Images, root: str) -> dict[str, Any]:
    count = len(images.labels)
    some = np.arange(min(count, _CONTENTS)) * count // max(min(count, _CONTENTS), 1)
    names, content = None, hashlib.sha256()
    if images.files is None:
        for position in some:  # one image at a time
            content.update(images.read(np.array([position])).tobytes())
    else:
        names = hashlib.sha256()
        start = len(os.path.join(root, ""))
        for path in images.files:
            below = os.fsencode(path[start:]).replace(os.sep.encode(), b"/")
            names.update(b"%s\0%d\0" % (below, _read(path, os.path.getsize)))
        for path in images.files[some]:
            content.update(_read(path, _sha256))
    return {
        "images": count,
        "labels_sha256": hashlib.sha256(images.labels.astype("<i4").tobytes()).hexdigest(),
        "names_sha256": names and names.hexdigest(),
        "content_sha256": content.hexdigest(),
    }


def _sha256(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _read(path: str, what):
    try:
        return what(path)
    except OSError as error:
        raise InputError(
            f"Cannot read the image {path} ({error.strerror}). Restore the file and start again."
        ) from error


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describes each difference of two descriptions in a sentence; [] if they agree."""
    found = []
    old, new = before["class_names"], now["class_names"]
    gone, added = (_some(set(a) - set(b)) for a, b in ((old, new), (new, old)))
    if gone or added:
        told = [gone and f"missing: {gone}", added and f"new: {added}"]
        found.append(
            f"classes: {'; '.join(filter(None, told))} (a renamed class counts as a new one)"
        )
    elif old != new:
        found.append(f"classes: their order differs (before: {_some(old)}; now: {_some(new)})")
    for name in ("train", "unlabeled", "test"):
        if what := _part_differs(before[name], now[name]):
            found.append(f"{name}: {what}")
    return found


def _part_differs(before: dict[str, Any] | None, now: dict[str, Any] | None) -> str | None:
    counts = [part["images"] if part else 0 for part in (before, now)]
    if counts[0] != counts[1]:
        return f"{counts[0]} images before, {counts[1]} now"
    if before is None or now is None:  # neither has this part
        return None
    if before["labels_sha256"] != now["labels_sha256"]:
        return "the same number of images with different labels"
    if before["names_sha256"] != now["names_sha256"]:
        return "the same number of images; their files have different names or sizes"
    if before["content_sha256"] != now["content_sha256"]:
        return "the same number of images with different content"
    return None


def _some(names) -> str:
    names = sorted(names) if isinstance(names, set) else list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
