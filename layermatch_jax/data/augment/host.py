"""The strong view in tf.data: RandAugment and Cutout on whole batches, with draws of `sampler`.

Nothing here draws random numbers. The rows of a batch are grouped by operation, and each operation
runs once on its group; on single images, TensorFlow would spend most time starting operations. All
operations equal Pillow's on RGB images bit for bit, so they copy its rounding: blends are float32
and truncated, the coefficients of affine maps are 16.16 fixed-point numbers.

On a CPU, TensorFlow is fast at plain arithmetic along long rows. So images are reshaped to
[k, S, 3S] (lines) or [k, 3S²] where possible. The code avoids gathers (which cost as much as 20
additions), `tf.where` on uint8 and broadcasts over the last axis.

In this file k is the number of images in a group, S their side in pixels.
"""

import numpy as np
import tensorflow as tf

from layermatch_jax.data.augment.operations import CUTOUT_COLOR, GEOMETRIC, NAMES


def strong_views(
    images: tf.Tensor, op: tf.Tensor, value: tf.Tensor, affine: tf.Tensor, cutout: tf.Tensor
) -> tf.Tensor:
    """Applies n operations in order to each image, then Cutout.

    Args:
      images: uint8 [m, S, S, 3], S known when the graph is built; m may be unknown, or 0.
      op: int32 [m, n], operations by their position in `operations.RANDAUGMENT`; n known.
      value: float32 [m, n], their magnitudes in the units and ranges given there.
      affine: int32 [m, n, 6], `operations.coefficients` of these.
      cutout: int32 [m, 4], the box to fill (y0, x0, y1, x1), half-open, pixels.

    Returns:
      uint8 [m, S, S, 3]. Each row depends only on the same row of the arguments.

    Raises:
      tf.errors.InvalidArgumentError: when the graph runs, an op is not in the list.
    """
    for step in range(_length(op)):
        images = _apply(images, op[:, step], value[:, step], affine[:, step])
    return cut_out(images, cutout)


def _apply(images, op, value, affine):
    """Applies an operation to each image; op int32 [m], value float32 [m], affine int32 [m, 6]."""
    rows = tf.dynamic_partition(tf.range(tf.size(op)), op, len(NAMES))
    rows = dict(zip(NAMES, rows, strict=True))
    values = dict(zip(NAMES, tf.dynamic_partition(value, op, len(NAMES)), strict=True))
    places = [rows[name] for name in PIXELWISE]
    parts = [f(tf.gather(images, rows[name]), values[name]) for name, f in PIXELWISE.items()]
    places.append(tf.concat([rows[name] for name in GEOMETRIC], 0))
    parts.append(warp(tf.gather(images, places[-1]), tf.gather(affine, places[-1])))
    return tf.ensure_shape(tf.dynamic_stitch(places, parts), images.shape)


