"""The strong view in tf.data: RandAugment and Cutout on whole batches, as drawn by `sampler`.

Nothing here draws random numbers. The rows of a batch are grouped by operation and each operation
runs once on its group: per image, tf.data would spend its time starting operations. All of them
are bit for bit Pillow's on RGB images, so its roundings are followed to the letter: blends are
float32 and truncated, affine maps 16.16 fixed-point numbers.

How it is written follows from what TensorFlow does fast on a CPU, which is plain arithmetic along
long rows. So images are seen as [k, S, 3S] (lines of interleaved channels) or [k, 3S²] where an
operation allows it; gathers (about 20 times an addition) and `tf.where` on uint8 are avoided.

k is the number of images that an operation is applied to, S their side in pixels.
"""

import math

import tensorflow as tf

from layermatch_jax.data import sampler

CUTOUT_COLOR = (125, 123, 114)
_LUMA = (19595.0, 38470.0, 7471.0)  # ITU-R 601-2 as Pillow has it, · 2^16
_ONE = 1 << 16  # of 16.16 fixed-point numbers


def strong_views(
    images: tf.Tensor, op: tf.Tensor, value: tf.Tensor, cutout: tf.Tensor
) -> tf.Tensor:
    """Applies n operations in order to each image, then Cutout.

    Args:
      images: uint8 [m, S, S, 3], S known when the graph is built. m may be unknown, or 0.
      op: int32 [m, n], operations by their position in `sampler.RANDAUGMENT`; n known.
      value: float32 [m, n], their magnitudes in the units and ranges given there.
      cutout: int32 [m, 4], box (y0, x0, y1, x1) to fill, half-open, pixels.

    Returns:
      uint8 [m, S, S, 3]. A row depends on nothing but its own row of the arguments.

    Raises:
      tf.errors.InvalidArgumentError: when run, if an op is not in the list.
    """
    size = images.shape[1]
    for k in range(op.shape[1]):
        rows = tf.dynamic_partition(tf.range(tf.shape(op)[0]), op[:, k], len(_OPERATIONS))
        parts = [
            operation(tf.gather(images, r), tf.gather(value[:, k], r))
            for operation, r in zip(_OPERATIONS, rows, strict=True)
        ]
        images = tf.ensure_shape(tf.dynamic_stitch(rows, parts), [None, size, size, 3])
    return cut_out(images, cutout)


