"""Sets of images: selection, concatenation, resizing and statistics."""

import numpy as np
import pytest
from image_builders import all_of, noise

from layermatch_jax.data import sources


def test_take_and_concatenate_compose():
    pixels = noise(10, 4, 4, 3)
    a = sources.from_array(pixels[:6], np.arange(6))
    b = sources.take(sources.from_array(pixels, np.arange(10)), np.array([9, 7, 8, 6]))
    both = sources.concatenate(a, b)
    assert both.labels.tolist() == [0, 1, 2, 3, 4, 5, 9, 7, 8, 6]
    assert both.labels.dtype == np.int32
    for wanted in ([0, 9, 5, 6, 6, 1], [1, 2], [7, 6], []):
        got = both.read(np.array(wanted, np.int32))
        np.testing.assert_array_equal(got, pixels[both.labels[np.array(wanted, int)]])
    view = sources.take(both, np.array([6, 0]))
    np.testing.assert_array_equal(all_of(view), pixels[[9, 0]])
    assert view.labels.tolist() == [9, 0]


def test_channel_statistics():
    pixels = noise(300, 5, 5, 3) // np.array([1, 2, 5], np.uint8)
    mean, std = sources.channel_statistics(sources.from_array(pixels, None))
    np.testing.assert_allclose(mean, (pixels / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (pixels / 255).std((0, 1, 2)), rtol=1e-12)
    assert all(type(x) is float for x in (*mean, *std))

    some, _ = sources.channel_statistics(sources.from_array(pixels, None), limit=100)
    np.testing.assert_allclose(some, (pixels[::3] / 255).mean((0, 1, 2)), rtol=1e-12)


def test_channel_statistics_of_constant_images_can_be_divided_by():
    pixels = np.full((3, 4, 4, 3), 51, np.uint8)
    mean, std = sources.channel_statistics(sources.from_array(pixels, None))
    assert mean == (0.2, 0.2, 0.2)
    assert std == (1 / 255,) * 3
    with pytest.raises(ValueError, match="needs at least one image"):
        sources.channel_statistics(sources.from_array(pixels[:0], None))


def test_digest_tells_sources_apart():
    def source(classes=("a", "b"), labels=(0, 1), files=("x/1.png", "x/2.png"), more=None):
        images = sources.from_array(noise(2, 4, 4, 3), np.array(labels))
        return sources.Source(classes, images._replace(files=np.array(files, object)), more, images)

    same = sources.digest(source())
    np.testing.assert_array_equal(sources.digest(source()), same)
    moved = source(files=("/mnt/x/1.png", "/mnt/x/2.png"))
    np.testing.assert_array_equal(sources.digest(moved), same)
    others = [
        source(classes=("a", "c")),
        source(labels=(1, 0)),
        source(files=("x/1.png", "x/3.png")),
        source(more=sources.from_array(noise(1, 4, 4, 3), None)),
    ]
    assert all((sources.digest(other) != same).any() for other in others)
