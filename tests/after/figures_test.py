"""The content of the figures; people have checked their look."""

import sys
import warnings

import numpy as np
import pytest

from layermatch_jax.after import figures, pictures, style
from layermatch_jax.errors import InputError

pytest.importorskip("matplotlib")
from matplotlib import colors

STEPS = np.array([10, 20, 30])


def drawn(figure):
    """Draws a figure without warnings; returns its axes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert figures.png(figure).startswith(b"\x89PNG")
    return figure.axes


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_curves_keep_their_colors_whoever_else_is_there():
    empty = figures.Series("a", np.zeros(0), np.zeros(0))
    low, high = np.array([0.1, 0.2, 0.3]), np.array([0.3, 0.4, 0.5])
    one = figures.Series("b", STEPS, np.array([0.2, 0.3, 0.4]), low, high)
    figure = figures.draw_curves([empty, one], "Accuracy", "% of images", percent=True)
    (axes,) = drawn(figure)
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xydata(), np.stack([STEPS, one.values], axis=1))
    assert line.get_color() == style.COLORS[1]
    assert line.get_marker() == "."  # few points are seen one by one
    (band,) = axes.collections
    vertices = band.get_paths()[0].vertices
    assert {0.1, 0.2, 0.3, 0.4, 0.5} == set(np.round(vertices[:, 1], 9))
    assert (axes.get_title(), axes.get_xlabel()) == ("Accuracy", "training step")
    assert axes.get_ylabel() == "% of images"
    assert "20.0" in [tick.get_text() for tick in axes.get_yticklabels()]  # 0.2
    assert [text.get_text() for text in figure.legends[0].texts] == ["b"]
    long = figures.draw_curves([figures.Series("c", np.arange(1000), np.ones(1000))], "", "")
    assert long.axes[0].lines[0].get_marker() == "None"
    assert not long.legends  # the title describes a single line


def test_21_lines_can_be_told_apart():
    series = [figures.Series(str(i), STEPS, STEPS + i) for i in range(21)]
    lines = figures.draw_curves(series, "", "").axes[0].lines
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == 21


def test_class_counts_have_a_panel_each():
    rng = np.random.RandomState(0)
    counted, truths = rng.rand(3, 10), rng.rand(3, 10)
    figure = figures.class_counts(STEPS, counted, truths, [f"$c_{k}$" for k in range(10)])
    panels = drawn(figure)
    assert [axes.get_title() for axes in panels] == [f"$c_{k}$" for k in range(10)]
    for k, axes in enumerate(panels):
        lines = {line.get_label(): line.get_ydata() for line in axes.lines}
        np.testing.assert_array_equal(lines["images of the class"], truths[:, k])
        np.testing.assert_array_equal(lines["pseudo-labels used"], counted[:, k])
        assert axes.get_ylim()[1] >= max(counted.max(), truths.max())  # nothing is cut off


def test_class_counts_of_many_classes_are_a_ratio():
    counted, truths = np.ones((3, 100)), np.ones((3, 100))
    counted[1, :4] = [2, 0, 100, 0.25]
    truths[2, 7] = 0
    axes, bar = drawn(figures.class_counts(STEPS, counted, truths, ["x"] * 100))
    mesh = axes.collections[0]
    values = mesh.get_array().T  # log2, clipped at 1/4 and 4
    np.testing.assert_array_equal(values[1, :5], [1, -2, 2, -2, 0])
    assert values.mask[2, 7]
    assert values.mask.sum() == 1
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0], [0, 10, 20, 30])
    assert [tick.get_text() for tick in bar.get_yticklabels()] == ["≤ 1/4", "1/2", "1", "2", "≥ 4"]
    assert axes.get_ylabel() == "class, by number from 0"


def test_confusion_is_written_out_where_classes_are_few():
    matrix = np.array([[3, 1, 0], [0, 0, 0], [1, 0, 399]])
    axes, _ = drawn(pictures.confusion(matrix, ["cat", "<dog>", "a name that goes on and on"]))
    np.testing.assert_allclose(
        axes.images[0].get_array(), [[0.75, 0.25, 0], [0, 0, 0], [1 / 400, 0, 399 / 400]]
    )
    assert texts(axes) == ["75", "25", "<1", "100"]
    assert [text.get_position() for text in axes.texts] == [(0, 0), (1, 0), (0, 2), (2, 2)]
    names = ["cat", "<dog>", "a name t… and on"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == names
    assert axes.get_ylabel() == "true class"
    axes, _ = drawn(pictures.confusion(np.eye(100, dtype=int), [f"class {k}" for k in range(100)]))
    assert texts(axes) == []
    assert len(axes.get_yticklabels()) < 20


def test_images_stand_where_they_belong():
    pixels = np.arange(2 * 3 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 4, 3)
    titles = [["a", "b", "c"], ["", "", "d\nis far too long a line"]]
    axes = drawn(pictures.draw_images([pixels[0], pixels[1]], titles, ["above", "below"]))
    for axis, image in zip(axes, pixels.reshape(6, 4, 4, 3), strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), image)
    assert axes[5].get_title() == "d\nis far to…g a line"
    assert [axis.get_ylabel() for axis in axes] == ["above", "", "", "below", "", ""]
    photographs = pictures.draw_images([np.zeros((1, 96, 96, 3), np.uint8)], [[""]])
    assert photographs.dpi < figures.draw_curves([], "", "").dpi
    header = figures.png(photographs)[16:24]  # of a PNG: width and height
    assert int.from_bytes(header[:4]) == round(photographs.dpi * photographs.get_figwidth())
    shorter = drawn(pictures.draw_images([pixels[0], pixels[1, :1]], [["", "", ""], [""]]))
    assert [len(axis.images) for axis in shorter] == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("num_classes", [10, 100])
def test_feature_map(num_classes):
    rng = np.random.RandomState(0)
    points, labels = rng.randn(300, 2), rng.randint(0, num_classes, 300)
    wrong, centers = rng.rand(300) < 0.3, rng.randn(num_classes, 2)
    centers[3] = np.nan  # a class that has none yet
    names = [f"class {k}" for k in range(num_classes)]
    figure = pictures.feature_map(points, labels, names, (0.5, 0.25), centers, wrong)
    (axes,) = drawn(figure)
    parts = {part.get_label(): np.asarray(part.get_offsets()) for part in axes.collections}
    np.testing.assert_array_equal(parts.pop("center"), centers)
    if num_classes == 10:
        for k, name in enumerate(names):
            np.testing.assert_array_equal(parts[name], points[labels == k])
        looks = {
            (colors.to_hex(part.get_facecolor()[0]), len(part.get_paths()[0].vertices))
            for part in axes.collections[:-1]
        }
        assert len(looks) == 10
        assert texts(axes) == names[:3] + names[4:]
        stars = axes.collections[-1].get_facecolor()
        for k in range(10):
            assert colors.to_hex(stars[k]) == colors.to_hex(
                axes.collections[k].get_facecolor()[0], keep_alpha=False
            )
    else:
        np.testing.assert_array_equal(parts["predicted wrong"], points[wrong])
        np.testing.assert_array_equal(parts["predicted right"], points[~wrong])
        assert texts(axes) == []
    assert "50% of the variance" in axes.get_xlabel()


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    for draw in (
        lambda: figures.draw_curves([figures.Series("a", STEPS, STEPS)], "", ""),
        lambda: pictures.confusion(np.eye(2, dtype=int), ["a", "b"]),
        lambda: pictures.draw_images([np.zeros((1, 2, 2, 3), np.uint8)], [[""]]),
    ):
        with pytest.raises(InputError, match="pip install matplotlib"):
            draw()
