"""Image folders, and how their files are decoded."""

import numpy as np
import pytest
from image_builders import all_of, noise, settings, write
from PIL import Image

from layermatch_jax.data import folder, sources
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


def test_decode_crops_the_centre(tmp_path):
    wide, tall = noise(8, 14, 3), noise(13, 8, 3)
    write(tmp_path / "wide.png", wide)
    write(tmp_path / "tall.png", tall)
    np.testing.assert_array_equal(folder.decode(str(tmp_path / "wide.png"), 8), wide[:, 3:11])
    np.testing.assert_array_equal(folder.decode(str(tmp_path / "tall.png"), 8), tall[2:10])


def test_decode_resizes_the_shorter_side(tmp_path):
    # Halves that differ, with a middle band: after the crop the band fills the middle.
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 30:50] = (250, 100, 50)
    write(tmp_path / "x.png", pixels)
    got = folder.decode(str(tmp_path / "x.png"), 8)
    want = np.zeros((8, 8, 3))
    want[:, 2:6] = (250, 100, 50)
    np.testing.assert_allclose(got[:, [0, 3, 4, 7]], want[:, [0, 3, 4, 7]])
    # Larger, too; every value lies between the neighbours it came from.
    got = folder.decode(str(tmp_path / "x.png"), 80)
    assert got.shape == (80, 80, 3)
    assert got[:, 20:60].min(axis=(0, 1)).tolist() >= [125, 50, 25]


def test_decode_every_mode(tmp_path):
    rgb = np.zeros((8, 8, 3), np.uint8) + np.array([200, 100, 40], np.uint8)
    grey = noise(8, 8)
    image = Image.fromarray(rgb)
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(grey))
    palette = image.quantize(4)
    palette.info["transparency"] = b"\x00\x80"
    cases = {
        "rgba.png": (alpha, rgb),
        "palette.png": (palette, rgb),
        "cmyk.jpg": (image.convert("CMYK"), rgb),
        "jpeg.JPEG": (image, rgb),
        "grey.png": (Image.fromarray(grey), np.stack([grey] * 3, -1)),
        "sixteen.png": (
            Image.fromarray(grey.astype(np.uint16) * 256 + 7),
            np.stack([grey] * 3, -1),
        ),
        "la.png": (Image.merge("LA", [Image.fromarray(grey)] * 2), np.stack([grey] * 3, -1)),
        "bit.png": (Image.fromarray(grey > 99), np.stack([(grey > 99) * 255] * 3, -1)),
    }
    for name, (picture, want) in cases.items():
        picture.save(tmp_path / name)
        got = folder.decode(str(tmp_path / name), 8).astype(int)
        assert got.shape == (8, 8, 3), name
        tolerance = 3 if name.lower().endswith(("jpg", "jpeg")) else 0
        assert np.abs(got - want).max() <= tolerance, name


def test_decode_turns_as_exif_says(tmp_path):
    pixels = np.repeat(np.repeat(noise(2, 2, 3), 8, 0), 8, 1)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90° clockwise to show"
    image.save(tmp_path / "x.png", exif=exif)
    got = folder.decode(str(tmp_path / "x.png"), 16)
    np.testing.assert_array_equal(got, np.rot90(pixels, -1))


@pytest.mark.parametrize("height", [180, 300, 600])  # decoded at 1/1, 1/2 and 1/4 of the size
def test_decode_large_jpeg_is_close_to_a_full_decode(tmp_path, height):
    size = (height * 4 // 3, height)
    smooth = Image.fromarray(noise(6, 8, 3)).resize(size, Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "x.jpg", quality=95)
    got = folder.decode(str(tmp_path / "x.jpg"), 64).astype(int)
    with Image.open(tmp_path / "x.jpg") as image:
        box = (height // 6, 0, height // 6 + height, height)
        full = image.crop(box).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.abs(got - np.asarray(full)).max() <= 8
    assert got.std() > 20


def test_folder_corrupt_image_is_named(root):
    for content in (b"", b"\x89PNG\r\n\x1a\n", (root / "train/cat/1.png").read_bytes()[:-60]):
        (root / "train/cat/0.png").write_bytes(content)
        made = sources.load(settings("folder", root))
        with pytest.raises(InputError, match=r"train/cat/0\.png.*Remove or replace"):
            made.train.read(np.array([1, 0]))
        assert made.train.read(np.array([1, 2])).shape == (2, 8, 8, 3)


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
        ("owl\neel\ncat\n", r"1 of the classes named in .*classes\.txt.*: eel"),
        ("owl\nowl\n", "twice: owl"),
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
    refused(r"train is missing\. Expected", tmp_path / "bare")
    (tmp_path / "bare/train").mkdir()
    refused(r"train has no class folders\. Expected", tmp_path / "bare")
    write(tmp_path / "bare/train/cat/0.png", noise(8, 8, 3))
    refused(r"val is missing\. Expected", tmp_path / "bare")

    (root / "unlabeled").mkdir()
    refused("unlabeled has no images")
    (root / "unlabeled").rmdir()
    (root / "test/cat/0.png").unlink()
    assert sources.load(settings("folder", root)).test.labels.tolist() == [1]
    assert "No test images in" in caplog.text
    (root / "test/owl/0.png").unlink()
    refused("No images of these classes in .*test: cat, owl")
    write(root / "test/eel/0.png", noise(8, 8, 3))
    refused(r"1 of the classes found in .*test have no folder in .*train: eel")
    (root / "train/eel").mkdir()
    refused("No images in these folders of .*train: eel")
