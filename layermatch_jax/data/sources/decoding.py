"""Decodes an image file of any supported format to a square RGB image, uint8."""

import collections
import concurrent.futures
import errno
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from layermatch_jax.data.images import square
from layermatch_jax.data.sources import names
from layermatch_jax.errors import InputError

T = TypeVar("T")

# Number of the rules by which a file becomes pixels. Raise it with every change of the pixels:
# caches of decoded images are then made anew.
VERSION = 1
# Recognized by content, not by extension. Others are unsafe: EPS starts a program, and TGA accepts
# almost any bytes.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# Errors of the machine, which do not mean that the file is broken.
OF_THE_MACHINE = tuple(
    getattr(errno, name)
    for name in ("EMFILE", "ENFILE", "ENOMEM", "ESTALE", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN")
    if hasattr(errno, name)
)
_BITS = (8, 10, 12, 14, 16, 24, 32)  # usual bit depths of cameras and scanners
_QUICK = 256  # files that a thread looks at in one go
_AT_ONCE = 32, 2**20  # what a thread decodes in one go: images, bytes of their pixels


class Decoded(NamedTuple):
    """A decoded image, and remarks on changes that the user may not expect."""

    pixels: np.ndarray  # uint8 [side, side, 3]
    remarks: tuple[str, ...]  # a message continues each with "in 12 of 300 images"


def decode(path: str, side: int, alpha: str = "white") -> np.ndarray:
    """Decodes the central square of an image file, resized: uint8 [side, side, 3].

    The image is rotated by its EXIF orientation. Only the first frame of an animation is used. Gray
    levels of more than 8 bits are scaled to 0..255. For integers, white is the largest value of the
    smallest bit depth (8, 10, 12, 14, 16, 24 or 32) that holds the image's largest value; PGM files
    define white themselves. Floats have the range 0..1 or, if the largest is above 1, 0..255. An
    image with negative values, or with floats above 255, is scaled from its lowest value to its
    highest.

    Args:
      path: path of the file.
      side: side of the result, pixels.
      alpha: 'white' puts the image on a white background, 'drop' makes all pixels opaque.

    Raises:
      InputError: the file cannot be read or decoded; the message names it.
    """
    try:
        return _decode(path, side, alpha).pixels
    # On broken bytes, decoders raise many types: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise InputError(
            f"Cannot decode the image {names.text(path)} ({_reason(error, path)}). Restore the"
            " original file; then the run can be resumed. Without the file, or with a different"
            " image in its place, the data set changes and needs a new run."
        ) from error


def attempt(path: str, side: int, alpha: str) -> Decoded | str:
    """Decodes an image as `decode` does; returns a Decoded, or the reason why it is broken.

    Raises:
      MemoryError, OSError: the machine failed, not the file: out of memory, too many open files, a
        file server that does not answer.
    """
    try:
        return _decode(path, side, alpha)
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
            raise
        return _reason(error, path)


def examine(path: str, side: int, alpha: str) -> tuple[str | None, tuple[str, ...]]:
    """Returns (the reason why an image cannot be decoded, or None; its remarks: see Decoded)."""
    found = attempt(path, side, alpha)
    return (found, ()) if isinstance(found, str) else (None, found.remarks)


@functools.cache
def pool() -> concurrent.futures.Executor:
    """Returns the decoding threads; they do run in parallel: Pillow decodes without the GIL."""
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "decode")


def of_each(function: Callable[[str], T], paths: Sequence[str]) -> list[T]:
    """Returns function(path) for each path, by the decoding threads; for functions that are quick.

    A folder on another machine may need a millisecond for each file.
    """
    parts = [paths[start : start + _QUICK] for start in range(0, len(paths), _QUICK)]
    return [x for part in pool().map(lambda part: list(map(function, part)), parts) for x in part]


def ahead(function: Callable[[str], T], paths: Sequence[str], side: int) -> Iterator[T]:
    """Yields function(path) for each path, in order; the decoding threads work a little ahead.

    Args:
      function: decodes an image.
      paths: paths of the images.
      side: side of the decoded images, pixels; it limits how far the threads may be ahead.
    """
    images, size = _AT_ONCE
    count = max(1, min(images, size // (side * side * 3)))
    waiting = collections.deque()
    try:
        for start in range(0, len(paths), count):
            part = paths[start : start + count]
            waiting.append(pool().submit(lambda part: list(map(function, part)), part))
            if len(waiting) > 2 * (os.cpu_count() or 1):
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        for part in waiting:
            part.cancel()


def _decode(path: str, side: int, alpha: str) -> Decoded:
    remarks = []
    with Image.open(path, formats=_formats()) as image:
        if getattr(image, "is_animated", False):
            remarks.append("only the first of several frames is used")
        # Decodes a large JPEG at 1/2, 1/4 or 1/8 of its size. The result has at least twice the
        # needed size, so the quality still depends on the resizing below.
        image.draft("RGB", (2 * side, 2 * side))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":  # I, I;16, I;16B, F: Pillow's own conversion would clip to white
            white = 65535 if image.format == "PPM" and image.mode == "I" else None
            image, remark = _eight_bits(image, white)
            remarks.append(remark)
        if image.mode == "LAB":
            image = _lab_to_rgb().apply(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema() != (255, 255):
                if alpha == "white":
                    ground = Image.new("RGBA", image.size, "white")
                    image = Image.alpha_composite(ground, image)
                    remarks.append("transparent pixels become white (dataset.alpha=white)")
                else:
                    remarks.append("transparent pixels become opaque (dataset.alpha=drop)")
        return Decoded(np.asarray(square(image.convert("RGB"), side)), tuple(remarks))


def _eight_bits(image: Image.Image, white: int | None) -> tuple[Image.Image, str]:
    """Converts a gray image of more than 8 bits to 8 bits (see `decode`); also returns a remark."""
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    low, high = values.min(), values.max()
    whole = values.dtype.kind in "iu"
    if whole and low >= 0:
        high = max(int(high), white or 0)
        bits = next(bits for bits in _BITS if high < 2**bits)
        gray, low, high = values >> (bits - 8), 0, 2**bits - 1
    else:
        if low >= 0 and high <= 255:
            low, high = 0, 1 if high <= 1 else 255
        scaled = (values - np.float64(low)) / ((np.float64(high) - low) or 1)
        gray = np.floor(255 * scaled + 0.5)
    small = Image.fromarray(gray.astype(np.uint8))
    if "transparency" in image.info:  # a PNG may declare one gray level transparent
        small.putalpha(Image.fromarray(np.uint8(255) * (values != image.info["transparency"])))
    return small, f"gray levels {low:g}..{high:g} are scaled to 0..255"


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # older Pillows lack AVIF


@functools.cache
def _lab_to_rgb() -> ImageCms.ImageCmsTransform:
    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, rgb, "LAB", "RGB")


def _reason(error: Exception, path: str) -> str:
    """Says why a file could not be decoded, without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format" if os.path.getsize(path) else "the file is empty"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {names.text(str(error))}"
