"""Is the batched input worth its code? Timed against a plain per-image tf.data map.

TFDS_DATA_DIR=... python -m pytest -m slow -s tests/input_speed_test.py
"""

import os
import time

import numpy as np
import pytest

from layermatch_jax.data import crop, operations, sampler

tf = pytest.importorskip("tensorflow")
tfds = pytest.importorskip("tensorflow_datasets")

from layermatch_jax.data import augment_tf  # noqa: E402

SIZE, PAD, OPS = 32, 4, 3
ROWS = 448  # unlabelled images in a batch
ROUNDS = 5
BATCHES = {"per image": 4, "batched": 20}  # timed in a round, about as long as each other
WARM_UP = 3
FACTOR = 2.5


def cifar10(count):
    if not os.environ.get("TFDS_DATA_DIR"):
        pytest.skip("set TFDS_DATA_DIR to a folder where tfds has prepared cifar10")
    try:
        data = tfds.load("cifar10", split=f"train[:{count}]", download=False, batch_size=-1)
    except AssertionError:  # tfds's way of saying that it is not there
        pytest.skip("TFDS_DATA_DIR holds no prepared cifar10")
    return data["image"].numpy()


def elements(batches):
    """Images and their draws, [batches, ROWS, ...], the same for both ways."""
    draws = [
        sampler.Sampler(
            seed=0,
            num_labeled=10,
            num_unlabeled=10_000,
            batch_size=ROWS,
            unlabeled_ratio=1,
            image_size=SIZE,
            crop_range=2 * PAD,
            flip=True,
            randaugment_ops=OPS,
        ).draw(step)
        for step in range(batches)
    ]
    images = cifar10(10_000)
    return (
        np.stack([images[d.unlabeled[:, 0]] for d in draws]),
        np.stack([d.offset[:, 1:] for d in draws]),
        np.stack([d.flip[:, 1:] for d in draws]),
        np.stack([d.op[:, 0] for d in draws]),
        np.stack([d.value[:, 0] for d in draws]),
        np.stack([d.affine[:, 0] for d in draws]),
        np.stack([d.cutout[:, 0] for d in draws]),
    )


# ---- The plain way: one image [32, 32, 3], one number ----


def blend(first, second, value):
    first, second = tf.cast(first, tf.float32), tf.cast(second, tf.float32)
    return tf.cast(first + value * (second - first), tf.uint8)


def grey(image):
    total = tf.reduce_sum(tf.cast(image, tf.int32) * [19595, 38470, 7471], -1, keepdims=True)
    return (total + 32768) // 65536


def autocontrast(image, _):
    x = tf.cast(image, tf.float64)
    low, high = tf.reduce_min(x, [0, 1]), tf.reduce_max(x, [0, 1])
    scale = tf.where(high > low, 255 / tf.maximum(high - low, 1), 1)
    offset = tf.where(high > low, -low * scale, 0)
    return tf.cast(tf.clip_by_value(x * scale + offset, 0, 255), tf.uint8)


def brightness(image, value):
    return blend(tf.zeros_like(image), image, value)


def color(image, value):
    return blend(grey(image), image, value)


def contrast(image, value):
    mean = tf.reduce_mean(tf.cast(grey(image), tf.float32))
    return blend(tf.floor(mean + 0.5), image, value)


def equalize(image, _):
    def channel(x):
        x = tf.cast(x, tf.int32)
        count = tf.math.bincount(tf.reshape(x, [-1]), minlength=256, maxlength=256)
        step = (SIZE * SIZE - count[tf.reduce_max(x)]) // 255
        level = (tf.cumsum(count, exclusive=True) + step // 2) // tf.maximum(step, 1)
        return tf.where(step > 0, tf.gather(tf.minimum(level, 255), x), x)

    return tf.cast(tf.stack([channel(image[..., c]) for c in range(3)], -1), tf.uint8)


def posterize(image, value):
    shift = tf.cast(8 - tf.cast(value, tf.int32), tf.uint8)
    return tf.bitwise.left_shift(tf.bitwise.right_shift(image, shift), shift)


def sharpness(image, value):
    kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32)
    kernel = tf.tile(kernel[:, :, None, None], [1, 1, 3, 1])
    x = tf.cast(image, tf.float32)
    smooth = tf.nn.depthwise_conv2d(x[None], kernel, [1, 1, 1, 1], "VALID")[0]
    change = tf.floor(smooth / 13 + 0.5) - x[1:-1, 1:-1]
    return blend(x + tf.pad(change, [[1, 1], [1, 1], [0, 0]]), image, value)


def solarize(image, value):
    return tf.where(tf.cast(image, tf.float32) < value, image, 255 - image)


