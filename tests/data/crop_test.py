import numpy as np
import pytest
from PIL import Image, ImageOps

from layermatch_jax.data.augment import crop


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("side", "pad", "size", "channels"),
    [(32, 4, 32, 3), (32, 0, 32, 3), (33, 5, 20, 3), (12, 3, 16, 1), (96, 12, 96, 3)],
)
def test_equals_padding_slicing_and_mirroring(side, pad, size, channels):
    limit = side + 2 * pad - size
    corners = [(0, 0), (0, limit), (limit, 0), (limit, limit)]
    offset = np.concatenate([corners, np.random.default_rng(1).integers(0, limit + 1, (16, 2))])
    offset = np.repeat(offset, 2, axis=0).astype(np.int32)
    flip = np.arange(len(offset)) % 2 == 1
    images = noise(len(offset), side, side, channels)
    got = crop.crop_and_flip(images, offset, flip, pad, size)
    assert got.shape == (len(offset), size, size, channels)
    assert got.dtype == np.uint8
    for image, (y, x), mirrored, view in zip(images, offset, flip, got, strict=True):
        padded = np.pad(image, [(pad, pad), (pad, pad), (0, 0)], mode="reflect")
        want = padded[y : y + size, x : x + size]
        np.testing.assert_array_equal(view, want[:, ::-1] if mirrored else want)


def test_known_numbers():
    image = np.arange(9, dtype=np.uint8).reshape(1, 3, 3, 1)
    # Padded by one, without repeating the border: 4 3 4 5 4 / 1 0 1 2 1 / 4 3 4 5 4 / ...
    view = crop.crop_and_flip(image, np.array([[0, 2]]), np.array([False]), 1, 3)
    assert view[0, ..., 0].tolist() == [[4, 5, 4], [1, 2, 1], [4, 5, 4]]
    # The crop is mirrored, not the image, which would show other pixels.
    view = crop.crop_and_flip(image, np.array([[1, 0]]), np.array([True]), 1, 3)
    assert view[0, ..., 0].tolist() == [[1, 0, 1], [4, 3, 4], [7, 6, 7]]


def test_flip_is_pillows_mirror():
    image = noise(1, 20, 20, 3)
    got = crop.crop_and_flip(image, np.zeros((1, 2), int), np.array([True]), 0, 20)
    np.testing.assert_array_equal(got[0], np.asarray(ImageOps.mirror(Image.fromarray(image[0]))))


def test_takes_any_memory_layout_and_leaves_it_alone():
    images = noise(6, 10, 10, 3)
    strided = images[::2, :, ::-1]
    before = images.copy()
    got = crop.crop_and_flip(strided, np.full((3, 2), 2), np.zeros(3, bool), 2, 10)
    np.testing.assert_array_equal(got, strided)
    assert not np.shares_memory(got, images)
    np.testing.assert_array_equal(images, before)


def test_no_images():
    got = crop.crop_and_flip(noise(0, 8, 8, 3), np.zeros((0, 2), int), np.zeros(0, bool), 1, 8)
    assert got.shape == (0, 8, 8, 3)


@pytest.mark.parametrize("offset", [(-1, 0), (0, -1), (3, 0), (0, 3)])
def test_offset_out_of_range(offset):
    with pytest.raises(ValueError, match=r"outside 0\.\.2"):
        crop.crop_and_flip(noise(1, 8, 8, 3), np.array([offset]), np.array([False]), 1, 8)


def test_crop_larger_than_image():
    with pytest.raises(ValueError, match="crops of 11"):
        crop.crop_and_flip(noise(1, 8, 8, 3), np.zeros((1, 2), int), np.array([False]), 1, 11)
    with pytest.raises(ValueError, match="crops of 9"):
        crop.center_crop(noise(1, 8, 8, 3), 9)


def test_center_crop():
    images = np.arange(25, dtype=np.uint8).reshape(1, 5, 5, 1)
    assert crop.center_crop(images, 3)[0, ..., 0].tolist() == [
        [6, 7, 8],
        [11, 12, 13],
        [16, 17, 18],
    ]
    assert crop.center_crop(images, 2)[0, ..., 0].tolist() == [[6, 7], [11, 12]]
    np.testing.assert_array_equal(crop.center_crop(images, 5), images)
