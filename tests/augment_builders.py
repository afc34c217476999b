"""Images, magnitudes, draws and Pillow's results for the tests of both augmentations."""

import functools
import os

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from layermatch_jax.data.augment import operations
from layermatch_jax.data.augment.operations import NAMES


def pillow(image, name, value):
    """Applies an operation to an array [S, S, 3] as TorchSSL and USB call Pillow: the reference."""
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


def pillow_chain(image, op, value, cutout):
    """Applies operations [n] in order, then the gray box, with Pillow."""
    for k, v in zip(op, value, strict=True):
        image = pillow(image, NAMES[k], v)
    image = Image.fromarray(image)
    y0, x0, y1, x1 = cutout.tolist()
    ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), (125, 123, 114))
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
    """CIFAR-10 training images, if they are prepared already."""
    if not os.environ.get("TFDS_DATA_DIR"):
        pytest.skip("set TFDS_DATA_DIR to a folder where tfds has prepared cifar10")
    tfds = pytest.importorskip("tensorflow_datasets")
    try:
        data = tfds.load("cifar10", split=f"train[:{count}]", download=False, batch_size=-1)
    except AssertionError:  # tfds raises this if the set is missing
        pytest.skip("TFDS_DATA_DIR holds no prepared cifar10")
    images = data["image"].numpy()
    assert images.shape == (count, size, size, 3)
    return images


SETS = {
    "photographs-32": lambda: photographs(32, 40),
    "photographs-96": lambda: photographs(96, 12),
    "photographs-33": lambda: photographs(33, 12),
    "cifar10": lambda: cifar(32, 200),
}


def magnitudes(name, count):
    """Magnitudes: both ends, just inside them, the middle (0 for signed ranges), uniform ones."""
    low, high = {name: limits for name, *limits in operations.RANDAUGMENT}[name]
    fixed = [low, high, np.nextafter(np.float32(high), np.float32(low)), (low + high) / 2]
    rng = np.random.default_rng(len(name))
    value = np.float32(low) + np.float32(high - low) * rng.random(count, np.float32)
    value[: len(fixed)] = fixed
    return rng.permutation(value)


def draws(count, n, size, seed=0):
    """Operations, magnitudes, coefficients and boxes for `count` images."""
    rng = np.random.default_rng(seed)
    op = rng.integers(0, len(NAMES), (count, n)).astype(np.int32)
    low, high = np.array([limits for _, *limits in operations.RANDAUGMENT], np.float32).T
    value = low[op] + (high - low)[op] * rng.random((count, n), np.float32)
    affine = operations.coefficients(op, value, size)
    low = rng.integers(0, size, (count, 2))
    high = np.minimum(low + rng.integers(0, size // 2, (count, 2)) + 1, size)
    return op, value, affine, np.concatenate([low, high], 1).astype(np.int32)
