"""Views of a batch on the device, inside a compiled step; equal to those of `crop` and `host`.

Nothing here draws random numbers. All rows go through the same computation; the parameters of a row
select its operation. Without branches and sorting, rows stay independent on any number of devices.
An operation takes at most three passes over the batch: move pixels (`warp`), replace levels
(`_levels`: for most operations a table of 256 levels for each channel), mix with another image
(`_blend`).

Results equal Pillow's bit for bit; where a compiler might round differently, integers are used. In
this file m is the number of images, S their side and P = S² their number of pixels. Pixels are
int32 [m, P], three channels packed into one number, because a look-up costs the same for one
channel as for three; or "planes", int32 [m, 3, P].
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from layermatch_jax.arrays import Array
from layermatch_jax.batches import TrainBatch
from layermatch_jax.data.augment.operations import CUTOUT_COLOR, NAMES
from layermatch_jax.data.sampler import Draws
from layermatch_jax.views import Layout


class ResidentData(NamedTuple):
    """The training images and labels on a device."""

    labeled_images: jax.Array  # [N_l, R, R, 3] uint8
    labels: jax.Array  # [N_l] int32
    unlabeled_images: jax.Array  # [N_u, R, R, 3] uint8
    true_labels: jax.Array  # [N_u] int32; -1 = unknown, or a labeled image


def make_batch(
    data: ResidentData, draws: Draws, layout: Layout, padding: int, image_size: int
) -> TrainBatch:
    """Makes some rows of a step's batch from the whole training set and the draws of these rows.

    Args:
      data: the training set.
      draws: `Sampler.draw(step)` or some of its rows, as arrays on the device.
      layout: the layout of the draws' views.
      padding: reflected border, pixels.
      image_size: S.

    Returns:
      The same TrainBatch that `pipeline.train_batches` yields for these rows.
    """
    count, size = len(draws.labeled), image_size

    def flat(x):  # [B, A, ...] -> [B·A, ...]
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])  # -1 fails without operations

    def crops(images, positions, v):  # positions [B, n], v: the n views' positions in the layout
        got = crop_and_flip(
            images,
            positions.reshape(-1),
            flat(draws.offset[:, v]),
            draws.flip[:, v].reshape(-1),
            padding,
            size,
        )
        return got.reshape(count, -1, size, size, 3)

    views = []
    for name in layout.views.labeled:
        v = layout.labeled(name)
        views.append(crops(data.labeled_images, draws.labeled[:, None], slice(v, v + 1)))
    if layout.mu:
        for name in layout.views.unlabeled:
            v = layout.unlabeled(name)
            views.append(crops(data.unlabeled_images, draws.unlabeled, v))
    images = jnp.concatenate(views, axis=1)
    if layout.augmented:
        ground = jnp.concatenate(layout.only_augmented(images), axis=1)
        strong = strong_views(
            *map(flat, (ground, draws.op, draws.value, draws.affine, draws.cutout))
        )
        strong = strong.reshape(ground.shape)
        images = jnp.concatenate(layout.with_augmented(images, strong), axis=1)
    return TrainBatch(
        images=images,
        labels=data.labels[draws.labeled],
        labeled_indices=draws.labeled,
        unlabeled_indices=draws.unlabeled,
        true_labels=data.true_labels[draws.unlabeled],
        draws=draws.policy,
    )


def crop_and_flip(
    images: jax.Array,
    positions: jax.Array,
    offset: Array,
    flip: Array,
    padding: int,
    size: int,
) -> jax.Array:
    """Computes `crop.crop_and_flip` of images[positions] without copies other than the views.

    Args:
      images: uint8 [N, R, R, C].
      positions: int32 [n], the image of each view, 0..N - 1.
      offset: int32 [n, 2], (y, x) of the crop in the padded image, pixels, 0..R + 2·padding - size.
        Offsets and positions are not checked, because a compiled program cannot raise.
      flip: bool [n], whether to mirror the crop (not the image).
      padding: pixels added on each side, without repeating the border.
      size: side of the crop, pixels.

    Returns:
      uint8 [n, size, size, C].

    Raises:
      ValueError: the padded image is smaller than the crop.
    """
    side = images.shape[1]
    if side + 2 * padding < size:
        raise ValueError(
            f"crops of {size} pixels are larger than images of {side} pixels padded by {padding}"
        )
    period = max(2 * (side - 1), 1)

    def source(padded):  # position in the padded image -> position in the image
        inside = (padded - padding) % period
        return jnp.minimum(inside, period - inside)

    along = jnp.arange(size)[None, :]
    y = source(offset[:, :1] + along)
    x = source(offset[:, 1:] + jnp.where(flip[:, None], size - 1 - along, along))
    where = (positions[:, None, None], y[:, :, None], x[:, None, :])
    return images.at[where].get(mode="promise_in_bounds")


def strong_views(
    images: jax.Array, op: jax.Array, value: jax.Array, affine: jax.Array, cutout: jax.Array
) -> jax.Array:
    """Applies n operations in order to each image, then Cutout.

    Args:
      images: uint8 [m, S, S, 3].
      op: int32 [m, n], operations by their position in `operations.RANDAUGMENT`.
      value: float32 [m, n], their magnitudes in the units and ranges given there.
      affine: int32 [m, n, 6], `operations.coefficients` of these.
      cutout: int32 [m, 4], the box to fill (y0, x0, y1, x1), half-open, pixels.

    Returns:
      uint8 [m, S, S, 3]. Each row depends only on the same row of the arguments.
    """
    pixels = _pack(images.astype(jnp.int32).reshape(len(images), images.shape[1] ** 2, 3), axis=2)
    draws = (op.T, value.T, affine.swapaxes(0, 1))
    pixels, _ = jax.lax.scan(lambda x, draw: (_apply(x, *draw), None), pixels, draws)
    images = _unpack(pixels, axis=2).astype(jnp.uint8).reshape(images.shape)
    return cut_out(images, cutout)


def _apply(pixels, op, value, affine):
    """Applies an operation to each image; op int32 [m], value float32 [m], affine int32 [m, 6]."""
    chosen = {name: (op == k)[:, None, None] for k, name in enumerate(NAMES)}
    value = value[:, None, None]
    planes = _unpack(warp(pixels, affine), axis=1)
    planes = _look_up(_levels(planes, chosen, value), planes)
    return _pack(_blend(planes, chosen, value), axis=1)


def cut_out(images: jax.Array, box: jax.Array) -> jax.Array:
    """Fills the box (y0, x0, y1, x1), half-open, int32 [m, 4], with gray. uint8 [m, S, S, 3]."""
    along = jnp.arange(images.shape[1])[None, :]
    line = (along >= box[:, 0:1]) & (along < box[:, 2:3])
    column = (along >= box[:, 1:2]) & (along < box[:, 3:4])
    inside = (line[:, :, None] & column[:, None, :])[..., None]
    return jnp.where(inside, jnp.array(CUTOUT_COLOR, jnp.uint8)[None, None, None], images)


def warp(pixels: jax.Array, affine: jax.Array) -> jax.Array:
    """Moves packed pixels, int32 [m, P], by the maps of `operations.coefficients`, int32 [m, 6]."""
    size = math.isqrt(pixels.shape[1])
    x, y = jnp.arange(size)[None, None, :], jnp.arange(size)[None, :, None]
    a, b, c, d, e, f = (affine[:, k, None, None] for k in range(6))
    x, y = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
    inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
    index = jnp.where(inside, y * size + x, 0)
    return jnp.where(inside.reshape(pixels.shape), _look_up(pixels, index.reshape(pixels.shape)), 0)


def _look_up(table, index):
    """Looks up index int32 [..., P] in the table [..., N]; returns [..., P]."""
    return jnp.take_along_axis(table, index, axis=-1, mode="promise_in_bounds")


def _pack(channels, axis):
    """Packs red, green and blue into one integer, to move them together; drops the axis."""
    red, green, blue = (jax.lax.index_in_dim(channels, k, axis, keepdims=False) for k in range(3))
    return red | green << 8 | blue << 16


def _unpack(pixels, axis):
    return jnp.stack([pixels & 255, pixels >> 8 & 255, pixels >> 16], axis=axis)


def _levels(planes, chosen, value):
    """Makes the table that replaces each channel's 256 levels: int32 [m, 3, 256]."""
    level = jnp.arange(256)[None, None, :]
    low, high = (f(planes, axis=2, keepdims=True) for f in (jnp.min, jnp.max))
    mean = _mean(_luma(planes))
    tables = {
        "autocontrast": _stretch(level, low, high),
        "brightness": _mix(jnp.zeros_like(level), level, value),
        "contrast": _mix(mean, level, value),
        "equalize": _even(level, _histogram(planes)),
        "posterize": level & (256 - (1 << (8 - jnp.maximum(value.astype(jnp.int32), 1)))),
        "solarize": jnp.where(level.astype(jnp.float32) >= value, 255 - level, level),
    }
    for name, table in tables.items():
        level = jnp.where(chosen[name], table, level)
    return level


