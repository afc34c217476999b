"""Image folders: their parts, classes and order."""

import numpy as np
import pytest
from image_builders import all_of, noise, settings, write
from PIL import Image

from layermatch_jax.data import sources
from layermatch_jax.errors import InputError


@pytest.fixture
def root(tmp_path):
    """Two classes with two training and one test image each, 8 px, lossless."""
    for name in ("owl", "cat"):
        for file in ("train/{}/1.png", "train/{}/0.png", "test/{}/0.png"):
            write(tmp_path / file.format(name), noise(8, 8, 3))
    return tmp_path


def test_folder_pixels_and_order(tmp_path):
    # In the order in which they must come. The names are sorted, the folders nested.
    train = {
        "cat/B.PNG": noise(8, 8, 3),
        "cat/a.png": noise(8, 8, 3),
        "cat/b/deep/er/0.bmp": noise(8, 8, 3),
        "cat/c.gif": np.full((8, 8, 3), 77, np.uint8),
        "owl/1.webp": noise(8, 8, 3),
    }
    for name, pixels in reversed(train.items()):
        options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
        write(tmp_path / "train" / name, pixels, **options)
    owl = write(tmp_path / "val/owl/z.png", noise(8, 8, 3))
    cat = write(tmp_path / "val/cat/z.png", noise(8, 8, 3))
    more = write(tmp_path / "unlabeled/x/y.png", noise(8, 8, 3))
    (tmp_path / "train/cat/notes.txt").write_text("no image")
    (tmp_path / "train/cat/._a.png").write_text("left behind by another system")
    (tmp_path / "train/.cache").mkdir()

    made = sources.load(settings("folder", tmp_path))
    assert made.class_names == ("cat", "owl")
    assert made.train.labels.tolist() == [0, 0, 0, 0, 1]
    np.testing.assert_array_equal(all_of(made.train), np.stack(list(train.values())))
    np.testing.assert_array_equal(made.train.read(np.array([4, 1])), [*train.values()][::-3])
    assert made.test.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(all_of(made.test), [cat, owl])
    np.testing.assert_array_equal(all_of(made.unlabeled), [more])
    assert made.unlabeled.labels.tolist() == [-1]
    empty = made.train.read(np.zeros(0, int))
    assert (empty.shape, empty.dtype) == ((0, 8, 8, 3), np.uint8)


def test_folder_test_goes_before_val(root):
    write(root / "val/cat/0.png", noise(8, 8, 3))
    assert len(sources.load(settings("folder", root)).test.labels) == 2


def test_folder_class_list(root, tmp_path):
    write(root / "train/ant/0.png", noise(8, 8, 3))
    write(root / "test/bee/0.png", noise(8, 8, 3))  # would be an error if it counted
    path = tmp_path / "classes.txt"
    path.write_text("# from the paper\nowl\n\n cat \n")
    made = sources.load(settings("folder", root, class_list=str(path)))
    assert made.class_names == ("owl", "cat")
    assert made.train.labels.tolist() == [0, 0, 1, 1]
    with Image.open(root / "train/owl/0.png") as image:
        np.testing.assert_array_equal(made.train.read(np.array([0]))[0], np.asarray(image))

    for text, message in [
        ("owl\neel\ncat\n", r"1 of the classes in .*classes\.txt.*: eel"),
        ("owl\nowl\n", "repeats owl"),
        ("# nothing\n", "names no class"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            sources.load(settings("folder", root, class_list=str(path)))
    with pytest.raises(InputError, match=r"class_list='none\.txt' cannot be read"):
        sources.load(settings("folder", root, class_list="none.txt"))


def test_folder_of_another_form(root, tmp_path, caplog):
    def refused(message, folder=root):
        with pytest.raises(InputError, match=message):
            sources.load(settings("folder", folder))

    refused(r"data_dir='' is not a folder\. Expected: ROOT/train/CLASS", "")
    refused("is not a folder", tmp_path / "none")
    (tmp_path / "bare").mkdir()
    refused(r"train is missing; .*bare contains: nothing\. Expected", tmp_path / "bare")
    (tmp_path / "bare/train").mkdir()
    refused(r"train has no class folders\. Expected", tmp_path / "bare")
    write(tmp_path / "bare/train/cat/0.png", noise(8, 8, 3))
    write(tmp_path / "bare/train/owl/0.png", noise(8, 8, 3))
    refused(r"test is missing; .*bare contains: train\. Expected", tmp_path / "bare")

    (root / "unlabeled").mkdir()
    refused("unlabeled has no images")
    (root / "unlabeled").rmdir()
    (root / "test/cat/0.png").unlink()
    assert sources.load(settings("folder", root)).test.labels.tolist() == [1]
    assert "No test images for: cat." in caplog.text
    (root / "test/owl/0.png").unlink()
    refused(r"has no test images of: cat, owl\.")
    write(root / "test/eel/0.png", noise(8, 8, 3))
    refused(r"1 of the classes in .*test have no folder in .*train: eel")
    (root / "train/eel").mkdir()
    refused(r"has no training images of: eel\.")
