"""Data sets in memory: labels as arrays, and pixels that a function reads on request."""

import hashlib
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

_AT_ONCE = 64  # images that channel_statistics reads at a time; 13 MB at 256 pixels


class Images(NamedTuple):
    """N square RGB images of one stored side R, in a fixed order.

    Attributes:
      labels: int32 [N], -1 where the class is unknown.
      read: positions, integers [n] in 0..N-1 -> uint8 [n, R, R, 3]. A pure function; several
        threads may call it.
      files: [N] paths (str) of the image files; None if the images do not have a file each.
      moments: positions, integers [n] -> the sums of the values of each channel of each image and
        the sums of their squares, uint64 [n, 3] each; None if they must be computed from the
        pixels.
    """

    labels: np.ndarray
    read: Callable[[np.ndarray], np.ndarray]
    files: np.ndarray | None = None
    moments: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None


class Source(NamedTuple):
    """A data set; all its images have the same stored side."""

    class_names: tuple[str, ...]
    train: Images  # every label known
    unlabeled: Images | None  # extra images that come without labels (STL-10); all labels -1
    test: Images
    notes: tuple[str, ...] = ()  # sentences for the user, shown at the start of a run


def wants_test_images(dataset: ConfigDict) -> bool:
    """Tells whether dataset.evaluate_on asks for test images; if it is left open, it does."""
    return dataset.evaluate_on in (None, "test")


def digest(source: Source) -> np.ndarray:
    """Returns a hash, uint8 [32], of a source's classes, labels and file names.

    The processes of a run compare their hashes. File names count without their folders, because
    hosts may mount them at different places.
    """
    of_source = hashlib.sha256(repr(source.class_names).encode())
    for images in (source.train, source.unlabeled, source.test):
        if images is not None:
            files = () if images.files is None else map(os.path.basename, images.files)
            of_source.update(images.labels.tobytes())
            of_source.update(repr(list(files)).encode())
        of_source.update(b"|")
    return np.frombuffer(of_source.digest(), np.uint8)


def from_array(pixels: np.ndarray, labels: np.ndarray | None) -> Images:
    """Images in memory: pixels uint8 [N, R, R, 3]; labels integers [N], None for unknown."""
    if labels is None:
        labels = np.full(len(pixels), -1)
    return Images(np.asarray(labels, np.int32), pixels.__getitem__)


def take(images: Images, indices: np.ndarray) -> Images:
    """Selects the images at positions (integers [n]), in this order, without reading pixels."""
    indices = np.asarray(indices, np.int64)
    files = None if images.files is None else images.files[indices]
    of_all = images.moments
    moments = of_all and (lambda i: of_all(indices[i]))
    return Images(images.labels[indices], lambda i: images.read(indices[i]), files, moments)


def concatenate(a: Images, b: Images) -> Images:
    """Joins the images of `a` and `b` (of one stored side) without reading pixels."""
    split = len(a.labels)

    def read(indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, np.int64)
        in_b = indices >= split
        if not in_b.any():
            return a.read(indices)
        second = b.read(indices[in_b] - split)
        if in_b.all():
            return second
        out = np.empty((len(indices), *second.shape[1:]), np.uint8)
        out[in_b] = second
        out[~in_b] = a.read(indices[~in_b])
        return out

    files = None
    if a.files is not None and b.files is not None:
        files = np.concatenate([a.files, b.files])
    return Images(np.concatenate([a.labels, b.labels]), read, files)


def square(image: Image.Image, side: int) -> Image.Image:
    """Crops the largest centered square of a Pillow image and resizes it to `side` pixels.

    Equals resizing the shorter side and cropping the center, in one pass. Bilinear; when shrinking,
    Pillow widens the filter against aliasing. Without resizing, pixels stay exact.
    """
    width, height = image.size
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    if short == side:  # nothing to resize: no half pixels
        left, top = int(left), int(top)
    box = (left, top, left + short, top + short)
    return image.resize((side, side), Image.Resampling.BILINEAR, box)


def resize(pixels: np.ndarray, side: int) -> np.ndarray:
    """Resizes uint8 [N, R, R] or [N, R, R, 3] like `square`; no copy if R is `side`."""
    if pixels.shape[1] == side:
        return pixels
    out = np.empty((len(pixels), side, side, *pixels.shape[3:]), np.uint8)
    for i, image in enumerate(pixels):
        out[i] = np.asarray(square(Image.fromarray(image), side))
    return out


def channel_statistics(
    images: Images, limit: int = 10_000
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Computes the mean and standard deviation of red, green and blue, for normalization.

    Uses all pixels of at most `limit` images, evenly spaced over the set. The sums are integers, so
    the result is exact and does not depend on the size of the parts that are read.

    Returns:
      (mean, standard deviation), each three floats, in units where white is 1. The standard
      deviation is at least one gray level (1/255), so that division by it is always possible.

    Raises:
      ValueError: there are no images.
    """
    total = len(images.labels)
    count = min(total, limit)
    if count < 1:
        raise ValueError(
            f"channel_statistics needs at least one image: there are {total}, and limit={limit}."
        )
    indices = np.arange(count) * total // count
    if images.moments:
        sums, squares = (of_images.sum(0) for of_images in images.moments(indices))
        pixels = count * images.read(indices[:1])[..., 0].size
    else:
        sums, squares, pixels = np.zeros(3, np.uint64), np.zeros(3, np.uint64), 0
        for start in range(0, count, _AT_ONCE):
            part = images.read(indices[start : start + _AT_ONCE])
            for of_image in map(moments, part):
                sums, squares = sums + of_image[0], squares + of_image[1]
            pixels += part[..., 0].size
    mean, std = [], []
    for s, q in zip(sums.tolist(), squares.tolist(), strict=True):
        mean.append(s / pixels / 255)
        std.append(max((pixels * q - s * s) ** 0.5 / pixels, 1.0) / 255)
    return tuple(mean), tuple(std)


def moments(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums the values and their squares over an image: uint8 [H, W, 3] -> uint64 [3], uint64 [3].

    Exact for less than 66,000 rows. First over the rows, because NumPy sums long vectors fast, but
    not three channels.
    """
    values = pixels.reshape(len(pixels), -1).astype(np.uint16)
    of_columns = values.sum(0, dtype=np.uint32), (values * values).sum(0, dtype=np.uint32)
    sums, squares = (x.reshape(-1, 3).sum(0, dtype=np.uint64) for x in of_columns)
    return sums, squares
