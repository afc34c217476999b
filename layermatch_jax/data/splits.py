"""The split into labeled, unlabeled and evaluation images, and the file that stores it.

A split is a function of the data set, the number of labels and the label seed. Its file has a
hash, which shows whether two runs used the same split, and later runs can read it.
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
    # Training images by position, then the source's extra ones. Their labels are true classes, for
    # diagnostics of pseudo-labels only; -1 = unknown, or a labeled image (the model learns its
    # label, so it cannot test pseudo-labels).
    unlabeled: Images
    evaluation: Images
    class_names: tuple[str, ...]
    record: dict  # what labeled_split.json holds: see `partition`


def partition(source: Source, dataset: ConfigDict) -> Partition:
    """Splits a data set into labeled, unlabeled and evaluation images.

    With num_labels, each class gets the same number of labeled images; a remainder of the division
    goes to classes drawn by label_seed, one image each. If num_labels is the number of all training
    images, all are labeled, even if classes differ in size. With label_fraction, each class gets
    this share of its images, rounded half up, at least one. For one label_seed, a split with more
    labels contains each split with fewer.

    evaluate_on='validation' is for design choices, which must not use the test set. It evaluates on
    a fifth of the training images outside the labeled split, drawn by label_seed; these images are
    then not among the unlabeled images, and only the evaluation reads their labels.
    evaluate_on='cross_validation' evaluates on the labeled images, 'none' on no images.

    Args:
      source: the data set.
      dataset: config.dataset. Read: name, num_labels (all classes together), label_fraction (used
        instead when > 0), label_seed, split_file ('' or a file from `write_split`; its split is
        used and must fit the data set and the other settings), labeled_in_unlabeled (whether the
        labeled images are also unlabeled images), evaluate_on.

    Returns:
      A Partition. Its record has data_set (str), num_labels (int), label_seed (int), num_train
      (int, images in source.train), class_counts (list of int, labels of each class), indices (list
      of int, ascending: the labeled positions in source.train), sha256 (see `indices_sha256`),
      labeled_in_unlabeled (bool), evaluate_on (str), num_unlabeled (int), num_evaluation (int).

    Raises:
      InputError: a setting is out of range, a class has too few images, the split file is
        unreadable, altered or does not fit the run, or no unlabeled or validation image is left.
    """
    if dataset.label_seed < 0:
        raise InputError(f"--config.dataset.label_seed={dataset.label_seed}: allowed are 0, 1, ...")
    if dataset.evaluate_on not in (None, "none", "cross_validation", "test", "validation"):
        raise InputError(
            f"--config.dataset.evaluate_on={dataset.evaluate_on!r}: allowed are 'none',"
            " 'cross_validation', 'test' and 'validation'."
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
    elif dataset.evaluate_on == "cross_validation":
        evaluation = take(source.train, indices)
    elif dataset.evaluate_on == "none":
        evaluation = take(source.train, np.arange(0))
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
    """Computes the SHA-256, in hex, of the indices as an ascending JSON list without spaces.

    For [9, 2] it hashes the five bytes `[2,9]`. The same in a shell:
    `jq -cj .indices labeled_split.json | sha256sum`.
    """
    text = json.dumps(sorted(int(i) for i in indices), separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def write_split(record: dict, path: str | epath.Path) -> None:
    """Writes a Partition's record as JSON, one field on each line; `path` may be a gs:// path."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    files.write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _class_counts(source: Source, dataset: ConfigDict) -> np.ndarray:
    """Computes the number of labels of each class: int64 [classes].

    Raises:
      InputError: num_labels or label_fraction is out of range.
    """
    names = source.class_names
    available = np.bincount(source.train.labels, minlength=len(names))
    present = available > 0
    if not present.all():
        absent = [name for name, here in zip(names, present, strict=True) if not here]
        logging.warning("%s: no training image of %s.", dataset.name, ", ".join(absent))
    fraction = dataset.label_fraction
    if not 0 <= fraction <= 1:
        raise InputError(
            f"--config.dataset.label_fraction={fraction}: allowed are 0 < label_fraction <= 1, the"
            " labeled share of each class (0.01 is 1 %), or 0 to use num_labels."
        )
    if fraction > 0:
        return np.maximum(np.floor(fraction * available + 0.5).astype(np.int64), present)
    number = dataset.num_labels
    classes = int(present.sum())
    if not classes <= number <= available.sum():
        raise InputError(
            f"--config.dataset.num_labels={number}: this number is for all {classes} classes"
            f" together, and each class needs at least one label. {_allowed_numbers(available)}"
        )
    if number == available.sum():  # all images, even if the classes differ in size
        return available
    each, rest = divmod(number, classes)
    counts = np.where(present, each, 0)
    order = np.argsort(
        _draws(dataset.name, dataset.label_seed, _CLASSES, len(names)), kind="stable"
    )
    counts[order[present[order]][:rest]] += 1
    return counts