def transform(image, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    # TensorFlow's kernel counts from the centre of the first pixel, Pillow from its corner.
    c, f = c + (a + b - 1) / 2, f + (d + e - 1) / 2
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=[[a, b, c, d, e, f, 0.0, 0.0]],
        output_shape=[SIZE, SIZE],
        fill_value=0.0,
        interpolation="NEAREST",
    )[0]


def rotate(image, value):
    angle = -value * np.pi / 180
    cos, sin, half = tf.cos(angle), tf.sin(angle), SIZE / 2
    return transform(image, cos, sin, half * (1 - cos - sin), -sin, cos, half * (1 + sin - cos))


PLAIN = {
    "autocontrast": autocontrast,
    "brightness": brightness,
    "color": color,
    "contrast": contrast,
    "equalize": equalize,
    "identity": lambda image, _: image,
    "posterize": posterize,
    "rotate": rotate,
    "sharpness": sharpness,
    "shear_x": lambda image, v: transform(image, b=v),
    "shear_y": lambda image, v: transform(image, d=v),
    "solarize": solarize,
    "translate_x": lambda image, v: transform(image, c=v * SIZE),
    "translate_y": lambda image, v: transform(image, f=v * SIZE),
}


def plain(image, offset, flip, op, value, _, cutout):
    padded = tf.pad(image, [[PAD, PAD], [PAD, PAD], [0, 0]], "REFLECT")

    def view(v):
        x = tf.slice(padded, [offset[v, 0], offset[v, 1], 0], [SIZE, SIZE, 3])
        return tf.cond(flip[v], lambda: x[:, ::-1], lambda: x)

    strong = view(1)
    for k in range(OPS):
        branches = [
            lambda f=PLAIN[name], x=strong, v=value[k]: f(x, v) for name in operations.NAMES
        ]
        strong = tf.ensure_shape(tf.switch_case(op[k], branches), [SIZE, SIZE, 3])
    position = tf.range(SIZE)
    rows = (position >= cutout[0]) & (position < cutout[2])
    columns = (position >= cutout[1]) & (position < cutout[3])
    box = (rows[:, None] & columns)[..., None]
    return view(0), tf.where(box, tf.constant(operations.CUTOUT_COLOR, tf.uint8), strong)


def per_image(arrays):
    flat = tuple(x.reshape(-1, *x.shape[2:]) for x in arrays)
    dataset = tf.data.Dataset.from_tensor_slices(flat).repeat()
    dataset = dataset.map(plain, num_parallel_calls=tf.data.AUTOTUNE)
    return dataset.batch(ROWS).prefetch(2)


# ---- The batched way, as in pipeline.py ----


def batched(arrays):
    def crops(images, offset, flip):
        return [crop.crop_and_flip(images, offset[:, v], flip[:, v], PAD, SIZE) for v in (0, 1)]

    def views(images, offset, flip, *strong):
        two = tf.numpy_function(crops, [images, offset, flip], [tf.uint8] * 2, stateful=False)
        weak, ground = (tf.ensure_shape(x, [ROWS, SIZE, SIZE, 3]) for x in two)
        return weak, ground, *strong

    dataset = tf.data.Dataset.from_tensor_slices(arrays).repeat()
    dataset = dataset.map(views, num_parallel_calls=2)
    dataset = dataset.map(
        lambda weak, *strong: (weak, augment_tf.strong_views(*strong)), num_parallel_calls=2
    )
    return dataset.prefetch(2)


# ---- The test ----


def rate(dataset, batches):
    """Unlabelled images a second; of each a weak and a strong view is made."""
    iterator = dataset.as_numpy_iterator()
    for _ in range(WARM_UP):
        next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    return batches * ROWS / (time.perf_counter() - start)


@pytest.mark.slow
def test_batched_augmentation_is_several_times_as_fast():
    arrays = elements(batches=8)
    datasets = {"per image": per_image(arrays), "batched": batched(arrays)}
    first = {name: next(d.as_numpy_iterator()) for name, d in datasets.items()}
    np.testing.assert_array_equal(first["per image"][0], first["batched"][0])
    # The same work: only nearest neighbours on the border between two pixels may differ.
    assert (first["per image"][1] != first["batched"][1]).mean() < 0.005

    rates = {name: [] for name in datasets}
    for _ in range(ROUNDS):
        for name, dataset in datasets.items():
            rates[name].append(rate(dataset, BATCHES[name]))
    print(
        f"\nCIFAR-10, weak and strong view of each image, {OPS} operations, {os.cpu_count()} CPUs"
    )
    for name, values in rates.items():
        values = np.sort(values)
        print(
            f"{name:>10}: {np.median(values):7,.0f} images/s "
            f"(median of {ROUNDS}; {values[0]:,.0f} to {values[-1]:,.0f})"
        )
    factor = np.median(rates["batched"]) / np.median(rates["per image"])
    print(f"     ratio: {factor:.1f}")
    assert factor >= FACTOR
