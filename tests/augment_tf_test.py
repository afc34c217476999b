import functools
import os
import platform

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from layermatch_jax.data import sampler

tf = pytest.importorskip("tensorflow")

from layermatch_jax.data import augment_tf  # noqa: E402

NAMES = [name for name, *_ in sampler.RANDAUGMENT]
# On x86-64 nothing differs from Pillow. Elsewhere compilers may fuse a multiplication with an
# addition in Pillow, or round sines otherwise: one level, or one pixel in 10,000.
EXACT = platform.machine() in ("x86_64", "AMD64")
LEVELS = 0 if EXACT else 1
PIXELS = 0 if EXACT else 1e-4
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def pillow(image, name, value):
    """The reference: one operation on one array [S, S, 3], as TorchSSL and USB call Pillow."""
    image, value = Image.fromarray(image), float(value)
    enhancers = {
        "brightness": ImageEnhance.Brightness,
        "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "sharpness": ImageEnhance.Sharpness,
    }
    affine = {
        "shear_x": (1, value, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, value, 1, 0),
        "translate_x": (1, 0, value * image.width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, value * image.height),
    }
    if name in enhancers:
        image = enhancers[name](image).enhance(value)
    elif name in affine:
        image = image.transform(image.size, Image.Transform.AFFINE, affine[name])
    elif name == "autocontrast":
        image = ImageOps.autocontrast(image)
    elif name == "equalize":
        image = ImageOps.equalize(image)
    elif name == "posterize":
        image = ImageOps.posterize(image, max(1, int(value)))
    elif name == "rotate":
        image = image.rotate(value)
    elif name == "solarize":
        image = ImageOps.solarize(image, value)
    else:
        assert name == "identity"
    return np.asarray(image)


@functools.cache
def photographs(size, count):
    """Crops of scikit-learn's two photographs, scaled to `size`."""
    rng = np.random.default_rng(size)
    photos = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    images = []
    for i in range(count):
        photo = photos[i % 2]
        side = rng.integers(size, 400)
        y, x = rng.integers(0, (photo.shape[0] - side, photo.shape[1] - side))
        crop = Image.fromarray(photo[y : y + side, x : x + side])
        images.append(np.asarray(crop.resize((size, size))))
    return np.stack(images)


