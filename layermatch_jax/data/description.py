"""data.json: what the data set of a run was, and whether it is still the same.

A run is a function of its data. Where a class was renamed or images were replaced, a model's
outputs would be given wrong names and training would go on with mixed classes, without an error.
"""

import hashlib
import os
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from layermatch_jax.data.images import Images, Source
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import files
from layermatch_jax.runtime import workdir as workdir_lib

FILE = workdir_lib.DATA
_CONTENTS = 256  # images of a part whose content is compared, evenly spaced
_SHOWN = 5  # class names in a message


def describe(source: Source, dataset: ConfigDict, statistics: tuple) -> dict[str, Any]:
    """What is kept of a data set.

    Nothing in it depends on where the data lie, so they may be moved.

    Args:
      source: the data set.
      dataset: config.dataset. Read: name, stored_size and evaluate_on.
      statistics: of `channel_statistics`.

    Returns:
      A dictionary for JSON: data_set (str), class_names (list of str), channel_mean and channel_std
      (three floats each, white is 1), stored_size (pixels), and train, unlabeled and test: None
      where there is no such part (or no test image is used: evaluate_on='validation'), else
      images (int, how many), and three SHA-256 in hex: labels_sha256 (int32, little-endian),
      names_sha256 (paths below the set's root and sizes in bytes of all files; null where images
      are no files) and content_sha256 (of at most 256 evenly spaced images: the bytes of their
      files, or else their stored pixels).

    Raises:
      InputError: an image file cannot be read; names it.
    """
    mean, std = statistics
    parts = {"train": source.train, "unlabeled": source.unlabeled, "test": source.test}
    if dataset.evaluate_on == "validation":
        parts["test"] = None
    of_files = [part for part in parts.values() if part and part.files is not None]
    paths = [path for part in of_files for path in part.files]
    # Of paths below one root, the common part moves along with the root.
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
    """Refuses to open a run with other data than it was begun with.

    A run of an earlier version, which kept no data.json, is accepted with a warning.

    Args:
      workdir: the run's folder; nothing is compared where it holds no run yet.
      now: of `describe`.

    Raises:
      InputError: says what differs; or data.json is damaged.
    """
    before = read(workdir)
    if before is None:
        if (workdir / workdir_lib.CONFIG).exists():
            logging.warning(
                "%s holds no %s, which earlier versions did not write: whether the run's data set"
                " is still the same could not be checked.",
                workdir,
                FILE,
            )
        return
    if differences := _differences(before, now):
        raise InputError(
            f"{workdir} holds a run on other data:\n"
            + "\n".join(f"  {difference}" for difference in differences)
            + "\nBring the data set back to what it was to open the run or to go on with it, or"
            " take another --workdir to start anew."
        )


def write(workdir: epath.Path, description: dict[str, Any]) -> None:
    """Writes data.json, unless there is one: it stays as the run was begun."""
    if not (workdir / FILE).exists():
        files.write_json(workdir / FILE, description)


def read(workdir: epath.Path) -> dict[str, Any] | None:
    """What data.json holds (see `describe`); None if there is none.

    Raises:
      InputError: the file is damaged.
    """
    path = workdir / FILE
    if not path.exists():
        return None
    mend = (
        "Delete it to go on without the comparison of the data set with what it was: the next"
        " start of training writes it anew."
    )
    content = files.read_json(path, mend)
    keys = {"class_names", "channel_mean", "channel_std", "train", "unlabeled", "test"}
    if not isinstance(content, dict) or keys - content.keys():
        raise InputError(f"{path} is damaged: it lacks some of {', '.join(sorted(keys))}. {mend}")
    return content


def statistics(description: dict[str, Any]) -> tuple:
    """The (mean, standard deviation) of `channel_statistics` in what `read` returns."""
    return tuple(description["channel_mean"]), tuple(description["channel_std"])


def _part(images: Images, root: str) -> dict[str, Any]:
    count = len(images.labels)
    some = np.arange(min(count, _CONTENTS)) * count // max(min(count, _CONTENTS), 1)
    names, content = None, hashlib.sha256()
    if images.files is None:
        for position in some:  # one by one: equal, however the reading is cut up
            content.update(images.read(np.array([position])).tobytes())
    else:
        names = hashlib.sha256()
        for path in images.files:
            below = os.fsencode(os.path.relpath(path, root)).replace(os.sep.encode(), b"/")
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
            f"Cannot read the image {path} ({error.strerror}). Was it removed a moment ago?"
        ) from error


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Sentences that say what differs; none for the same data."""
    found = []
    old, new = before["class_names"], now["class_names"]
    gone, added = (_some(set(a) - set(b)) for a, b in ((old, new), (new, old)))
    if gone or added:
        told = [gone and f"no longer there: {gone}", added and f"new: {added}"]
        found.append(f"classes: {'; '.join(filter(None, told))} (a renamed class is another one)")
    elif old != new:
        found.append(f"classes: in another order (before: {_some(old)}; now: {_some(new)})")
    for name in ("train", "unlabeled", "test"):
        if what := _part_differs(before[name], now[name]):
            found.append(f"{name}: {what}")
    return found


def _part_differs(before: dict[str, Any] | None, now: dict[str, Any] | None) -> str | None:
    counts = [part["images"] if part else 0 for part in (before, now)]
    if counts[0] != counts[1]:
        return f"{counts[0]} images before, {counts[1]} now"
    if before is None or now is None:  # none is none
        return None
    if before["labels_sha256"] != now["labels_sha256"]:
        return "the same number of images, but other labels"
    if before["names_sha256"] != now["names_sha256"]:
        return "the same number of images, but files of other names or sizes"
    if before["content_sha256"] != now["content_sha256"]:
        return "the same number of images, but others (their content differs)"
    return None


def _some(names) -> str:
    names = sorted(names) if isinstance(names, set) else list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
