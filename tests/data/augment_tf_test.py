import functools
import platform

import numpy as np
import pytest
from augment_builders import (
    SETS,
    degenerate,
    draws,
    magnitudes,
    photographs,
    pillow,
    pillow_chain,
)
from PIL import Image, ImageDraw

from layermatch_jax.data import sampler
from layermatch_jax.data.augment import operations
from layermatch_jax.data.augment.operations import GEOMETRIC, NAMES

tf = pytest.importorskip("tensorflow")

from layermatch_jax.data.augment import host  # noqa: E402

# On x86-64 nothing differs from Pillow. Elsewhere compilers may fuse a multiplication with an
# addition in Pillow, or round sines otherwise: one level, or one pixel in 10,000.
EXACT = platform.machine() in ("x86_64", "AMD64")
LEVELS = 0 if EXACT else 1
PIXELS = 0 if EXACT else 1e-4


@functools.cache
def strong_views(size, n):
    """A graph that does not know the number of images, as in the pipeline."""
    shapes = [(size, size, 3), (n,), (n,), (n, 6), (4,)]
    kinds = [tf.uint8, tf.int32, tf.float32, tf.int32, tf.int32]
    signature = [tf.TensorSpec([None, *x], kind) for x, kind in zip(shapes, kinds, strict=True)]
    return tf.function(host.strong_views, input_signature=signature)


def run(images, op, value, affine=None, cutout=None):
    if cutout is None:
        cutout = np.zeros((len(images), 4), np.int32)
    op, value = np.asarray(op, np.int32), np.asarray(value, np.float32)
    if affine is None:
        affine = operations.coefficients(op, value, images.shape[1])
    return strong_views(images.shape[1], op.shape[1])(images, op, value, affine, cutout).numpy()


def compare(images, tasks):
    """One batch of (image number, operation, magnitude), against Pillow.

    Returns the operations that are off by more than they may be, and for each operation the share
    of images that it changed.
    """
    index, name, value = (np.array(column) for column in zip(*tasks, strict=True))
    got = run(images[index], [[NAMES.index(n)] for n in name], value[:, None])
    want = np.stack([pillow(images[i], n, v) for i, n, v in zip(index, name, value, strict=True)])
    difference = np.abs(got.astype(int) - want)
    wrong = {}
    for operation in set(name):
        off = difference[name == operation]
        share = (off > 0).any(-1).mean()
        if share > PIXELS if operation in GEOMETRIC else off.max() > LEVELS:
            wrong[operation] = off.max(), share
    changed = (want != images[index]).any((1, 2, 3))
    return wrong, {operation: changed[name == operation].mean() for operation in set(name)}


@pytest.mark.parametrize("kind", SETS)
def test_every_operation_is_pillows(kind):
    images = SETS[kind]()
    tasks = [(i, name, v) for name in NAMES for i, v in enumerate(magnitudes(name, len(images)))]
    wrong, changed = compare(images, tasks)
    assert not wrong
    assert changed.pop("identity") == 0
    assert min(changed.values()) > 0.4, f"hardly tested: {changed}"


@pytest.mark.parametrize("size", [8, 32])
def test_degenerate_images(size):
    images = degenerate(size)
    tasks = [
        (i, name, v) for name in NAMES for v in magnitudes(name, 6) for i in range(len(images))
    ]
    assert not compare(images, tasks)[0]


def test_autocontrast_rounds_as_pillow_for_every_range():
    # The smallest and largest level decide; float64 products fall short of whole numbers for some.
    low, high = (x.ravel() for x in np.meshgrid(np.arange(0, 256, 13), np.arange(0, 256, 3)))
    images = np.empty((len(low), 16, 16, 3), np.uint8)
    ramp = np.arange(256).reshape(16, 16)
    for image, a, b in zip(images, low, high, strict=True):
        image[...] = np.clip(ramp, min(a, b), max(a, b))[..., None]
    got = run(images, np.zeros((len(low), 1)), np.zeros((len(low), 1)))
    want = np.stack([pillow(image, "autocontrast", 0) for image in images])
    np.testing.assert_array_equal(got, want)


def test_shifts_are_not_rounded_to_fixed_point():
    # 0.5 pixels, and slightly less; 16.16 numbers cannot represent the difference.
    images, shift = photographs(32, 2), NAMES.index("translate_x")
    value = np.array([0.5, 0.5 - 2**-18], np.float32) / 32
    got = run(images, [[shift], [shift]], value[:, None])
    assert (got[0, :, :-1] == images[0, :, 1:]).all()
    assert (got[1] == images[1]).all()
    assert not compare(images, [(i, "translate_x", v) for i, v in enumerate(value)])[0]