def _allowed_numbers(available: np.ndarray) -> str:
    """Says which num_labels are possible with classes of these sizes, in a sentence."""
    sizes = available[available > 0]
    fewest, equal, total = len(sizes), len(sizes) * sizes.min(), sizes.sum()
    if equal == total:
        return f"Allowed are {fewest}..{total} (the number of training images)."
    smallest = f"the smallest class has {sizes.min()} images"
    return f"Allowed are {fewest}..{equal} ({smallest}) and {total} (all training images)."


def _draw(source: Source, counts: np.ndarray, name: str, seed: int) -> np.ndarray:
    """Draws counts[c] training images of each class c; ascending int64 [sum of counts]."""
    labels, names = source.train.labels, source.class_names
    available = np.bincount(labels, minlength=len(names))
    if (short := np.flatnonzero(available < counts)).size:
        c = short[0]
        raise InputError(
            f"Data set {name!r}: class {names[c]!r} has {available[c]} training images, but needs"
            f" {counts[c]}: the classes share --config.dataset.num_labels={counts.sum()} equally."
            f" {_allowed_numbers(available)} Or add images of the class, or use"
            " --config.dataset.label_fraction, which takes a share of each class."
        )
    draws, chosen = _draws(name, seed, _IMAGES, len(labels)), []
    for c, count in enumerate(counts):
        members = np.flatnonzero(labels == c)
        chosen.append(members[np.argsort(draws[members], kind="stable")[:count]])
    return np.sort(np.concatenate(chosen))


def _draw_validation(total: int, labeled: np.ndarray, name: str, seed: int) -> np.ndarray:
    """Draws a fifth of the positions 0..total-1 outside the labeled ones; ascending."""
    pool = np.setdiff1d(np.arange(total), labeled)
    count = int(VALIDATION_SHARE * len(pool) + 0.5)
    if count == 0:
        raise InputError(
            f"--config.dataset.evaluate_on='validation': only {len(pool)} of {total} training"
            f" images are not labeled, too few to take {VALIDATION_SHARE:.0%} of them for"
            " validation. Lower --config.dataset.num_labels (or label_fraction)."
        )
    draws = _draws(name, seed, _VALIDATION, total)[pool]
    return np.sort(pool[np.argsort(draws, kind="stable")[:count]])


def _draws(name: str, seed: int, stream: int, size: int) -> np.ndarray:
    """Draws random numbers, uint64 [size]; their ranks give a random order.

    NumPy guarantees that SeedSequence and the raw output of a bit generator never change; the
    methods of Generator (permutation, choice) may change between versions.
    """
    data_set = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    sequence = np.random.SeedSequence((int(seed), data_set, stream))
    return np.random.Philox(sequence).random_raw(size)


def _read_split(path: str, source: Source, dataset: ConfigDict, count: int) -> np.ndarray:
    """Reads and checks the indices of a split file; ascending int64 [count]."""

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
        raise refuse("has indices that are not a list of whole numbers. Use the original file.")
    expected = indices_sha256(indices)
    if record["sha256"] != expected:
        raise refuse(
            f"has sha256 {record['sha256']}, but the hash of its indices is {expected}: it was"
            " altered or cut off. Use the original file; if you changed the indices on purpose, set"
            " sha256 to the second value."
        )
    total = len(source.train.labels)
    outside = [i for i in indices if not 0 <= i < total]
    if outside or len(set(indices)) < len(indices):
        wrong = f"index {outside[0]}" if outside else "an index twice"
        raise refuse(
            f"has {wrong}; allowed are 0..{total - 1}, each at most once: data set"
            f" {dataset.name!r} has {total} training images."
        )

    # Compare the file's description of the split with the run's settings. A file written by hand
    # may lack some of these fields.
    settings = {
        "data_set": (dataset.name, "use a split file of this data set, or change dataset.name"),
        "num_train": (total, "its positions would mean different images, so use the same data"),
        "label_seed": (dataset.label_seed, "set --config.dataset.label_seed to the file's"),
    }
    for key, (here, mend) in settings.items():
        if record.get(key) is not None and record[key] != here:
            raise refuse(f"has {key} {record[key]!r}, but this run has {here!r}: {mend}.")
    if len(indices) != count:
        raise refuse(
            f"has {len(indices)} labels, but the settings ask for {count}: set"
            f" --config.dataset.num_labels={len(indices)} and --config.dataset.label_fraction=0,"
            " or use another file."
        )
    indices = np.sort(np.array(indices, np.int64))
    counts = np.bincount(source.train.labels[indices], minlength=len(source.class_names)).tolist()
    if record.get("class_counts") not in (None, counts):
        raise refuse(
            f"has class_counts {record['class_counts']}, but the images at its positions give"
            f" {counts}. The split was made from different training images (another order or"
            " another class list): use the same data."
        )
    for c in set(source.train.labels) - set(source.train.labels[indices]):
        name = source.class_names[c]
        raise refuse(
            f"has no label of class {name!r}; every class with training images needs one. Use"
            " another file."
        )
    return indices
