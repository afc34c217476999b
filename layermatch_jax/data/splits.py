"""Which images are labeled, unlabeled and for evaluation: the split, and the file it is kept in.

A split is a function of (data set, number of labels, label seed) alone. It is written down with a
hash, so that two runs can be seen to have used the same one, and can be read back from its file.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from layermatch_jax.data.images import Images, Source, concatenate, take
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import files

VALIDATION_SHARE = 0.2  # of the training images outside the labeled split

# Independent streams of random numbers: the last word of the generator's key.
_IMAGES, _CLASSES, _VALIDATION = range(3)


class Partition(NamedTuple):
    """The images of a run, by use."""

    labeled: Images
    # Training images by position, then the source's extra ones. Labels are the truth, by which
    # diagnostics test pseudo-labels; -1 where it is not known, and for the labeled images: the
    # model is taught their labels, so they are no test.
    unlabeled: Images
    evaluation: Images
    class_names: tuple[str, ...]
    record: dict  # what labeled_split.json holds: see `partition`


def partition(source: Source, dataset: ConfigDict) -> Partition:
    """Splits a data set as the settings say.

    The labeled images are drawn class by class, equally many of each; what is left over of a
    number that the classes do not divide goes one each to classes drawn by label_seed. If the
    number is that of all training images, all are labeled, however uneven the classes are. With
    label_fraction it is that share of each class, rounded half up, at least one image. For one
    label_seed, the split with fewer labels is part of the one with more.

    evaluate_on='validation' evaluates on a fifth of the training images outside the labeled split
    (drawn by label_seed), which then are not unlabeled images either: for choices of design,
    which must not see the test set. Their labels serve that choice alone.

    Args:
      source: the data set.
      dataset: config.dataset. Read: name, num_labels (all classes together), label_fraction (used
        instead when > 0), label_seed, split_file ('' or a file that `write_split` wrote: its
        split, if it is the data set's and agrees with the other settings), labeled_in_unlabeled
        (whether the labeled images are unlabeled ones as well), evaluate_on ('test' or
        'validation').

    Returns:
      A Partition. Its record: data_set (str), num_labels (int), label_seed (int), num_train (int,
      images in source.train), class_counts (list of int, labels of each class), indices (list of
      int, ascending: the labeled positions in source.train), sha256 (see `indices_sha256`),
      labeled_in_unlabeled (bool), evaluate_on (str), num_unlabeled (int), num_evaluation (int).

    Raises:
      InputError: a setting is out of range, a class has too few images, the split file is
        unreadable, altered or of something else, or no unlabeled or validation image is left.
    """
    if dataset.label_seed < 0:
        raise InputError(f"--config.dataset.label_seed={dataset.label_seed}: allowed are 0, 1, ...")
    if dataset.evaluate_on not in ("test", "validation"):
        raise InputError(
            f"--config.dataset.evaluate_on={dataset.evaluate_on!r}: allowed are 'test' and"
            " 'validation'."
        )
    counts = _class_counts(source, dataset)
    if dataset.split_file:
        path = os.path.expanduser(dataset.split_file)
        indices = _read_split(path, source, dataset, int(counts.sum()))
    else:
        indices = _draw(source, counts, dataset.name, dataset.label_seed)

    total = len(source.train.labels)
    in_unlabeled = np.ones(total, bool)
    evaluation = source.test
    if dataset.evaluate_on == "validation":
        chosen = _draw_validation(total, indices, dataset.name, dataset.label_seed)
        evaluation = take(source.train, chosen)
        in_unlabeled[chosen] = False
    if not dataset.labeled_in_unlabeled:
        in_unlabeled[indices] = False
    truths = source.train.labels.copy()
    truths[indices] = -1  # see Partition.unlabeled
    unlabeled = take(source.train._replace(labels=truths), np.flatnonzero(in_unlabeled))
    if source.unlabeled is not None:
        unlabeled = concatenate(unlabeled, source.unlabeled)
    if len(unlabeled.labels) == 0:
        raise InputError(
            f"No unlabeled image is left: {len(indices)} of the {total} training images are"
            " labeled. Lower --config.dataset.num_labels (or label_fraction), or set"
            " --config.dataset.labeled_in_unlabeled=True."
        )

    labels = source.train.labels[indices]
    record = {
        "data_set": dataset.name,
        "num_labels": len(indices),
        "label_seed": int(dataset.label_seed),
        "num_train": total,
        "class_counts": np.bincount(labels, minlength=len(source.class_names)).tolist(),
        "sha256": indices_sha256(indices),
        "labeled_in_unlabeled": bool(dataset.labeled_in_unlabeled),
        "evaluate_on": dataset.evaluate_on,
        "num_unlabeled": len(unlabeled.labels),
        "num_evaluation": len(evaluation.labels),
        "indices": indices.tolist(),
    }
    return Partition(take(source.train, indices), unlabeled, evaluation, source.class_names, record)


def indices_sha256(indices: Sequence[int] | np.ndarray) -> str:
    """The SHA-256, in hex, of the indices as an ascending JSON list without spaces, in ASCII.

    For [9, 2] it is that of the five bytes `[2,9]`. From a split file, without Python:
    `jq -cj .indices labeled_split.json | sha256sum`.
    """
    text = json.dumps(sorted(int(i) for i in indices), separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def write_split(record: dict, path: str | epath.Path) -> None:
    """Writes a Partition's record as a JSON object, one field a line; `path` may be a gs:// one."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    files.write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _class_counts(source: Source, dataset: ConfigDict) -> np.ndarray:
    """How many labels each class is to get: int64 [classes]. InputError if out of range."""
    names = source.class_names
    available = np.bincount(source.train.labels, minlength=len(names))
    present = available > 0
    if not present.all():
        absent = [name for name, here in zip(names, present, strict=True) if not here]
        logging.warning("%s: no training image of %s.", dataset.name, ", ".join(absent))
    fraction = dataset.label_fraction
    if not 0 <= fraction <= 1:
        raise InputError(
            f"--config.dataset.label_fraction={fraction}: it is the labeled share of each class,"
            " allowed are 0 < label_fraction <= 1 (0.01 is 1 %), or 0 to use num_labels."
        )
    if fraction > 0:
        return np.maximum(np.floor(fraction * available + 0.5).astype(np.int64), present)
    number = dataset.num_labels
    classes = int(present.sum())
    if not classes <= number <= available.sum():
        raise InputError(
            f"--config.dataset.num_labels={number}: it counts the labels of all {classes}"
            f" classes together, and each needs at least one. {_allowed_numbers(available)}"
        )
    if number == available.sum():  # all of them, even where equal shares would not fit
        return available
    each, rest = divmod(number, classes)
    counts = np.where(present, each, 0)
    order = np.argsort(
        _draws(dataset.name, dataset.label_seed, _CLASSES, len(names)), kind="stable"
    )
    counts[order[present[order]][:rest]] += 1
    return counts


def _allowed_numbers(available: np.ndarray) -> str:
    """Which num_labels can be drawn from classes of these sizes, as a sentence."""
    sizes = available[available > 0]
    fewest, equal, total = len(sizes), len(sizes) * sizes.min(), sizes.sum()
    if equal == total:
        return f"Allowed are {fewest}..{total} (the number of training images)."
    smallest = f"the smallest class has {sizes.min()} images"
    return f"Allowed are {fewest}..{equal} ({smallest}) and {total} (all training images)."


def _draw(source: Source, counts: np.ndarray, name: str, seed: int) -> np.ndarray:
    """counts[c] positions of each class c in source.train, ascending: int64 [sum of counts]."""
    labels, names = source.train.labels, source.class_names
    available = np.bincount(labels, minlength=len(names))
    if (short := np.flatnonzero(available < counts)).size:
        c = short[0]
        raise InputError(
            f"Data set {name!r}: class {names[c]!r} has {available[c]} training images, and"
            f" {counts[c]} of them were to be labeled: the classes share"
            f" --config.dataset.num_labels={counts.sum()} equally. {_allowed_numbers(available)} Or"
            " add images of the class, or use --config.dataset.label_fraction, which takes a share"
            " of each class."
        )
    draws, chosen = _draws(name, seed, _IMAGES, len(labels)), []
    for c, count in enumerate(counts):
        members = np.flatnonzero(labels == c)
        chosen.append(members[np.argsort(draws[members], kind="stable")[:count]])
    return np.sort(np.concatenate(chosen))


def _draw_validation(total: int, labeled: np.ndarray, name: str, seed: int) -> np.ndarray:
    """A fifth of the positions 0..total-1 outside the labeled ones, ascending."""
    pool = np.setdiff1d(np.arange(total), labeled)
    count = int(VALIDATION_SHARE * len(pool) + 0.5)
    if count == 0:
        raise InputError(
            f"--config.dataset.evaluate_on='validation': of {total} training images, {len(pool)}"
            f" are outside the labeled split, too few to set {VALIDATION_SHARE:.0%} of them"
            " aside. Lower --config.dataset.num_labels (or label_fraction)."
        )
    draws = _draws(name, seed, _VALIDATION, total)[pool]
    return np.sort(pool[np.argsort(draws, kind="stable")[:count]])


def _draws(name: str, seed: int, stream: int, size: int) -> np.ndarray:
    """Uint64 [size], to rank things by.

    NumPy promises that the raw output of a bit generator and SeedSequence never change; the
    methods of Generator (permutation, choice) may change between its versions.
    """
    data_set = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    sequence = np.random.SeedSequence((int(seed), data_set, stream))
    return np.random.Philox(sequence).random_raw(size)


def _read_split(path: str, source: Source, dataset: ConfigDict, count: int) -> np.ndarray:
    """The checked indices of a split file, ascending: int64 [count]."""

    def refuse(what: str) -> InputError:
        return InputError(f"The split file {path} {what}")

    try:
        record = json.loads(epath.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise refuse(
            f"cannot be read ({error}). --config.dataset.split_file takes the labeled_split.json"
            " of an earlier run, or '' to draw a split."
        ) from error
    record = record if isinstance(record, dict) else {}
    missing = [key for key in ("data_set", "sha256", "indices") if key not in record]
    if missing:
        raise refuse(
            f"lacks {', '.join(missing)}. It must be a JSON object with at least data_set (text),"
            " indices (list of positions in the training images) and sha256 (see"
            " splits.indices_sha256)."
        )
    indices = record["indices"]
    if not isinstance(indices, list) or not all(type(i) is int for i in indices):
        raise refuse("has indices that are no list of whole numbers.")
    expected = indices_sha256(indices)
    if record["sha256"] != expected:
        raise refuse(
            f"has sha256 {record['sha256']}, and its indices have {expected}: it was altered or cut"
            " off. Take the file as the run wrote it; if the change is meant, put the second"
            " value in."
        )
    total = len(source.train.labels)
    outside = [i for i in indices if not 0 <= i < total]
    if outside or len(set(indices)) < len(indices):
        wrong = f"index {outside[0]}" if outside else "an index twice"
        raise refuse(
            f"has {wrong}; allowed are 0..{total - 1}, each once: data set {dataset.name!r} has"
            f" {total} training images here."
        )

    # What the file says of itself, against what the run is asked to do. A field may be absent from
    # a file that was written by hand.
    settings = {
        "data_set": (dataset.name, "give the data set's own split file, or set dataset.name"),
        "num_train": (total, "the positions mean other images there: take the same data"),
        "label_seed": (dataset.label_seed, "set --config.dataset.label_seed to the file's"),
    }
    for key, (here, mend) in settings.items():
        if record.get(key) is not None and record[key] != here:
            raise refuse(f"is of {key} {record[key]!r}, and this run has {here!r}: {mend}.")
    if len(indices) != count:
        raise refuse(
            f"has {len(indices)} labels, and the settings ask for {count}: set"
            f" --config.dataset.num_labels={len(indices)} and --config.dataset.label_fraction=0,"
            " or take another file."
        )
    indices = np.sort(np.array(indices, np.int64))
    counts = np.bincount(source.train.labels[indices], minlength=len(source.class_names)).tolist()
    if record.get("class_counts") not in (None, counts):
        raise refuse(
            f"says it has {record['class_counts']} labels of the classes; at these positions there"
            f" are {counts}. The training images are not those it was made from (another order or"
            " another class list): take the same data."
        )
    for c in set(source.train.labels) - set(source.train.labels[indices]):
        name = source.class_names[c]
        raise refuse(f"has no label of class {name!r}; every class that has images needs one.")
    return indices
