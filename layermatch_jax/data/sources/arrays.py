"""Data sets in memory that need no download: an .npz file, digits, synthetic images."""

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
_SHOWN = 5  # absent classes in a message
_DIGITS_TEST_PER_CLASS = 50
_FAKE_TRAIN, _FAKE_TEST = 400, 100


def load_npz(dataset: ConfigDict) -> Source:
    """Loads the arrays of an .npz file (dataset.data_dir), resized to dataset.stored_size.

    Keys: train_images, test_images and optionally unlabeled_images, uint8 [N, R, R, 3] or
    [N, R, R] (gray, repeated to three channels); train_labels and test_labels, integers [N];
    optionally class_names, strings [classes] (default: '0', '1', ...). Case does not matter in
    keys, and `unlabelled` is accepted for `unlabeled`. Other keys are ignored, and a note names
    them. Without class_names every class from 0 to the largest label needs a training image.

    Raises:
      InputError: the file does not exist or does not have this form.
    """
    path = os.path.expanduser(dataset.data_dir)
    if not path or not Path(path).is_file():
        raise InputError(
            f"Data set 'npz': --config.dataset.data_dir={path!r} is not a file. {_NPZ_HELP}"
        )
    data, others = _known_keys(path, _read_npz(path))
    missing = [key for key in _REQUIRED if key not in data]
    if missing:
        there = ", ".join([*data, *others]) or "none"
        raise InputError(
            f"{path} lacks the keys {', '.join(missing)}; its keys are: {there}. {_NPZ_HELP}"
        )
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
            raise InputError(
                f"{path}: class_names repeats {', '.join(twice)}. Every class needs its own name."
            )
    else:
        names = _numbered_classes(path, data["train_labels"])
    if len(names) < 2:
        raise InputError(f"{path} has fewer than two classes ({len(names)}). {_NPZ_HELP}")
    for part in ("train", "test"):
        labels = data[f"{part}_labels"]
        if labels.max() >= len(names):
            raise InputError(
                f"{path}: {part}_labels goes up to {labels.max()}, but there are {len(names)}"
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
        notes=(f"{path}: keys that are not used: {', '.join(others)}.",) if others else (),
    )


def load_digits(dataset: ConfigDict) -> Source:
    """Loads scikit-learn's 1,797 handwritten digits of 8x8 pixels: 1,297 training, 500 test images.

    The test images are 50 of each class, evenly spaced, so the split is the same for all versions.
    Gray levels 0..16 become 0..255; images are resized (bilinear) to dataset.stored_size.
    """
    import sklearn.datasets  # takes a second, so only where it is needed

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
    """Makes 400 training and 100 test images for tests: colored noise on a 4x4 pattern per class.

    Deterministic, without a file. There are dataset.num_classes (2..100) classes; their sizes
    differ by at most one.
    """
    classes, side = dataset.num_classes, dataset.stored_size
    if not 2 <= classes <= _FAKE_TEST:
        raise InputError(
            f"Data set 'fake': --config.dataset.num_classes={classes}: allowed are 2..{_FAKE_TEST}."
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
    """Repeats gray, uint8 [N, R, R], to [N, R, R, 3]; does not change three channels."""
    return pixels if pixels.ndim == 4 else np.repeat(pixels[..., None], 3, -1)


def _read_npz(path: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    # AttributeError and TypeError come from a .npy file, which is an array and not an archive.
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise InputError(f"{path} cannot be read as an .npz file ({error}). {_NPZ_HELP}") from error


def _known_keys(path: str, data: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the arrays by the keys of `load_npz`, and a list of all other keys.

    Raises:
      InputError: a key occurs in two spellings, or another key seems to be a misspelling.
    """
    known, others = {}, []
    for key, array in data.items():
        name = key.lower().replace("unlabelled", "unlabeled")
        if name not in _REQUIRED + _OPTIONAL:
            others.append(key)
        elif name in known:
            raise InputError(f"{path} has the key {name} in two spellings. Keep one. {_NPZ_HELP}")
        else:
            known[name] = array
    absent = [name for name in _REQUIRED + _OPTIONAL if name not in known]
    for key in others:
        for meant in difflib.get_close_matches(key.lower(), absent, n=1, cutoff=0.8):
            raise InputError(
                f"{path} has the unknown key {key!r}. Did you mean {meant!r}? Rename or remove the"
                f" key. {_NPZ_HELP}"
            )
    return known, others


def _numbered_classes(path: str, labels: np.ndarray) -> tuple[str, ...]:
    """Returns the class names '0', '1', ... up to the largest label.

    Raises:
      InputError: a class between 0 and the largest label has no training image.
    """
    used, count = np.unique(labels), int(labels.max()) + 1
    if len(used) < count:
        # Only the first absent classes: a wrong label may be as large as an int64 can be.
        absent = np.setdiff1d(np.arange(min(count, len(used) + _SHOWN + 1)), used)
        some = ", ".join(map(str, absent[:_SHOWN])) + (" and more" * (count - len(used) > _SHOWN))
        raise InputError(
            f"{path}: train_labels goes from {used[0]} to {used[-1]}, but has no image of {some}."
            " Number the classes 0, 1, ... without gaps: np.unique(labels, return_inverse=True)[1]"
            " does this for the labels of training and test images together (labels 1..K become"
            " 0..K-1). If a class has no training image on purpose, add class_names, one for each"
            " number."
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
            f"{path}: {part}_labels has the label {labels.min()}; the first class is 0. Put images"
            " without a label into unlabeled_images."
        )
