"""Data sets that need no download and fit in memory: one's own arrays, digits, made-up images."""

import difflib
import os
import zipfile
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from layermatch_jax.data.images import Source, from_array, resize
from layermatch_jax.errors import InputError

_NPZ_HELP = (
    "Write it with np.savez(path, train_images=..., train_labels=..., test_images=...,"
    " test_labels=...): images uint8 [N, R, R, 3] or [N, R, R], labels integers [N] from 0."
    " Optional: unlabeled_images, class_names."
)
_REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")
_OPTIONAL = ("unlabeled_images", "class_names")
_SHOWN = 5  # absent classes that a message names
_DIGITS_TEST_PER_CLASS = 50
_FAKE_TRAIN, _FAKE_TEST = 400, 100


def load_npz(dataset: ConfigDict) -> Source:
    """Arrays of a .npz file (dataset.data_dir), brought to dataset.stored_size.

    Keys: train_images, test_images and optionally unlabeled_images, uint8 [N, R, R, 3] or
    [N, R, R] (gray, repeated to three channels); train_labels and test_labels, integers [N];
    optionally class_names, strings [classes] (default: '0', '1', ...). Capitals and the spelling
    `unlabelled` count as these keys. What else is in the file is passed over, and a note says so.
    Without class_names every class from 0 to the largest label needs a training image.

    Raises:
      InputError: no such file, or not of this form.
    """
    path = os.path.expanduser(dataset.data_dir)
    if not path or not Path(path).is_file():
        raise InputError(
            f"Data set 'npz': --config.dataset.data_dir={path!r} is not a file. {_NPZ_HELP}"
        )
    data, others = _known_keys(path, _read_npz(path))
    missing = [key for key in _REQUIRED if key not in data]
    if missing:
        there = ", ".join([*data, *others]) or "nothing"
        raise InputError(f"{path} lacks {', '.join(missing)}; it has {there}. {_NPZ_HELP}")
    for part in ("train", "test"):
        _check_images(path, f"{part}_images", data[f"{part}_images"])
        _check_labels(path, part, data[f"{part}_labels"], len(data[f"{part}_images"]))
    if "unlabeled_images" in data:
        _check_images(path, "unlabeled_images", data["unlabeled_images"])

    if "class_names" in data:
        names = tuple(
            name.decode() if isinstance(name, bytes) else str(name)
            for name in data["class_names"].ravel().tolist()
        )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InputError(f"{path}: class_names has these twice: {', '.join(twice)}.")
    else:
        names = _numbered_classes(path, data["train_labels"])
    if len(names) < 2:
        raise InputError(f"{path} has {len(names)} class; it takes two or more. {_NPZ_HELP}")
    for part in ("train", "test"):
        labels = data[f"{part}_labels"]
        if labels.max() >= len(names):
            raise InputError(
                f"{path}: {part}_labels goes up to {labels.max()}, and there are {len(names)}"
                f" classes (by {'class_names' if 'class_names' in data else 'train_labels'}):"
                f" allowed are 0..{len(names) - 1}."
            )

    without = sorted(set(range(len(names))) - set(data["test_labels"].tolist()))
    if without:
        logging.warning("No test images for: %s.", ", ".join(names[c] for c in without[:_SHOWN]))

    def images_of(part, labels):
        pixels, side = data[f"{part}_images"], dataset.stored_size
        if pixels.shape[1] != side:
            logging.info("%s_images: resized from %d to %d pixels.", part, pixels.shape[1], side)
        return from_array(_rgb(resize(pixels, side)), labels)

    return Source(
        class_names=names,
        train=images_of("train", data["train_labels"]),
        unlabeled=images_of("unlabeled", None) if "unlabeled_images" in data else None,
        test=images_of("test", data["test_labels"]),
        notes=(f"{path}: passed over: {', '.join(others)}.",) if others else (),
    )


def load_digits(dataset: ConfigDict) -> Source:
    """scikit-learn's 1,797 hand-written digits of 8x8, as 1,297 training and 500 test images.

    50 test images of each class, at evenly spaced positions of the class: a fixed split, whatever
    the versions. Gray levels 0..16 become 0..255, upsampled (bilinear) to dataset.stored_size.
    """
    import sklearn.datasets  # a second; only the demo needs it

    digits = sklearn.datasets.load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int32)
    in_test = np.zeros(len(labels), bool)
    for c in range(10):
        members = np.flatnonzero(labels == c)
        step = np.arange(_DIGITS_TEST_PER_CLASS) * len(members) // _DIGITS_TEST_PER_CLASS
        in_test[members[step]] = True
    pixels = _rgb(resize(pixels, dataset.stored_size))
    return Source(
        class_names=tuple(str(c) for c in range(10)),
        train=from_array(pixels[~in_test], labels[~in_test]),
        unlabeled=None,
        test=from_array(pixels[in_test], labels[in_test]),
    )