def _stretch(level, low, high):
    """Makes the table of `ImageOps.autocontrast`; low (to 0) and high (to 255): int32 [m, 3, 1]."""
    span = high - low
    stretched = _quotient((level - low) * 255, jnp.maximum(span, 1))
    short = jnp.asarray(_falls_short())[low[:, :, 0], high[:, :, 0]]
    short = (short[..., None] >> jnp.arange(7, -1, -1, dtype=jnp.uint8)[None, None, None]) & 1
    return jnp.where(span > 0, stretched - short.reshape(*low.shape[:2], 256), level)


@functools.cache
def _falls_short():
    """Marks, as bits, where Pillow's autocontrast is one level below the exact result.

    Pillow multiplies and adds in float64 and truncates. If the exact result is a whole number, the
    float64 result may be slightly smaller.

    Returns uint8 [256, 256, 32]: lowest level, highest level, level / 8.
    """
    short = np.zeros((256, 256, 256), bool)
    for span in range(1, 256):
        whole = math.gcd(span, 255)  # number of whole-number results other than 0
        low = np.arange(256 - span)[:, None]
        level = low + span // whole * np.arange(1, whole + 1)
        scale = 255.0 / span
        short[low, low + span, level] = level * scale + -low * scale < (level - low) * 255 // span
    return np.packbits(short, axis=-1)


