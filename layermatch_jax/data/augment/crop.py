"""Crops and flips of uint8 images in NumPy: the weak view, and the first stage of the strong."""

import numpy as np
from jaxtyping import Bool, Int, UInt8


def crop_and_flip(
    images: UInt8[np.ndarray, "n R R C"],
    offset: Int[np.ndarray, "n 2"],
    flip: Bool[np.ndarray, " n"],
    pad: int,
    size: int,
) -> UInt8[np.ndarray, "n {size} {size} C"]:
    """Pads each image by reflection, crops it and, if `flip`, mirrors the crop left-right.

    For several views of an image, repeat it in `images`. No padded copy is made in memory, so the
    cost is proportional to the number of views.

    Args:
      images: one image for each view.
      offset: (y, x) of the crop in the padded image, pixels, 0..R + 2·pad - size.
      flip: whether to mirror the crop (not the image).
      pad: pixels added on each side, without repeating the border (`np.pad(mode="reflect")`).
      size: side of the crop, pixels.

    Raises:
      ValueError: the padded image is smaller than the crop, or an offset is out of range.
    """
    n, R, _, C = images.shape
    limit = R + 2 * pad - size
    if limit < 0:
        raise ValueError(
            f"crops of {size} pixels are larger than images of {R} pixels padded by {pad}"
        )
    if n and not 0 <= offset.min() <= offset.max() <= limit:
        raise ValueError(
            f"crop offsets {offset.min()}..{offset.max()} outside 0..{limit} "
            f"(images of {R} pixels padded by {pad}, crops of {size})"
        )
    source = np.pad(np.arange(R), pad, mode="reflect")  # padded position -> position
    # NumPy looks up single bytes twice as fast as pixels.
    pixels = C * source[:, None] + np.arange(C)
    as_is, mirrored = pixels.ravel(), pixels[::-1].ravel()
    views = np.empty((n, size, C * size), np.uint8)
    lines = np.reshape(images, (n, R, C * R))
    where = zip(offset.tolist(), flip.tolist(), strict=True)
    for view, image, ((y, x), f) in zip(views, lines, where, strict=True):
        columns = mirrored[C * (limit - x) :] if f else as_is[C * x :]
        kept = image.take(source[y : y + size], axis=0)
        kept.take(columns[: C * size], axis=1, out=view, mode="clip")  # "raise" would buffer it
    return views.reshape(n, size, size, C)


def center_crop(
    images: UInt8[np.ndarray, "n R R C"], size: int
) -> UInt8[np.ndarray, "n {size} {size} C"]:
    """Crops the center without a copy; if it is between pixels, the crop is nearer the top left.

    Raises:
      ValueError: the images are smaller than the crop.
    """
    if min(images.shape[1:3]) < size:
        raise ValueError(
            f"crops of {size} pixels are larger than images of {images.shape[1:3]} pixels"
        )
    y, x = ((side - size) // 2 for side in images.shape[1:3])
    return images[:, y : y + size, x : x + size]
