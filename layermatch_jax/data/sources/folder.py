"""A data set as a folder of image files (ImageNet-100, one's own photographs).

The files are listed and checked at the start, and decoded again whenever they are read.
"""

import collections
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from layermatch_jax.data.images import Images, Source
from layermatch_jax.data.sources import checking, decoding, layout, listing, names
from layermatch_jax.errors import InputError


class _File(NamedTuple):
    part: str  # 'train', 'test' or 'unlabeled'
    label: int  # -1 in 'unlabeled'
    path: str


def load(dataset: ConfigDict) -> Source:
    """The images below dataset.data_dir, each cut to its central square of dataset.stored_size.

    ROOT/train/CLASS/ and ROOT/test/CLASS/ (ROOT/val/ where ROOT/test/ has no class folders) hold
    the images of a class, at any depth; ROOT/unlabeled/, if there, holds more, at any depth.
    Classes are the folders of train sorted by name, or those named in dataset.class_list, in its
    order (one a line; empty lines and lines that begin with # are skipped; other folders are not
    used). The images of a class come sorted by path. Names are compared as `names.text`.

    Every image is decoded once, as `decoding.decode` does, to know that it is whole. Broken images
    are an error, or are left out if dataset.on_broken is 'skip'. The Source's notes say what was
    passed over, left out or changed.

    Test images are read if dataset.evaluate_on is 'test' or dataset.drop_test_duplicates is set;
    otherwise the test set is empty.

    Raises:
      InputError: the folder is not of this form, has fewer than two classes, or holds broken images
        (all are named). Reading an image that broke later raises it, too.
    """
    where = layout.read(dataset)
    places = [("train", *place) for place in enumerate(where.train)]
    places += [("test", label, path) for label, path in enumerate(where.test) if path is not None]
    places += [("unlabeled", -1, where.unlabeled)] if where.unlabeled else []
    files, passed_over = [], [where.passed_over]
    for part, label, folder in places:
        found = listing.find(folder)
        files += [_File(part, label, path) for path in found.files]
        passed_over.append(found.passed_over)
    passed_over = listing.passed_over(listing.merge(passed_over), where.root)
    _refuse_gaps(files, where, passed_over)

    findings = checking.check([file.path for file in files], dataset.stored_size, dataset.alpha)
    notes = [*where.notes, passed_over, *findings.remarks]
    notes += _counted_twice(files, where.root) + _in_another_class(files, where)
    if findings.broken:
        broken = f"{len(findings.broken):,} of {len(files):,} images cannot be decoded"
        if dataset.on_broken == "error":
            raise InputError(
                f"{broken}:\n{checking.as_lines(findings.broken)}\nPut whole images in their place,"
                " remove them, or leave them out with --config.dataset.on_broken=skip."
            )
        files = [file for file in files if file.path not in findings.broken]
        notes.append(f"left out: {broken}:\n{checking.as_lines(findings.broken)}")
        _refuse_gaps(files, where, notes[-1])
    without = set(where.class_names) - {
        where.class_names[f.label] for f in files if f.part == "test"
    }
    if where.test and without:
        logging.warning("No test images for: %s.", names.some(sorted(without)))

    def images_of(part: str) -> Images:
        mine = [file for file in files if file.part == part]
        labels = np.array([file.label for file in mine], np.int32)
        return _images([file.path for file in mine], labels, dataset.stored_size, dataset.alpha)

    return Source(
        class_names=where.class_names,
        train=images_of("train"),
        unlabeled=images_of("unlabeled") if where.unlabeled else None,
        test=images_of("test"),
        notes=tuple(filter(None, notes)),
    )


def from_files(paths: Sequence[str | os.PathLike[str]], side: int, alpha: str = "white") -> Images:
    """Image files without known classes, in this order, cut and resized to `side` pixels.

    Args:
      paths: of the files.
      side: of the images, pixels.
      alpha: of `decoding.decode`; for a run's model, its dataset.alpha.
    """
    files = [os.fspath(path) for path in paths]
    return _images(files, np.full(len(files), -1, np.int32), side, alpha)


def _images(files: list[str], labels: np.ndarray, side: int, alpha: str) -> Images:
    def read(indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), side, side, 3), np.uint8)
        decoded = decoding.pool().map(lambda i: decoding.decode(files[i], side, alpha), indices)
        for row, image in zip(out, decoded, strict=True):
            row[:] = image
        return out

    return Images(labels, read, np.array(files, object))


def _counted_twice(files: list[_File], root: Path) -> list[str]:
    """Sentences on the files that count more than once, by links; copies are not looked for."""

    def identity(file):
        try:
            found = os.stat(file.path)
        except OSError:  # the check tells of it
            return file.path
        return (found.st_dev, found.st_ino) if found.st_ino else file.path

    known = list(zip(files, decoding.pool().map(identity, files), strict=True))
    groups = collections.defaultdict(list)  # of the files to train on
    for file, same in known:
        if file.part != "test":
            groups[same].append(file)
    tested = [file.path for file, same in known if file.part == "test" and same in groups]
    classes = [
        group[0].path
        for group in groups.values()
        if len({file.label for file in group if file.part == "train"}) > 1
    ]
    repeated = [file.path for group in groups.values() for file in group[1:]]
    return [
        f"{said}: {len(paths):,} (first: {listing.relative(paths[0], root)})"
        for paths, said in (
            (tested, "test images that are files trained on, too"),
            (classes, "training images that links put into more than one class"),
            (repeated, "images that links add to the training images once more"),
        )
        if paths
    ]


def _in_another_class(files: list[_File], where: layout.Layout) -> list[str]:
    """A sentence on the images in a folder that is inside one class and named like another."""
    roots = {"train": where.train, "test": where.test}
    label_of = {name: label for label, name in enumerate(where.class_names)}
    inner: dict[tuple[str, int, str], bool] = {}  # of each folder with images, whether it is one

    def named_like_another(file: _File) -> bool:
        key = file.part, file.label, os.path.dirname(file.path)
        if file.part == "unlabeled":
            return False
        if key not in inner:
            below = os.path.relpath(key[2], roots[file.part][file.label]).split(os.sep)
            inner[key] = any(label_of.get(names.text(x), file.label) != file.label for x in below)
        return inner[key]

    others = [file for file in files if named_like_another(file)]
    if not others:
        return []
    first = listing.relative(others[0].path, where.root)
    return [
        "images in a folder that is inside one class and named like another, which count as the"
        f" outer one: {len(others):,} (first: {first} counts as"
        f" {where.class_names[others[0].label]})"
    ]


def _refuse_gaps(files: list[_File], where: layout.Layout, why: str) -> None:
    """InputError where a class has no training image, or another part has no image at all."""
    there = {(file.part, file.label) for file in files}
    parts = {part for part, _ in there}
    empty = [name for label, name in enumerate(where.class_names) if ("train", label) not in there]
    if empty:
        wrong = f"No training images in {where.root} of: {names.some(empty)}"
    elif where.test and "test" not in parts:
        wrong = f"No test images in {where.root} of: {names.some(where.class_names)}"
    elif where.unlabeled and "unlabeled" not in parts:
        wrong = f"{where.unlabeled} has no images: fill or remove it"
    else:
        return
    raise InputError(f"{wrong}. {why}{'. ' if why else ''}{layout.EXPECTED}")
