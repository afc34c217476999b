"""The affine maps as numbers; the tests of the backends compare images with Pillow's."""

import numpy as np
import pytest

from layermatch_jax.data.augment import operations
from layermatch_jax.data.augment.operations import GEOMETRIC, NAMES

ONE = 2**16
IDENTITY = [ONE, 0, ONE // 2, 0, ONE, ONE // 2]  # at the pixels' centers


def coefficients(name, value, size):
    op = np.array([NAMES.index(name)], np.int32)
    found = operations.coefficients(op, np.array([value], np.float32), size)
    assert found.dtype == np.int32
    return found[0].tolist()


def test_other_operations_move_nothing():
    op = np.arange(14, dtype=np.int32).reshape(2, 7)
    moved = operations.coefficients(op, np.full((2, 7), 0.2, np.float32), 32)
    assert moved.shape == (2, 7, 6)
    for name, found in zip(NAMES, moved.reshape(14, 6).tolist(), strict=True):
        assert (found != IDENTITY) == (name in GEOMETRIC), name


# By hand: a, b, c of x, then d, e, f of y; pixels' centers add (a + b) / 2 to c, (d + e) / 2 to f.
@pytest.mark.parametrize(
    ("name", "value", "size", "expected"),
    [
        ("translate_x", 0.25, 32, [ONE, 0, 8 * ONE + ONE // 2, 0, ONE, ONE // 2]),
        ("translate_y", -0.25, 32, [ONE, 0, ONE // 2, 0, ONE, -8 * ONE + ONE // 2]),
        ("shear_x", 0.25, 32, [ONE, ONE // 4, 5 * ONE // 8, 0, ONE, ONE // 2]),
        ("shear_y", -0.25, 32, [ONE, 0, ONE // 2, -ONE // 4, ONE, 3 * ONE // 8]),
        # A quarter turn: x from 4 - y, y from x.
        ("rotate", 90.0, 4, [0, -ONE, 4 * ONE - ONE // 2, ONE, 0, ONE // 2]),
        ("rotate", 0.0, 5, IDENTITY),
        # cos 30° = 0.8660254, · 65536 = 56755.8; c = 16 - 16 · 0.3660254 = 10.1435935, and
        # + 0.1830127 = 10.3266062, · 65536 = 676764.5-; f = 16 - 16 · 1.3660254 = -5.8564065, and
        # + 0.6830127 = -5.1733938, · 65536 = -339043.5-.
        ("rotate", 30.0, 32, [56756, -32768, 676764, 32768, 56756, -339044]),
    ],
)
def test_known_numbers(name, value, size, expected):
    assert coefficients(name, value, size) == expected


def test_pure_shifts_are_cut_off_not_rounded():
    # 2^-18 short of a whole pixel, with the half to the center: still the pixel before.
    assert coefficients("translate_x", (0.5 - 2**-18) / 32, 32)[2] == ONE - 1
    assert coefficients("shear_x", 2**-17, 32)[1] == 1  # 0.5/65536, rounded up


def test_no_operations():
    empty = np.zeros((4, 0, 3))
    assert operations.coefficients(empty.astype(np.int32), empty, 32).shape == (4, 0, 3, 6)
