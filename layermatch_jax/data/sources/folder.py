"""Data sets in folders of image files, such as ImageNet-100 or your own photographs.

The files are listed and checked at the start. Their decoded pixels are read from a cache (cache.py)
or, with dataset.cache_dir='none', decoded anew at every read.
"""

import collections
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from layermatch_jax.data.images import Images, Source, take
from layermatch_jax.data.sources import cache, checking, decoding, layout, listing, names
from layermatch_jax.errors import InputError


class _File(NamedTuple):
    part: str  # 'train', 'test' or 'unlabeled'
    label: int  # -1 in 'unlabeled'
    path: str


def load(dataset: ConfigDict) -> Source:
    """Loads the images below dataset.data_dir: central squares, resized to dataset.stored_size.

    ROOT/train/CLASS/ and ROOT/test/CLASS/ hold the images of a class, at any depth (ROOT/val/ if
    ROOT/test/ is missing or has no class folders). ROOT/unlabeled/ is optional and holds images
    without labels, at any depth. The classes are the folders of train sorted by name, or those in
    dataset.class_list, in its order (one on each line; empty lines and lines that begin with # are
    skipped; other folders are not used). The images of a class are sorted by path. Names are
    compared as `names.text`.

    Every image is decoded once with `decoding.decode`, into the cache (see `cache.open_images`) and
    to find broken ones. Broken images are an error; with dataset.on_broken='skip' they are left
    out. The Source's notes say what was passed over, left out or changed.

    Test images are read if dataset.evaluate_on is 'test' or dataset.drop_test_duplicates is set;
    otherwise the test set is empty.

    Raises:
      InputError: the folder does not have this form, has fewer than two classes, or holds broken
        images (the message lists them), or the cache cannot be used. Reading an image raises it,
        too, if the cache or, without one, the file broke after this call.
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

    paths = [file.path for file in files]
    labels = np.array([file.label for file in files], np.int32)
    if dataset.cache_dir == cache.NONE:
        findings = checking.check(paths, dataset.stored_size, dataset.alpha)
        images = _decoded_at_each_read(paths, labels, dataset.stored_size, dataset.alpha)
    else:
        images, findings = cache.open_images(paths, labels, dataset)
    notes = [*where.notes, passed_over, *findings.remarks]
    notes += _counted_twice(files, where.root) + _in_another_class(files, where)
    if findings.broken:
        broken = f"{len(findings.broken):,} of {len(files):,} images cannot be decoded"
        if dataset.on_broken == "error":
            raise InputError(
                f"{broken}:\n{checking.as_lines(findings.broken)}\nReplace or remove them, or"
                " leave them out with --config.dataset.on_broken=skip."
            )
        whole = [i for i, file in enumerate(files) if file.path not in findings.broken]
        files, images = [files[i] for i in whole], take(images, np.array(whole))
        notes.append(f"left out: {broken}:\n{checking.as_lines(findings.broken)}")
        _refuse_gaps(files, where, notes[-1])
    without = set(where.class_names) - {
        where.class_names[f.label] for f in files if f.part == "test"
    }
    if where.test and without:
        logging.warning("No test images for: %s.", names.some(sorted(without)))

    def images_of(part: str) -> Images:
        return take(images, np.array([i for i, file in enumerate(files) if file.part == part]))

    return Source(
        class_names=where.class_names,
        train=images_of("train"),
        unlabeled=images_of("unlabeled") if where.unlabeled else None,
        test=images_of("test"),
        notes=tuple(filter(None, notes)),
    )


def from_files(paths: Sequence[str | os.PathLike[str]], side: int, alpha: str = "white") -> Images:
    """Makes Images of files without known classes, in this order, cropped and resized.

    Args:
      paths: paths of the image files.
      side: side of the images, pixels.
      alpha: see `decoding.decode`; for the model of a run, its dataset.alpha.
    """
    files = [os.fspath(path) for path in paths]
    return _decoded_at_each_read(files, np.full(len(files), -1, np.int32), side, alpha)


def _decoded_at_each_read(files: list[str], labels: np.ndarray, side: int, alpha: str) -> Images:
    def read(indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), side, side, 3), np.uint8)
        decoded = decoding.pool().map(lambda i: decoding.decode(files[i], side, alpha), indices)
        for row, image in zip(out, decoded, strict=True):
            row[:] = image
        return out

    return Images(labels, read, np.array(files, object))


def _counted_twice(files: list[_File], root: Path) -> list[str]:
    """Describes files that count more than once because of links; copies are not searched."""

    def identity(path):
        try:
            found = os.stat(path)
        except OSError:  # the check reports it
            return path
        return (found.st_dev, found.st_ino) if found.st_ino else path

    identities = decoding.of_each(identity, [file.path for file in files])
    known = list(zip(files, identities, strict=True))
    groups = collections.defaultdict(list)  # the training and unlabeled files, by identity
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
            (tested, "test images that are also training or unlabeled images"),
            (classes, "training images in more than one class, by links"),
            (repeated, "training or unlabeled images that count again, by links"),
        )
        if paths
    ]


def _in_another_class(files: list[_File], where: layout.Layout) -> list[str]:
    """Describes images in a folder that lies inside one class and has the name of another."""
    roots = {"train": where.train, "test": where.test}
    label_of = {name: label for label, name in enumerate(where.class_names)}
    inner: dict[tuple[str, int, str], bool] = {}  # folder of images -> whether it is such a folder

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
        "images in a folder that lies inside one class and has the name of another; they count as"
        f" the outer class: {len(others):,} (first: {first} counts as"
        f" {where.class_names[others[0].label]})"
    ]


def _refuse_gaps(files: list[_File], where: layout.Layout, why: str) -> None:
    """Raises an InputError if a class has no training image, or another part has no image."""
    there = {(file.part, file.label) for file in files}
    parts = {part for part, _ in there}
    empty = [name for label, name in enumerate(where.class_names) if ("train", label) not in there]
    if empty:
        wrong = f"{where.root} has no training images of: {names.some(empty)}"
    elif where.test and "test" not in parts:
        wrong = f"{where.root} has no test images of: {names.some(where.class_names)}"
    elif where.unlabeled and "unlabeled" not in parts:
        wrong = f"{where.unlabeled} has no images. Add images or remove the folder"
    else:
        return
    raise InputError(f"{wrong}. {why}{'. ' if why else ''}{layout.EXPECTED}")