def _even(level, count):
    """Makes the table of `ImageOps.equalize` from histograms, int32 [m, 3, 256]."""
    darker = jnp.cumsum(count, axis=2) - count
    brightest_left_out = jnp.max(jnp.where(count > 0, darker, 0), axis=2, keepdims=True)
    step = brightest_left_out // 255
    even = jnp.minimum(_quotient(darker + step // 2, jnp.maximum(step, 1)), 255)
    return jnp.where(step > 0, even, level)


def _histogram(planes):
    """Counts the pixels of each level in each channel: int32 [m, 3, 256]."""
    index = (planes + 256 * jnp.arange(3)[None, :, None]).reshape(len(planes), 3 * planes.shape[2])

    def count(index):
        return jnp.zeros(3 * 256, jnp.int32).at[index].add(1, mode="promise_in_bounds")

    return jax.vmap(count)(index).reshape(len(planes), 3, 256)


def _blend(planes, chosen, value):
    """Applies color and sharpness, which mix an image with another image."""
    other = jnp.where(chosen["color"], _luma(planes), _smooth(planes))
    value = jnp.where(chosen["color"] | chosen["sharpness"], value, 1.0)
    return _mix(other, planes, value)


def _luma(planes):
    """Computes gray levels, int32 [m, 1, P], like `image.convert("L")`."""
    red, green, blue = jnp.split(planes, 3, axis=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 2**15) >> 16


def _mean(luma):
    """Computes the rounded mean of gray levels, int32 [m, 1, 1]."""
    area = luma.shape[2]
    return (2 * jnp.sum(luma, axis=2, keepdims=True) + area) // (2 * area)


def _smooth(planes):
    """Applies `ImageFilter.SMOOTH`, which leaves the border unchanged."""
    size = math.isqrt(planes.shape[2])
    x = planes.reshape(len(planes), 3, size, size)
    total = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    total = total[..., :-2] + total[..., 1:-1] + total[..., 2:]
    center = x[:, :, 1:-1, 1:-1]
    change = _quotient(total + 4 * center + 6, jnp.int32(13)) - center
    return (x + jnp.pad(change, [(0, 0), (0, 0), (1, 1), (1, 1)])).reshape(planes.shape)


def _quotient(a, b):
    """Computes int32 a // b for 0 ≤ a / b < 256 and b < 10,000, in float32, which is faster.

    This is exact: (a + 0.5) / b is at least 0.5 / b = 5e-5 from a whole number, and three roundings
    change it by less than 256 · 3 · 2^-24 = 4.6e-5.
    """
    return jnp.floor((a.astype(jnp.float32) + 0.5) / b.astype(jnp.float32)).astype(jnp.int32)


def _mix(first, second, value):
    """Computes `Image.blend(first, second, value)` for 0 ≤ value ≤ 1; int32 in and out."""
    change = value * (second - first).astype(jnp.float32)
    # The maximum changes no value. It keeps compilers from fusing the multiplication and the
    # addition: fused, they round once, and Pillow rounds twice.
    return (first.astype(jnp.float32) + jnp.maximum(change, -256.0)).astype(jnp.int32)