def load_fake(dataset: ConfigDict) -> Source:
    """400 training and 100 test images for tests: colored noise on a 4x4 pattern of the class.

    Deterministic, needs no file; dataset.num_classes (2..100) classes, as equal in size as can be.
    """
    classes, side = dataset.num_classes, dataset.stored_size
    if not 2 <= classes <= _FAKE_TEST:
        raise InputError(
            f"Data set 'fake': --config.dataset.num_classes={classes}, allowed 2..{_FAKE_TEST}."
        )
    rng = np.random.Generator(np.random.Philox(0))
    pattern = rng.random((classes, 4, 4, 3), np.float32)
    cell = np.arange(side) * 4 // side
    pattern = pattern[:, cell][:, :, cell]

    def images_of(count):
        labels = np.arange(count) % classes
        noise = rng.random((count, side, side, 3), np.float32)
        return from_array((255 * (pattern[labels] + noise) / 2).astype(np.uint8), labels)

    names = tuple(f"class {c}" for c in range(classes))
    return Source(names, train=images_of(_FAKE_TRAIN), unlabeled=None, test=images_of(_FAKE_TEST))


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """Uint8 [N, R, R] gray to [N, R, R, 3]; three channels stay as they are."""
    return pixels if pixels.ndim == 4 else np.repeat(pixels[..., None], 3, -1)


def _read_npz(path: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    # AttributeError and TypeError: a .npy file, which is one array and no archive.
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise InputError(f"{path} cannot be read as .npz ({error}). {_NPZ_HELP}") from error


def _known_keys(path: str, data: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays by the names of `load_npz`, and the keys that are none of these.

    Raises:
      InputError: a key is there in two spellings, or seems to be a misspelled one.
    """
    known, others = {}, []
    for key, array in data.items():
        name = key.lower().replace("unlabelled", "unlabeled")
        if name not in _REQUIRED + _OPTIONAL:
            others.append(key)
        elif name in known:
            raise InputError(f"{path} has {name} in two spellings. Keep one. {_NPZ_HELP}")
        else:
            known[name] = array
    absent = [name for name in _REQUIRED + _OPTIONAL if name not in known]
    for key in others:
        for meant in difflib.get_close_matches(key.lower(), absent, n=1, cutoff=0.8):
            raise InputError(
                f"{path} has the key {key!r}, which is none of the data set's. Did you mean"
                f" {meant!r}? Rename it, or take it out. {_NPZ_HELP}"
            )
    return known, others


def _numbered_classes(path: str, labels: np.ndarray) -> tuple[str, ...]:
    """The names '0', '1', ... of the classes in train_labels, of which none may be without images.

    Raises:
      InputError: a number between 0 and the largest label does not occur.
    """
    used, count = np.unique(labels), int(labels.max()) + 1
    if len(used) < count:
        # The beginning suffices: a wrong label may be as large as an int64 can be.
        absent = np.setdiff1d(np.arange(min(count, len(used) + _SHOWN + 1)), used)
        some = ", ".join(map(str, absent[:_SHOWN])) + (" and more" * (count - len(used) > _SHOWN))
        raise InputError(
            f"{path}: train_labels goes from {used[0]} to {used[-1]}, and has no image of {some}."
            " Classes are numbered 0, 1, ... without gaps: write np.unique(labels,"
            " return_inverse=True)[1] for the labels of training and test images together (labels"
            " 1..K become 0..K-1). If a class is meant to have no training image, add class_names,"
            " one for each number."
        )
    return tuple(map(str, range(count)))


def _check_images(path: str, key: str, pixels: np.ndarray) -> None:
    shape = pixels.shape
    square = len(shape) in (3, 4) and shape[1] == shape[2] and shape[3:] in ((), (3,))
    if pixels.dtype != np.uint8 or not square or pixels.size == 0:
        raise InputError(
            f"{path}: {key} is {pixels.dtype} {list(shape)}; it must be uint8 (0..255)"
            " [N, R, R, 3] or [N, R, R], with at least one image, all square and of one size."
        )


def _check_labels(path: str, part: str, labels: np.ndarray, count: int) -> None:
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise InputError(
            f"{path}: {part}_labels is {labels.dtype} {list(labels.shape)}; it must be integers"
            f" [{count}], one for each of {part}_images."
        )
    if labels.min() < 0:
        raise InputError(
            f"{path}: {part}_labels goes down to {labels.min()}; classes count from 0. Images"
            " without a label belong in unlabeled_images."
        )
