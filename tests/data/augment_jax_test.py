"""The device makes the same views as Pillow and NumPy, with every compiler.

With the optimizations that conftest.py turns off:
JAX_DISABLE_MOST_OPTIMIZATIONS=0 python -m pytest tests/data/augment_jax_test.py
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from augment_builders import SETS, degenerate, draws, magnitudes, photographs, pillow, pillow_chain

from layermatch_jax.data.augment import crop, device, operations
from layermatch_jax.data.augment.device import ResidentData
from layermatch_jax.data.augment.operations import NAMES
from layermatch_jax.data.sampler import Sampler
from layermatch_jax.runtime import parallel
from layermatch_jax.views import Layout, Views

strong_views = jax.jit(device.strong_views)
crop_and_flip = jax.jit(device.crop_and_flip, static_argnums=(4, 5))


def run(images, op, value):
    """Operations [m, n] without Cutout."""
    op, value = np.asarray(op, np.int32), np.asarray(value, np.float32)
    affine = operations.coefficients(op, value, images.shape[1])
    return np.asarray(strong_views(images, op, value, affine, np.zeros((len(op), 4), np.int32)))


def compare(images, tasks):
    """One batch of (image number, operation, magnitude), against Pillow: no pixel differs.

    Returns for each operation the share of images that it changed.
    """
    index, name, value = (np.array(column) for column in zip(*tasks, strict=True))
    got = run(images[index], [[NAMES.index(n)] for n in name], value[:, None])
    want = np.stack([pillow(images[i], n, v) for i, n, v in zip(index, name, value, strict=True)])
    wrong = {operation: (got != want)[name == operation].mean() for operation in NAMES}
    assert not any(wrong.values()), wrong
    changed = (want != images[index]).any((1, 2, 3))
    return {operation: changed[name == operation].mean() for operation in NAMES}


@pytest.mark.parametrize("kind", SETS)
def test_every_operation_is_pillows(kind):
    images = SETS[kind]()
    tasks = [(i, name, v) for name in NAMES for i, v in enumerate(magnitudes(name, len(images)))]
    changed = compare(images, tasks)
    assert changed.pop("identity") == 0
    assert min(changed.values()) > 0.4, f"hardly tested: {changed}"


@pytest.mark.parametrize("size", [8, 32])
def test_degenerate_images(size):
    images = degenerate(size)
    compare(
        images,
        [(i, name, v) for name in NAMES for v in magnitudes(name, 6) for i in range(len(images))],
    )


def test_autocontrast_for_every_range_of_levels():
    # Pillow's formula (ImageOps.py), for all levels between every fifth pair of two.
    low, high = np.triu_indices(256)
    level = np.clip(np.arange(256)[None], low[:, None], high[:, None])
    scale = 255.0 / np.maximum(high - low, 1)
    want = np.trunc(level * scale[:, None] + (-low * scale)[:, None])
    want = np.where((high > low)[:, None], want, level)
    exact = (level - low[:, None]) * 255 // np.maximum(high - low, 1)[:, None]
    assert ((exact - want)[high > low] == 1).any(), "float64 falls short of no whole number"

    @jax.jit
    def stretched(level):
        planes = jnp.tile(level[:, None], (1, 3, 1))
        chosen = {name: jnp.full((1, 1, 1), name == "autocontrast") for name in NAMES}
        table = device._levels(planes, chosen, jnp.zeros((len(level), 1, 1)))
        return jnp.take_along_axis(table, planes, axis=2)

    some = slice(None, None, 5)
    got = np.asarray(stretched(level[some].astype(np.int32)))
    for channel in range(3):
        np.testing.assert_array_equal(got[:, channel], want[some])


def test_known_numbers():
    """By hand, without Pillow: a 4×4 image of the levels 0, 16, … 240 in all channels."""
    level = np.arange(0, 256, 16).reshape(4, 4)
    black = np.zeros((4, 1), int)
    sheared = level.copy()
    sheared[2:] = np.hstack([level[2:, 1:], black[2:]])
    # Explained in augment_tf_test.py.
    expected = {
        ("brightness", 0.5): level // 2,
        ("color", 0.3): level,
        ("contrast", 0.5): 60 + level // 2,
        ("posterize", 5.9): level & 0b11111000,
        ("solarize", 100): np.where(level < 100, level, 255 - level),
        ("translate_x", 0.25): np.hstack([level[:, 1:], black]),
        ("translate_y", -0.25): np.vstack([black.T, level[:-1]]),
        ("shear_x", 0.3): sheared,
        ("autocontrast", 0): level * 17 // 16,
        ("sharpness", 0.05): level,
    }
    image = np.repeat(level[None, :, :, None], 3, axis=3).astype(np.uint8)
    op = [[NAMES.index(name)] for name, _ in expected]
    got = run(image.repeat(len(op), axis=0), op, [[value] for _, value in expected])
    np.testing.assert_array_equal(got, np.stack(list(expected.values()))[..., None].repeat(3, -1))


@pytest.mark.parametrize(("size", "count"), [(32, 200), (33, 20), (96, 20)])
def test_chains_of_three_and_cutout(size, count):
    arrays = draws(count, 3, size)
    images = photographs(size, count)
    got = strong_views(images, *arrays)
    op, value, _, cutout = arrays
    np.testing.assert_array_equal(got, [*map(pillow_chain, images, op, value, cutout)])


def test_no_operations_and_no_images():
    images = photographs(8, 3)
    boxes = np.array([[3, 3, 3, 6], [0, 0, 8, 8], [7, 0, 8, 1]], np.int32)
    op, value = np.zeros((3, 0), np.int32), np.zeros((3, 0), np.float32)
    got = np.asarray(strong_views(images, op, value, np.zeros((3, 0, 6), np.int32), boxes))
    np.testing.assert_array_equal(got[0], images[0])
    assert (got[1] == (125, 123, 114)).all()
    assert (got[2] != images[2]).any(-1).sum() == 1
    assert got[2, 7, 0].tolist() == [125, 123, 114]
    assert strong_views(images[:0], *draws(0, 2, 8)).shape == (0, 8, 8, 3)


def test_a_row_depends_on_nothing_else_in_the_batch():
    arrays = (photographs(32, 56), *draws(56, 3, 32, seed=1))
    whole = np.asarray(strong_views(*arrays))
    for rows in (np.random.default_rng(2).permutation(56), slice(0, 1), slice(5, 12)):
        np.testing.assert_array_equal(strong_views(*(x[rows] for x in arrays)), whole[rows])


@pytest.mark.parametrize(
    ("side", "pad", "size", "channels"),
    [(32, 4, 32, 3), (32, 0, 32, 3), (33, 5, 20, 3), (12, 11, 16, 1), (1, 1, 2, 3)],
)
def test_crops_are_numpys(side, pad, size, channels):
    rng, limit = np.random.default_rng(1), side + 2 * pad - size
    images = rng.integers(0, 256, (5, side, side, channels), dtype=np.uint8)
    corners = [(0, 0), (0, limit), (limit, 0), (limit, limit)]
    offset = np.concatenate([corners, rng.integers(0, limit + 1, (16, 2))]).astype(np.int32)
    offset, flip = offset.repeat(2, axis=0), np.arange(40) % 2 == 1
    positions = rng.integers(0, 5, 40).astype(np.int32)
    got = crop_and_flip(images, positions, offset, flip, pad, size)
    assert got.dtype == np.uint8
    want = crop.crop_and_flip(images[positions], offset, flip, pad, size)
    np.testing.assert_array_equal(got, want)


def test_crop_larger_than_image():
    none = np.zeros((0, 2), np.int32)
    with pytest.raises(ValueError, match="crops of 11"):
        crop_and_flip(np.zeros((1, 8, 8, 3), np.uint8), none[:, 0], none, none[:, 0] > 0, 1, 11)


# ---- Whole batches, on several devices ----

STEPS, B, MU, SIZE = 2, 16, 2, 8
SAMPLER = Sampler(
    seed=1,
    num_labeled=6,
    num_unlabeled=30,
    batch_size=B,
    layout=Layout(Views(), MU),
    image_size=SIZE,
    crop_range=6,  # stored with 10 pixels, padded by 2
    flip=True,
    randaugment_ops=2,
)


@functools.cache
def resident():
    rng = np.random.default_rng(0)
    return ResidentData(
        labeled_images=photographs(10, 36)[:6],
        labels=rng.integers(0, 10, 6).astype(np.int32),
        unlabeled_images=photographs(10, 36)[6:],
        true_labels=rng.integers(0, 10, 30).astype(np.int32),
    )


def several(sampler=SAMPLER):
    """The draws of some steps, [STEPS, B, ...]."""
    return jax.tree.map(lambda *x: np.stack(x), *map(sampler.draw, range(STEPS)))


def make_batch(data, draws, layout):
    """Compiles make_batch for a layout as a feed does: all arguments are arrays."""
    return jax.jit(lambda data, draws: device.make_batch(data, draws, layout, 2, SIZE))(data, draws)


def scan(data, draws):
    """Makes all batches in a scan over steps, as a train program does."""

    def step(done, draws):
        return done + 1, device.make_batch(data, draws, SAMPLER.layout, 2, SIZE)

    return jax.lax.scan(step, 0, draws)[1]


def test_a_batch_holds_what_was_drawn():
    data, draws = resident(), SAMPLER.draw(3)
    batch = make_batch(data, draws, SAMPLER.layout)
    images = np.asarray(batch.images)
    assert images.shape == (B, 1 + 2 * MU, SIZE, SIZE, 3)
    np.testing.assert_array_equal(batch.labels, data.labels[draws.labeled])
    np.testing.assert_array_equal(batch.unlabeled_indices, draws.unlabeled)
    np.testing.assert_array_equal(batch.true_labels, data.true_labels[draws.unlabeled])
    for v in range(1 + 2 * MU):
        stored, positions = data.labeled_images, draws.labeled
        if v:  # strong views begin with the images of the weak ones
            stored, positions = data.unlabeled_images, draws.unlabeled[:, (v - 1) % MU]
        want = crop.crop_and_flip(stored[positions], draws.offset[:, v], draws.flip[:, v], 2, SIZE)
        if v > MU:
            j = v - 1 - MU
            drawn = draws.op[:, j], draws.value[:, j], draws.cutout[:, j]
            want = [*map(pillow_chain, want, *drawn)]
        np.testing.assert_array_equal(images[:, v], want, err_msg=f"view {v}")


def test_supervised():
    sampler = Sampler(**{**SAMPLER.__dict__, "layout": Layout(Views(), 0)})
    nothing = ResidentData(
        *resident()[:2], np.zeros((0, 10, 10, 3), np.uint8), np.zeros(0, np.int32)
    )
    batch = make_batch(nothing, sampler.draw(0), sampler.layout)
    assert batch.images.shape == (B, 1, SIZE, SIZE, 3)
    assert batch.unlabeled_indices.shape == batch.true_labels.shape == (B, 0)


COLLECTIVES = r"all-to-all|all-gather|all-reduce|collective-\w+|reduce-scatter"


@pytest.mark.parametrize("devices", ["pmap", "jit"])
def test_rows_never_meet_on_eight_devices(devices):
    data, draws = resident(), several()
    want = jax.jit(scan)(data, draws)
    data = parallel.replicate(data, devices)
    if devices == "pmap":
        compiled = jax.pmap(scan, in_axes=(None, 0), axis_name=parallel.AXIS)
        draws = jax.tree.map(
            lambda x: x.reshape(STEPS, 8, B // 8, *x.shape[2:]).swapaxes(0, 1), draws
        )
    else:
        rows = jax.sharding.PartitionSpec(None, parallel.AXIS)
        rows = jax.sharding.NamedSharding(parallel.mesh(), rows)
        compiled = jax.jit(
            scan, in_shardings=(parallel.replicated("jit"), rows), out_shardings=rows
        )
        draws = jax.device_put(draws, rows)
    program = compiled.lower(data, draws).compile()
    text = program.as_text()
    assert f"u8[{B // 8 * MU},{SIZE},{SIZE},3]" in text, "not the program of several devices"
    assert not re.findall(COLLECTIVES, text)
    assert not re.findall(r"callback|infeed|outfeed", text), "a round trip to the host"
    got = jax.tree.map(np.asarray, program(data, draws))
    if devices == "pmap":
        got = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(STEPS, B, *x.shape[3:]), got)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