def degenerate(size):
    """Constant, black, white, two-level, almost constant, one-channel, noise, and ramp images."""
    rng = np.random.default_rng(1)
    levels = [np.full((size, size, 3), level) for level in (0, 1, 100, 254, 255)]
    share = rng.random((size, size, 1))
    two = [np.where(share < p, a, b) for p, a, b in ((0.5, 0, 255), (0.3, 7, 9), (0.9, 80, 200))]
    two = [np.broadcast_to(x, (size, size, 3)) for x in two]
    speck = np.full((size, size, 3), 60)
    speck[3, 5] = 61, 60, 200
    one = np.zeros((size, size, 3))
    one[..., 1] = rng.integers(0, 256, (size, size))
    noise = rng.integers(0, 256, (size, size, 3))
    ramp = np.broadcast_to((np.arange(size) * 255 // (size - 1))[None, :, None], (size, size, 3))
    return np.stack([*levels, *two, speck, one, noise, ramp]).astype(np.uint8)


def cifar(size, count):
    """CIFAR-10 training images, where they are prepared already."""
    if not os.environ.get("TFDS_DATA_DIR"):
        pytest.skip("set TFDS_DATA_DIR to a folder where tfds has prepared cifar10")
    tfds = pytest.importorskip("tensorflow_datasets")
    try:
        data = tfds.load("cifar10", split=f"train[:{count}]", download=False, batch_size=-1)
    except AssertionError:  # tfds's way of saying that it is not there
        pytest.skip("TFDS_DATA_DIR holds no prepared cifar10")
    images = data["image"].numpy()
    assert images.shape == (count, size, size, 3)
    return images


def magnitudes(name, count):
    """Both ends, just inside them, the middle (0 for signed ranges), and uniform ones."""
    low, high = {name: limits for name, *limits in sampler.RANDAUGMENT}[name]
    fixed = [low, high, np.nextafter(np.float32(high), np.float32(low)), (low + high) / 2]
    rng = np.random.default_rng(len(name))
    value = np.float32(low) + np.float32(high - low) * rng.random(count, np.float32)
    value[: len(fixed)] = fixed
    return rng.permutation(value)


@functools.cache
def strong_views(size, n):
    """A graph that does not know the number of images, as in the pipeline."""
    shapes = [(size, size, 3), (n,), (n,), (4,)]
    kinds = [tf.uint8, tf.int32, tf.float32, tf.int32]
    signature = [tf.TensorSpec([None, *x], kind) for x, kind in zip(shapes, kinds, strict=True)]
    return tf.function(augment_tf.strong_views, input_signature=signature)


def run(images, op, value, cutout=None):
    if cutout is None:
        cutout = np.zeros((len(images), 4), np.int32)
    op, value = np.asarray(op, np.int32), np.asarray(value, np.float32)
    return strong_views(images.shape[1], op.shape[1])(images, op, value, cutout).numpy()


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


SETS = {
    "photographs-32": lambda: photographs(32, 40),
    "photographs-96": lambda: photographs(96, 12),
    "photographs-33": lambda: photographs(33, 12),
    "cifar10": lambda: cifar(32, 200),
}


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
    # 0.5 and just less than 0.5 pixels, by less than 16.16 numbers can tell.
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
    assert result("color", 0.3) == level.tolist()  # grey already
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
    # An inner level v has neighbours v ± 16, 64, 48, 80, of mean v: smoothing changes nothing.
    assert result("sharpness", 0.05) == level.tolist()


def test_equalize_known_numbers():
    # 510 pixels 10, 255 pixels 20, 259 pixels 30: step = 765 // 255 = 3, and a level becomes
    # (pixels below it + 1) // 3: 0, 170, and 255, where the sum is 766 // 3.
    levels = np.repeat([10, 20, 30], [510, 255, 259]).reshape(1, 32, 32, 1)
    got = run(np.repeat(levels, 3, 3).astype(np.uint8), [[NAMES.index("equalize")]], [[0.0]])
    assert np.unique(got).tolist() == [0, 170, 255]
    np.testing.assert_array_equal(got[0, ..., 0] == 170, levels[0, ..., 0] == 20)


def draws(count, n, size, seed=0):
    rng = np.random.default_rng(seed)
    op = rng.integers(0, len(NAMES), (count, n)).astype(np.int32)
    low, high = np.array([limits for _, *limits in sampler.RANDAUGMENT], np.float32).T
    value = low[op] + (high - low)[op] * rng.random((count, n), np.float32)
    low = rng.integers(0, size, (count, 2))
    high = np.minimum(low + rng.integers(0, size // 2, (count, 2)) + 1, size)
    return op, value, np.concatenate([low, high], 1).astype(np.int32)


@pytest.mark.parametrize(("size", "count"), [(32, 300), (96, 30)])
def test_chains_of_three_and_cutout(size, count):
    images = photographs(size, count)
    op, value, cutout = draws(count, 3, size)
    assert set(op.ravel()) == set(range(14))
    got = run(images, op, value, cutout)
    differing = []
    for i in range(count):
        want = images[i]
        for k in range(3):
            want = pillow(want, NAMES[op[i, k]], value[i, k])
        want = Image.fromarray(want)
        y0, x0, y1, x1 = cutout[i].tolist()
        ImageDraw.Draw(want).rectangle((x0, y0, x1 - 1, y1 - 1), (125, 123, 114))
        differing.append((np.asarray(want) != got[i]).any())
    # A level off in the first operation may become anything in the third: whole images count.
    assert np.mean(differing) <= (0 if EXACT else 0.02)


def test_cutout_boxes_are_the_reference_codes():
    """The reference draws with Pillow from a centre and a side: same numbers, same pixels."""
    size, count = 32, 200
    boxes = sampler._cutout_boxes(np.random.default_rng(5), (count,), size)
    rng = np.random.default_rng(5)
    side = rng.uniform(0, 0.5, count) * size
    centre = rng.uniform(0, size, (count, 2))  # y, x
    images = photographs(size, count)
    got = run(images, np.zeros((count, 0)), np.zeros((count, 0)), boxes)
    for image, v, (cy, cx), cut in zip(images, side, centre, got, strict=True):
        x0, y0 = int(max(0, cx - v / 2)), int(max(0, cy - v / 2))
        x1, y1 = min(size, x0 + v), min(size, y0 + v)
        want = Image.fromarray(image)
        ImageDraw.Draw(want).rectangle((x0, y0, x1, y1), (125, 123, 114))
        np.testing.assert_array_equal(cut, np.asarray(want))


def test_empty_and_whole_boxes():
    images = photographs(8, 3)
    boxes = np.array([[3, 3, 3, 6], [0, 0, 8, 8], [7, 0, 8, 1]], np.int32)
    got = run(images, np.zeros((3, 0)), np.zeros((3, 0)), boxes)
    np.testing.assert_array_equal(got[0], images[0])
    assert (got[1] == (125, 123, 114)).all()
    assert (got[2] != images[2]).any(-1).sum() == 1
    assert got[2, 7, 0].tolist() == [125, 123, 114]


def test_a_row_depends_on_nothing_else_in_the_batch():
    images = photographs(32, 56)
    op, value, cutout = draws(56, 3, 32, seed=1)
    whole = run(images, op, value, cutout)
    order = np.random.default_rng(2).permutation(56)
    permuted = run(images[order], op[order], value[order], cutout[order])
    np.testing.assert_array_equal(permuted, whole[order])
    for rows in (slice(0, 1), slice(5, 12), slice(0, 0)):
        part = run(images[rows], op[rows], value[rows], cutout[rows])
        np.testing.assert_array_equal(part, whole[rows])


def test_inside_a_tf_data_map():
    images = photographs(32, 20)
    op, value, cutout = draws(20, 3, 32, seed=3)
    dataset = tf.data.Dataset.from_tensor_slices((images, op, value, cutout)).batch(8)
    dataset = dataset.map(augment_tf.strong_views, num_parallel_calls=2)
    assert dataset.element_spec.shape.as_list() == [None, 32, 32, 3]
    got = np.concatenate(list(dataset.as_numpy_iterator()))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, run(images, op, value, cutout))


@pytest.mark.parametrize("op", [-1, 14])
def test_unknown_operation(op):
    with pytest.raises(tf.errors.InvalidArgumentError):
        run(photographs(8, 1), [[op]], [[0.0]])