def cut_out(images: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """Fills the box (y0, x0, y1, x1), half-open, int32 [k, 4], with gray. uint8 [k, S, S, 3]."""
    size = _length(images)

    def inside(position, low, high):
        within = (position >= box[:, low, None]) & (position < box[:, high, None])
        return tf.cast(within, tf.uint8) * 255  # all bits of a byte

    line = inside(np.arange(size), 0, 2)[:, :, None]
    byte = inside(np.arange(size).repeat(3), 1, 3)[:, None, :]
    gray = tf.constant(CUTOUT_COLOR * size, tf.uint8)
    return _like(images, (_lines(images) & (~line | ~byte)) | (line & (byte & gray)))


# Pixelwise operations: (images uint8 [k, S, S, 3], value float32 [k]) -> uint8 [k, S, S, 3].


def autocontrast(images, _):
    """Stretches each channel to 0..255. `ImageOps.autocontrast(image)`."""
    size = _length(images)
    pixels = tf.reshape(images, [-1, size**2, 3])
    low = tf.cast(tf.reduce_min(pixels, 1), tf.float64)
    span = tf.cast(tf.reduce_max(pixels, 1), tf.float64) - low
    flat = tf.cast(span == 0, tf.float64)  # a constant channel is not changed
    scale = flat + (1 - flat) * 255 / (span + flat)
    offset = (1 - flat) * -low * scale
    # float64 and this order of operations round as Pillow does.
    x = tf.cast(_lines(images), tf.float64)
    x = x * _per_channel(scale, size) + _per_channel(offset, size)
    return _like(images, tf.cast(tf.clip_by_value(x, 0, 255), tf.uint8))


def brightness(images, value):
    """Mixes with black; value: share of the image. `ImageEnhance.Brightness(image)`."""
    x = tf.cast(_flat(images), tf.float32)
    return _like(images, tf.cast(value[:, None] * x, tf.uint8))


def color(images, value):
    """Mixes with the gray image; value: share of the image. `ImageEnhance.Color(image)`."""
    x = tf.cast(_flat(images), tf.float32)
    gray = tf.tile(_luma(images)[:, :, None], [1, 1, 3])
    return _like(images, _mix(tf.reshape(gray, tf.shape(x)), x, value[:, None]))


def contrast(images, value):
    """Mixes with the mean gray level; value: share of the image. `ImageEnhance.Contrast(image)`."""
    x = tf.cast(_flat(images), tf.float32)
    area = _length(images) ** 2
    total = tf.reduce_sum(tf.cast(_luma(images), tf.int32), axis=1, keepdims=True)
    mean = (2 * total + area) // (2 * area)
    return _like(images, _mix(tf.cast(mean, tf.float32), x, value[:, None]))


def equalize(images, _):
    """Evens out each channel's histogram. `ImageOps.equalize(image)`."""
    size, k = _length(images), tf.shape(images)[0]
    table = 256 * tf.reshape(tf.range(3 * k), [k, 3])  # where a channel's levels begin
    index = tf.cast(_lines(images), tf.int32) + _per_channel(table, size)
    count = tf.raw_ops.Bincount(arr=index, size=768 * k, weights=tf.zeros([0], tf.float32))
    count = tf.cast(tf.reshape(count, [-1, 256]), tf.int32)
    darker = tf.cumsum(count, axis=1, exclusive=True)
    brightest_left_out = tf.reduce_max(tf.where(count > 0, darker, 0), axis=1, keepdims=True)
    step = brightest_left_out // 255
    level = tf.minimum((darker + step // 2) // tf.maximum(step, 1), 255)
    level = tf.cast(tf.where(step > 0, level, tf.range(256)), tf.uint8)
    return _like(images, tf.gather(tf.reshape(level, [-1]), index))


def identity(images, _):
    """Returns the images."""
    return images


def posterize(images, value):
    """Keeps the highest bits; value: their number (whole part, >= 1). `ImageOps.posterize`."""
    bits = tf.maximum(tf.cast(value, tf.int32), 1)
    mask = tf.cast(256 - tf.bitwise.left_shift(1, 8 - bits), tf.uint8)
    return _like(images, _flat(images) & mask[:, None])


def sharpness(images, value):
    """Mixes with the smoothed image; value: share of the image. `ImageEnhance.Sharpness(image)`."""
    x = tf.cast(_lines(images), tf.float32)
    total = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    total = total[:, :, :-6] + total[:, :, 3:-3] + total[:, :, 6:]
    center = x[:, 1:-1, 3:-3]
    change = tf.floor((total + 4 * center) / 13 + 0.5) - center  # ImageFilter.SMOOTH
    smooth = x + tf.pad(change, [[0, 0], [1, 1], [3, 3]])  # the border is not changed
    return _like(images, _mix(smooth, x, value[:, None, None]))


def solarize(images, value):
    """Inverts all levels >= value, a gray level. `ImageOps.solarize(image, value)`."""
    x = _flat(images)
    bright = tf.cast(x, tf.float32) >= value[:, None]
    return _like(images, x ^ (tf.cast(bright, tf.uint8) * 255))


PIXELWISE = {
    "autocontrast": autocontrast,
    "brightness": brightness,
    "color": color,
    "contrast": contrast,
    "equalize": equalize,
    "identity": identity,
    "posterize": posterize,
    "sharpness": sharpness,
    "solarize": solarize,
}


def warp(images: tf.Tensor, affine: tf.Tensor) -> tf.Tensor:
    """Moves pixels, uint8 [k, S, S, 3], by the maps of `operations.coefficients`, int32 [k, 6]."""
    size, k = _length(images), tf.shape(images)[0]
    a, b, c, d, e, f = tf.unstack(affine[:, :, None], axis=1)

    def source(u, v, w):
        along, down = u * tf.range(size) + w, v * tf.range(size)
        return tf.bitwise.right_shift(along[:, None, :] + down[:, :, None], 16)

    x, y = source(a, b, c), source(d, e, f)
    # Read as unsigned, negative numbers are too large, too.
    inside = (tf.bitcast(x, tf.uint32) < size) & (tf.bitcast(y, tf.uint32) < size)
    index = y * size + x + tf.range(k)[:, None, None] * size**2
    pixels = tf.concat([tf.reshape(images, [-1, 3]), tf.zeros([1, 3], tf.uint8)], 0)
    return tf.gather(pixels, tf.where(inside, index, k * size**2))


def _length(x) -> int:
    """Returns the length of the second axis, which is known when the graph is built."""
    return x.shape[1]


def _luma(images):
    """Computes gray levels, whole numbers in float32 [k, S²], like `image.convert("L")`."""
    pixels = tf.reshape(images, [-1, _length(images) ** 2, 3])
    red, green, blue = tf.unstack(tf.cast(pixels, tf.float32), axis=2)
    # Every sum is below 2^24, so float32 is exact.
    return tf.floor((red * 19595 + green * 38470 + blue * 7471 + 2**15) / 2**16)


def _mix(first, second, value):
    """Computes `Image.blend(first, second, value)` for 0 ≤ value ≤ 1; float32 in, uint8 out."""
    return tf.cast(first + value * (second - first), tf.uint8)


def _per_channel(x, size):
    """Repeats [k, 3] to [k, 1, 3S], to broadcast with `_lines`."""
    return tf.tile(x, [1, size])[:, None, :]


def _lines(images):
    size = _length(images)
    return tf.reshape(images, [-1, size, 3 * size])


def _flat(images):
    return tf.reshape(images, [-1, 3 * _length(images) ** 2])


def _like(images, x):
    return tf.reshape(x, [-1, *images.shape[1:]])