def cut_out(images: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """Fills the box (y0, x0, y1, x1), half-open, int32 [k, 4], with grey. uint8 [k, S, S, 3]."""
    size = images.shape[1]
    pixel = tf.range(size)

    def inside(low, high):
        within = (pixel >= box[:, low, None]) & (pixel < box[:, high, None])
        return tf.cast(within, tf.uint8) * 255  # all bits of a byte

    rows = inside(0, 2)[:, :, None]
    columns = tf.repeat(inside(1, 3), 3, axis=1)[:, None, :]
    grey = tf.constant(CUTOUT_COLOR * size, tf.uint8)
    keep = ~rows | ~columns
    return _like(images, (_lines(images) & keep) | (rows & (columns & grey)))


# The operations: (uint8 [k, S, S, 3], float32 [k]) -> uint8 [k, S, S, 3].


def autocontrast(images, _):
    """Stretches each channel to 0..255. `ImageOps.autocontrast(image)`."""
    size = images.shape[1]
    pixels = tf.reshape(images, [-1, size**2, 3])
    low = tf.cast(tf.reduce_min(pixels, 1), tf.float64)
    high = tf.cast(tf.reduce_max(pixels, 1), tf.float64)
    flat = high <= low
    one, zero = tf.constant(1.0, tf.float64), tf.constant(0.0, tf.float64)
    scale = tf.where(flat, one, 255.0 / tf.where(flat, one, high - low))
    offset = tf.where(flat, zero, -low * scale)
    # In float64 and in this order the result falls below a whole number where Pillow's does.
    x = tf.cast(_lines(images), tf.float64)
    x = x * _per_channel(scale, size) + _per_channel(offset, size)
    return _like(images, tf.cast(tf.clip_by_value(x, 0.0, 255.0), tf.uint8))


def brightness(images, value):
    """Blends with black; value: share of the image. `ImageEnhance.Brightness(image)`."""
    return _like(images, tf.cast(tf.cast(_flat(images), tf.float32) * value[:, None], tf.uint8))


def color(images, value):
    """Blends with its grey version; value: share of the image. `ImageEnhance.Color(image)`."""
    x = tf.cast(_flat(images), tf.float32)
    return _blend(images, tf.reshape(_luma(images), tf.shape(x)), x, value[:, None])


def contrast(images, value):
    """Blends with its mean grey level; value: share of the image. `ImageEnhance.Contrast(image)`."""
    area = images.shape[1] ** 2
    total = tf.reduce_sum(tf.cast(tf.reshape(_luma(images), [-1, area, 3])[..., 0], tf.int32), 1)
    mean = tf.cast((2 * total + area) // (2 * area), tf.float32)
    return _blend(images, mean[:, None], tf.cast(_flat(images), tf.float32), value[:, None])


def equalize(images, _):
    """Makes each channel's histogram uniform. `ImageOps.equalize(image)`."""
    size = images.shape[1]
    k = tf.shape(images)[0]
    first = 256 * tf.reshape(tf.range(3 * k), [k, 3])  # one table of 256 per row and channel
    index = tf.cast(_lines(images), tf.int32) + _per_channel(first, size)
    counts = tf.raw_ops.Bincount(
        arr=index, size=256 * 3 * k, weights=tf.zeros([0], tf.int32)
    )
    counts = tf.reshape(counts, [-1, 256])
    darker = tf.cumsum(counts, axis=1, exclusive=True)
    but_brightest = tf.reduce_max(tf.where(counts > 0, darker, 0), axis=1, keepdims=True)
    step = but_brightest // 255
    table = tf.minimum((darker + step // 2) // tf.maximum(step, 1), 255)
    table = tf.cast(tf.where(step > 0, table, tf.range(256)), tf.uint8)
    return _like(images, tf.gather(tf.reshape(table, [-1]), index))


def identity(images, _):
    """Returns the images."""
    return images


def posterize(images, value):
    """Keeps the highest bits; value: their number, its integer part. `ImageOps.posterize`."""
    bits = tf.maximum(tf.cast(value, tf.int32), 1)
    mask = tf.cast(256 - tf.bitwise.left_shift(1, 8 - bits), tf.uint8)
    return _like(images, _flat(images) & mask[:, None])


def rotate(images, value):
    """Rotates about the centre; value: degrees counter-clockwise. `Image.rotate(value)`."""
    angle = -tf.cast(value, tf.float64) * (math.pi / 180)
    cos, sin = tf.cos(angle), tf.sin(angle)
    centre = images.shape[1] / 2
    c = cos * -centre + sin * -centre + centre
    f = -sin * -centre + cos * -centre + centre
    return _warp(images, cos, sin, c, -sin, cos, f)


def sharpness(images, value):
    """Blends with a smoothed version; value: share of the image. `ImageEnhance.Sharpness`."""
    x = tf.cast(_lines(images), tf.float32)
    rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    total = rows[:, :, :-6] + rows[:, :, 3:-3] + rows[:, :, 6:]
    centre = x[:, 1:-1, 3:-3]
    smooth = tf.floor((total + 4 * centre) / 13 + 0.5)
    smooth = x + tf.pad(smooth - centre, [[0, 0], [1, 1], [3, 3]])  # the border stays
    return _blend(images, smooth, x, value[:, None, None])


def shear_x(images, value):
    """Slants columns; value: slope."""
    return _warp(images, b=value)


def shear_y(images, value):
    """Slants lines; value: slope."""
    return _warp(images, d=value)


def solarize(images, value):
    """Inverts what is not darker; value: grey level. `ImageOps.solarize(image, value)`."""
    bright = tf.cast(_flat(images), tf.float32) >= value[:, None]
    return _like(images, _flat(images) ^ (tf.cast(bright, tf.uint8) * 255))


def translate_x(images, value):
    """Moves to the left; value: share of the side."""
    return _warp(images, c=tf.cast(value, tf.float64) * images.shape[1])


def translate_y(images, value):
    """Moves up; value: share of the side."""
    return _warp(images, f=tf.cast(value, tf.float64) * images.shape[1])


_OPERATIONS = [globals()[name] for name, *_ in sampler.RANDAUGMENT]


def _warp(images, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    """Pillow's affine map: pixel (x, y) is taken from (ax + by + c, dx + ey + f)."""
    size = images.shape[1]
    k = tf.shape(images)[0]
    a, b, c, d, e, f = (tf.cast(v, tf.float64) for v in (a, b, c, d, e, f))
    aligned = (b == 0) & (d == 0)
    half = tf.where(aligned, tf.constant(0.0, tf.float64), 0.5)

    def fix(v):
        return tf.cast(tf.floor(v * _ONE + half), tf.int32) + tf.zeros([k], tf.int32)
    pixel = tf.range(size)
    def source(u, v, w):
        at = (fix(u)[:, None] * pixel + fix(w + u / 2 + v / 2)[:, None])[:, None, :] + (
            fix(v)[:, None] * pixel)[:, :, None]
        return tf.bitwise.right_shift(at, 16)

    x, y = source(a, b, c), source(d, e, f)
    inside = (tf.bitcast(x, tf.uint32) < size) & (tf.bitcast(y, tf.uint32) < size)
    row = tf.range(k)[:, None, None] * size**2
    black = k * size**2
    pixels = tf.concat([tf.reshape(images, [-1, 3]), tf.zeros([1, 3], tf.uint8)], 0)
    return tf.gather(pixels, tf.where(inside, row + y * size + x, black))


def _luma(images):
    """Grey levels, three times: float32 [k * P, 3], whole numbers."""
    x = tf.reshape(tf.cast(images, tf.float32), [-1, 3])
    weights = tf.tile(tf.constant(_LUMA)[:, None], [1, 3])
    return tf.floor((tf.matmul(x, weights) + 2**15) / 2**16)


def _blend(images, degenerate, x, value):
    return _like(images, tf.cast(degenerate + value * (x - degenerate), tf.uint8))


def _lines(images):
    return tf.reshape(images, [-1, images.shape[1], images.shape[2] * 3])

def _flat(images):
    return tf.reshape(images, [-1, images.shape[1] * images.shape[2] * 3])

def _like(images, x):
    return tf.reshape(x, tf.shape(images))

def _per_channel(x, size):
    return tf.tile(x, [1, size])[:, None, :]