def test_known_numbers():
    """By hand, without Pillow: a 4×4 image of the levels 0, 16, … 240 in all channels."""
    level = np.arange(0, 256, 16).reshape(4, 4)
    image = np.repeat(level[None, :, :, None], 3, axis=3).astype(np.uint8)

    def result(name, value):
        got = run(image, [[NAMES.index(name)]], [[value]])[0]
        assert (got == got[..., :1]).all()
        return got[..., 0].tolist()

    assert result("brightness", 0.5) == (level // 2).tolist()
    assert result("color", 0.3) == level.tolist()  # gray already
    # mean 120: 120 + 0.5 · (level - 120)
    assert result("contrast", 0.5) == (60 + level // 2).tolist()
    assert result("posterize", 5.9) == (level & 0b11111000).tolist()
    assert result("solarize", 100) == np.where(level < 100, level, 255 - level).tolist()
    # [x + 0.5 + 0.25 · 4] = x + 1: the columns move to the left by one.
    black = np.zeros((4, 1), int)
    assert result("translate_x", 0.25) == np.hstack([level[:, 1:], black]).tolist()
    assert result("translate_y", -0.25) == np.vstack([black.T, level[:-1]]).tolist()
    # [x + 0.5 + 0.3 · (y + 0.5)] = x + (0, 0, 1, 1): the rows from the third on move.
    sheared = level.copy()
    sheared[2:] = np.hstack([level[2:, 1:], black[2:]])
    assert result("shear_x", 0.3) == sheared.tolist()
    # 240 is stretched to 255, 16 to 17.
    assert result("autocontrast", 0) == (level * 17 // 16).tolist()
    # An inner level v has neighbors v ± 16, 64, 48, 80, of mean v: smoothing changes nothing.
    assert result("sharpness", 0.05) == level.tolist()


def test_equalize_known_numbers():
    # 510 pixels 10, 255 pixels 20, 259 pixels 30: step = 765 // 255 = 3, and a level becomes
    # (pixels below it + 1) // 3: 0, 170, and 255, where the sum is 766 // 3.
    levels = np.repeat([10, 20, 30], [510, 255, 259]).reshape(1, 32, 32, 1)
    got = run(np.repeat(levels, 3, 3).astype(np.uint8), [[NAMES.index("equalize")]], [[0.0]])
    assert np.unique(got).tolist() == [0, 170, 255]
    np.testing.assert_array_equal(got[0, ..., 0] == 170, levels[0, ..., 0] == 20)


@pytest.mark.parametrize(("size", "count"), [(32, 300), (96, 30)])
def test_chains_of_three_and_cutout(size, count):
    images = photographs(size, count)
    op, value, affine, cutout = draws(count, 3, size)
    assert set(op.ravel()) == set(range(14))
    got = run(images, op, value, affine, cutout)
    want = map(pillow_chain, images, op, value, cutout)
    differing = [(a != b).any() for a, b in zip(want, got, strict=True)]
    # A level off in the first operation may become anything in the third: whole images count.
    assert np.mean(differing) <= (0 if EXACT else 0.02)


def test_cutout_boxes_are_the_reference_codes():
    """The reference draws with Pillow from a center and a side: same numbers, same pixels."""
    size, count = 32, 200
    boxes = sampler._cutout_boxes(np.random.default_rng(5), (count,), size)
    rng = np.random.default_rng(5)
    side = rng.uniform(0, 0.5, count) * size
    center = rng.uniform(0, size, (count, 2))  # y, x
    images = photographs(size, count)
    got = run(images, np.zeros((count, 0)), np.zeros((count, 0)), cutout=boxes)
    for image, v, (cy, cx), cut in zip(images, side, center, got, strict=True):
        x0, y0 = int(max(0, cx - v / 2)), int(max(0, cy - v / 2))
        x1, y1 = min(size, x0 + v), min(size, y0 + v)
        want = Image.fromarray(image)
        ImageDraw.Draw(want).rectangle((x0, y0, x1, y1), (125, 123, 114))
        np.testing.assert_array_equal(cut, np.asarray(want))


def test_empty_and_whole_boxes():
    images = photographs(8, 3)
    boxes = np.array([[3, 3, 3, 6], [0, 0, 8, 8], [7, 0, 8, 1]], np.int32)
    got = run(images, np.zeros((3, 0)), np.zeros((3, 0)), cutout=boxes)
    np.testing.assert_array_equal(got[0], images[0])
    assert (got[1] == (125, 123, 114)).all()
    assert (got[2] != images[2]).any(-1).sum() == 1
    assert got[2, 7, 0].tolist() == [125, 123, 114]


def test_a_row_depends_on_nothing_else_in_the_batch():
    images = photographs(32, 56)
    arrays = (images, *draws(56, 3, 32, seed=1))
    whole = run(*arrays)
    for rows in (np.random.default_rng(2).permutation(56), slice(0, 1), slice(5, 12), slice(0, 0)):
        np.testing.assert_array_equal(run(*(x[rows] for x in arrays)), whole[rows])


def test_inside_a_tf_data_map():
    images = photographs(32, 20)
    arrays = (images, *draws(20, 3, 32, seed=3))
    dataset = tf.data.Dataset.from_tensor_slices(arrays).batch(8)
    dataset = dataset.map(host.strong_views, num_parallel_calls=2)
    assert dataset.element_spec.shape.as_list() == [None, 32, 32, 3]
    got = np.concatenate(list(dataset.as_numpy_iterator()))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, run(*arrays))


@pytest.mark.parametrize("op", [-1, 14])
def test_unknown_operation(op):
    with pytest.raises(tf.errors.InvalidArgumentError):
        run(photographs(8, 1), [[op]], [[0.0]])
