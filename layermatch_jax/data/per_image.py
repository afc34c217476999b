"""Baseline of the input benchmark: weak and strong views by tf.data, written the usual way.

The map function gets single images and runs one TensorFlow operation after another. Only the
benchmark and its test use this module.
"""

import functools
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from layermatch_jax.data.augment.operations import CUTOUT_COLOR, NAMES
from layermatch_jax.data.images import Images
from layermatch_jax.data.sampler import Sampler


def view_batches(
    images: Images, sampler: Sampler, padding: int, steps: int = 8
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Makes the views of the unlabeled images of the first steps, again and again.

    Args:
      images: the unlabeled images.
      sampler: the sampler of the run.
      padding: reflected border before the crop, pixels.
      steps: number of steps; their images and draws are put into memory beforehand.

    Yields:
      Weak and strong views, uint8 [μB, size, size, 3] each, in the order of the rows.
    """
    draws = [sampler.draw(step) for step in range(steps)]
    rows = sampler.batch_size * sampler.layout.mu
    weak, strong = (sampler.layout.unlabeled(name) for name in ("weak", "strong"))

    def by_image(of_step):
        return np.concatenate([x.reshape(rows, *x.shape[2:]) for x in map(of_step, draws)])

    def of_views(x):  # [B, V, ...] -> [B, μ, (weak, strong), ...]
        return np.stack([x[:, weak], x[:, strong]], axis=2)

    elements = (
        images.read(by_image(lambda d: d.unlabeled)),
        by_image(lambda d: of_views(d.offset)),
        by_image(lambda d: of_views(d.flip)),
        by_image(lambda d: d.op),
        by_image(lambda d: d.value),
        by_image(lambda d: d.cutout),
    )
    dataset = tf.data.Dataset.from_tensor_slices(elements).repeat()
    dataset = dataset.map(
        functools.partial(_views, padding=padding, size=sampler.image_size),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    dataset = dataset.batch(rows).prefetch(2)
    # TensorFlow's type stubs do not cover data sets of pairs.
    return dataset.as_numpy_iterator()  # pyright: ignore[reportReturnType]


@tf.autograph.experimental.do_not_convert
def _views(image, offset, flip, op, value, cutout, *, padding, size):
    """Makes both views of an image [R, R, 3] from its draws: n operations, 2 offsets and flips."""
    padded = tf.pad(image, [[padding, padding], [padding, padding], [0, 0]], "REFLECT")

    def view(v):
        x = tf.slice(padded, [offset[v, 0], offset[v, 1], 0], [size, size, 3])
        return tf.cond(flip[v], lambda: x[:, ::-1], lambda: x)

    strong = view(1)
    for k in range(op.shape[0]):
        branches = [functools.partial(_OPERATIONS[name], strong, value[k]) for name in NAMES]
        strong = tf.ensure_shape(tf.switch_case(op[k], branches), [size, size, 3])
    position = tf.range(size)
    rows = (position >= cutout[0]) & (position < cutout[2])
    columns = (position >= cutout[1]) & (position < cutout[3])
    box = (rows[:, None] & columns[None, :])[..., None]
    return view(0), tf.where(box, tf.constant(CUTOUT_COLOR, tf.uint8), strong)


def _blend(first, second, value):
    first, second = tf.cast(first, tf.float32), tf.cast(second, tf.float32)
    return tf.cast(first + value * (second - first), tf.uint8)


def _gray(image):
    total = tf.reduce_sum(tf.cast(image, tf.int32) * [19595, 38470, 7471], -1, keepdims=True)
    return (total + 32768) // 65536


def _autocontrast(image, _):
    x = tf.cast(image, tf.float64)
    low, high = tf.reduce_min(x, [0, 1]), tf.reduce_max(x, [0, 1])
    scale = tf.where(high > low, 255 / tf.maximum(high - low, 1), 1)
    offset = tf.where(high > low, -low * scale, 0)
    return tf.cast(tf.clip_by_value(x * scale + offset, 0, 255), tf.uint8)


def _brightness(image, value):
    return _blend(tf.zeros_like(image), image, value)


def _color(image, value):
    return _blend(_gray(image), image, value)


def _contrast(image, value):
    mean = tf.reduce_mean(tf.cast(_gray(image), tf.float32))
    return _blend(tf.floor(mean + 0.5), image, value)


def _equalize(image, _):
    def channel(x):
        x = tf.cast(x, tf.int32)
        count = tf.math.bincount(tf.reshape(x, [-1]), minlength=256, maxlength=256)
        step = (tf.size(x) - count[tf.reduce_max(x)]) // 255
        level = (tf.cumsum(count, exclusive=True) + step // 2) // tf.maximum(step, 1)
        return tf.where(step > 0, tf.gather(tf.minimum(level, 255), x), x)

    return tf.cast(tf.stack([channel(image[..., c]) for c in range(3)], -1), tf.uint8)


def _posterize(image, value):
    shift = tf.cast(8 - tf.cast(value, tf.int32), tf.uint8)
    return tf.bitwise.left_shift(tf.bitwise.right_shift(image, shift), shift)


def _sharpness(image, value):
    kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32)
    kernel = tf.tile(kernel[:, :, None, None], [1, 1, 3, 1])
    x = tf.cast(image, tf.float32)
    smooth = tf.nn.depthwise_conv2d(x[None], kernel, [1, 1, 1, 1], "VALID")[0]
    change = tf.floor(smooth / 13 + 0.5) - x[1:-1, 1:-1]
    return _blend(x + tf.pad(change, [[1, 1], [1, 1], [0, 0]]), image, value)


def _solarize(image, value):
    return tf.where(tf.cast(image, tf.float32) < value, image, 255 - image)


def _affine(image, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    # TensorFlow's kernel counts from the center of the first pixel, Pillow from its corner.
    c, f = c + (a + b - 1) / 2, f + (d + e - 1) / 2
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=[[a, b, c, d, e, f, 0.0, 0.0]],
        output_shape=image.shape[:2],
        fill_value=0.0,
        interpolation="NEAREST",
    )[0]


def _rotate(image, value):
    angle, half = -value * np.pi / 180, image.shape[0] / 2
    cos, sin = tf.cos(angle), tf.sin(angle)
    return _affine(image, cos, sin, half * (1 - cos - sin), -sin, cos, half * (1 + sin - cos))


_OPERATIONS = {
    "autocontrast": _autocontrast,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "equalize": _equalize,
    "identity": lambda image, _: image,
    "posterize": _posterize,
    "rotate": _rotate,
    "sharpness": _sharpness,
    "shear_x": lambda image, v: _affine(image, b=v),
    "shear_y": lambda image, v: _affine(image, d=v),
    "solarize": _solarize,
    "translate_x": lambda image, v: _affine(image, c=v * image.shape[1]),
    "translate_y": lambda image, v: _affine(image, f=v * image.shape[0]),
}
