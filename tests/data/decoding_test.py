"""How image files are decoded."""

import numpy as np
import pytest
from image_builders import noise, write
from PIL import Image, ImageCms

from layermatch_jax.data.sources import decoding
from layermatch_jax.errors import InputError


def test_decode_crops_the_center(tmp_path):
    wide, tall = noise(8, 14, 3), noise(13, 8, 3)
    write(tmp_path / "wide.png", wide)
    write(tmp_path / "tall.png", tall)
    np.testing.assert_array_equal(decoding.decode(str(tmp_path / "wide.png"), 8), wide[:, 3:11])
    np.testing.assert_array_equal(decoding.decode(str(tmp_path / "tall.png"), 8), tall[2:10])


def test_decode_resizes_the_shorter_side(tmp_path):
    # Halves that differ, with a middle band: after the crop the band fills the middle.
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 30:50] = (250, 100, 50)
    write(tmp_path / "x.png", pixels)
    got = decoding.decode(str(tmp_path / "x.png"), 8)
    want = np.zeros((8, 8, 3))
    want[:, 2:6] = (250, 100, 50)
    np.testing.assert_allclose(got[:, [0, 3, 4, 7]], want[:, [0, 3, 4, 7]])
    # Larger, too; every value lies between the neighbors it came from.
    got = decoding.decode(str(tmp_path / "x.png"), 80)
    assert got.shape == (80, 80, 3)
    assert got[:, 20:60].min(axis=(0, 1)).tolist() >= [125, 50, 25]


def test_decode_every_mode(tmp_path):
    rgb = np.zeros((8, 8, 3), np.uint8) + np.array([200, 100, 40], np.uint8)
    gray = noise(8, 8)
    image = Image.fromarray(rgb)
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(gray))
    palette = image.quantize(4)
    palette.info["transparency"] = b"\x00\x80"
    cases = {
        "rgba.png": (alpha, rgb),
        "palette.png": (palette, rgb),
        "cmyk.jpg": (image.convert("CMYK"), rgb),
        "jpeg.JPEG": (image, rgb),
        "gray.png": (Image.fromarray(gray), np.stack([gray] * 3, -1)),
        "sixteen.png": (
            Image.fromarray(gray.astype(np.uint16) * 256 + 7),
            np.stack([gray] * 3, -1),
        ),
        "la.png": (Image.merge("LA", [Image.fromarray(gray)] * 2), np.stack([gray] * 3, -1)),
        "bit.png": (Image.fromarray(gray > 99), np.stack([(gray > 99) * 255] * 3, -1)),
    }
    for name, (picture, want) in cases.items():
        picture.save(tmp_path / name)
        got = decoding.decode(str(tmp_path / name), 8, alpha="drop").astype(int)
        assert got.shape == (8, 8, 3), name
        tolerance = 3 if name.lower().endswith(("jpg", "jpeg")) else 0
        assert np.abs(got - want).max() <= tolerance, name


def test_decode_turns_as_exif_says(tmp_path):
    pixels = np.repeat(np.repeat(noise(2, 2, 3), 8, 0), 8, 1)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90° clockwise to show"
    image.save(tmp_path / "x.png", exif=exif)
    got = decoding.decode(str(tmp_path / "x.png"), 16)
    np.testing.assert_array_equal(got, np.rot90(pixels, -1))


@pytest.mark.parametrize("height", [180, 300, 600])  # decoded at 1/1, 1/2 and 1/4 of the size
def test_decode_large_jpeg_is_close_to_a_full_decode(tmp_path, height):
    size = (height * 4 // 3, height)
    smooth = Image.fromarray(noise(6, 8, 3)).resize(size, Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "x.jpg", quality=95)
    got = decoding.decode(str(tmp_path / "x.jpg"), 64).astype(int)
    with Image.open(tmp_path / "x.jpg") as image:
        box = (height // 6, 0, height // 6 + height, height)
        full = image.crop(box).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.abs(got - np.asarray(full)).max() <= 8
    assert got.std() > 20


def look(path):
    """Decodes an image of 8 pixels on white: its pixels as integers, and the remarks on it."""
    reason, remarks = decoding.examine(str(path), 8, "white")
    assert reason is None, reason
    return decoding.decode(str(path), 8).astype(int), remarks


ON_WHITE = ("transparent pixels become white (dataset.alpha=white)",)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "P key", "RGB key", "L key", "16 key", "webp"])
def test_transparent_pixels_become_white(tmp_path, kind):
    # Left half: alpha 0; right half: opaque, or half opaque (128 of 255) where that can be kept.
    alpha = np.repeat(np.array([0, 128], np.uint8), 4)[None].repeat(8, 0)
    ones = np.ones((8, 8), np.uint8)
    rgba = np.dstack([200 * ones, 100 * ones, 40 * ones, alpha])
    half = [255 - (255 - c) * 128 / 255 for c in (200, 100, 40)]
    path, options = tmp_path / "x.png", {}
    if kind in ("RGBA", "webp"):
        image, want = Image.fromarray(rgba), half
        if kind == "webp":
            path, options = tmp_path / "x.webp", {"lossless": True, "exact": True}
    elif kind == "LA":
        gray = Image.fromarray(100 * ones)
        image, want = Image.merge("LA", [gray, Image.fromarray(alpha)]), [half[1]] * 3
    elif kind in ("P", "P key"):
        image = Image.fromarray(np.repeat([0, 1], 4)[None].repeat(8, 0).astype(np.uint8), "P")
        image.putpalette([200, 100, 40] * 2)
        options, want = {"transparency": b"\x00\x80"}, half
        if kind == "P key":  # one transparent entry
            options, want = {"transparency": 0}, [200, 100, 40]
    elif kind == "RGB key":
        pixels = np.dstack([200 * ones, np.where(alpha, 100, 99).astype(np.uint8), 40 * ones])
        image, options, want = (
            Image.fromarray(pixels),
            {"transparency": (200, 99, 40)},
            (200, 100, 40),
        )
    elif kind == "L key":
        image = Image.fromarray(np.where(alpha, 90, 7).astype(np.uint8))
        options, want = {"transparency": 7}, [90] * 3
    else:
        image = Image.fromarray(np.where(alpha, 65535, 7).astype(np.uint16))
        image.save(path, transparency=7)
        with Image.open(path) as saved:
            if "transparency" not in saved.info:
                pytest.skip("this Pillow writes no tRNS for 16 bits")
        options, want = {"transparency": 7}, [255] * 3
    image.save(path, **options)
    pixels, remarks = look(path)
    assert remarks[-1:] == ON_WHITE
    assert (pixels[:, :4] == 255).all()
    np.testing.assert_allclose(pixels[:, 4:], np.broadcast_to(want, (8, 4, 3)), atol=1)


def test_a_picture_in_the_alpha_channel_is_seen_unless_it_is_dropped(tmp_path):
    ink = noise(8, 8)  # black, with the picture in its opacity
    image = Image.fromarray(np.dstack([np.zeros((8, 8, 3), np.uint8), ink]))
    image.save(tmp_path / "x.png")
    np.testing.assert_array_equal(
        look(tmp_path / "x.png")[0], 255 - np.dstack([ink] * 3).astype(int)
    )
    assert decoding.decode(str(tmp_path / "x.png"), 8, "drop").max() == 0
    assert decoding.examine(str(tmp_path / "x.png"), 8, "drop") == (
        None,
        ("transparent pixels become opaque (dataset.alpha=drop)",),
    )


def test_opaque_alpha_channels_are_no_remark(tmp_path):
    pixels = noise(8, 8, 4)
    pixels[..., 3] = 255
    write(tmp_path / "x.png", pixels)
    seen, remarks = look(tmp_path / "x.png")
    np.testing.assert_array_equal(seen, pixels[..., :3])
    assert remarks == ()


@pytest.mark.parametrize(
    ("name", "dtype", "levels", "want", "white"),
    [
        ("10 bits.png", np.uint16, (0, 4, 700, 1023), (0, 1, 175, 255), 1023),
        ("12 bits.png", np.uint16, (0, 16, 2048, 4095), (0, 1, 128, 255), 4095),
        ("14 bits.png", np.uint16, (0, 64, 8192, 16383), (0, 1, 128, 255), 16383),
        ("16 bits.png", np.uint16, (0, 256, 32768, 65535), (0, 1, 128, 255), 65535),
        ("8 bits in 16.png", np.uint16, (0, 1, 128, 200), (0, 1, 128, 200), 255),
        ("12 bits.tif", np.uint16, (0, 16, 2048, 4095), (0, 1, 128, 255), 4095),
        ("other end.tif", ">u2", (0, 16, 2048, 4095), (0, 1, 128, 255), 4095),
        ("24 bits.tif", np.int32, (0, 2**16, 2**23, 2**24 - 1), (0, 1, 128, 255), 2**24 - 1),
        ("share.tif", np.float32, (0, 0.25, 0.5, 1), (0, 64, 128, 255), 1),
        ("float.tif", np.float32, (0, 1, 127.6, 200), (0, 1, 128, 200), 255),
    ],
)
def test_deep_gray_images_keep_their_levels(tmp_path, name, dtype, levels, want, white):
    pixels = np.repeat(np.repeat(np.reshape(levels, (2, 2)), 4, 0), 4, 1).astype(dtype)
    Image.fromarray(pixels).save(tmp_path / name)
    seen, remarks = look(tmp_path / name)
    assert seen[::4, ::4].tolist() == [[[x] * 3 for x in row] for row in np.reshape(want, (2, 2))]
    assert remarks == (f"gray levels 0..{white:g} are scaled to 0..255",)


def test_gray_images_below_zero_are_stretched(tmp_path):
    pixels = np.full((8, 8), -100, np.int32)
    pixels[:, 2:], pixels[:, 6:] = 0, 100
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    seen, remarks = look(tmp_path / "x.tif")
    assert seen[0, :, 0].tolist() == [0, 0, 128, 128, 128, 128, 255, 255]
    assert remarks == ("gray levels -100..100 are scaled to 0..255",)


def test_a_flat_gray_image_is_no_division_by_zero(tmp_path):
    Image.fromarray(np.full((8, 8), -5, np.int32)).save(tmp_path / "x.tif")
    assert look(tmp_path / "x.tif")[0].max() == 0
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "x.png")
    assert look(tmp_path / "x.png")[0].max() == 0


def test_pgm_files_say_themselves_what_white_is(tmp_path):
    for maxval, level, want in ((65535, 4000, 15), (4095, 4095, 255), (4095, 100, 6)):
        data = np.full((8, 8), level, ">u2").tobytes()
        (tmp_path / "x.pgm").write_bytes(b"P5 8 8 %d\n" % maxval + data)
        assert np.unique(look(tmp_path / "x.pgm")[0]).tolist() == [want]


def test_values_that_are_not_finite_are_broken(tmp_path):
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match="values that are not finite"):
        decoding.decode(str(tmp_path / "x.tif"), 8)


@pytest.mark.parametrize("name", ["x.gif", "x.tiff", "x.png", "x.webp", "x.mpo"])
def test_the_first_frame_counts(tmp_path, name):
    first, second = (Image.new("RGB", (8, 8), color) for color in ("red", "lime"))
    lossless = {"lossless": True} if name.endswith("webp") else {}
    first.save(tmp_path / name, save_all=True, append_images=[second], **lossless)
    pixels, remarks = look(tmp_path / name)
    assert np.abs(pixels - [255, 0, 0]).max() <= 2
    assert remarks == ("only the first of several frames is used",)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
@pytest.mark.parametrize("name", ["x.jpg", "x.tif"])
def test_no_color_space_comes_out_inverted(tmp_path, mode, name):
    if (mode, name) == ("LAB", "x.jpg"):
        return  # there is no such file
    for color in ((250, 250, 250), (10, 10, 10), (200, 100, 40)):
        image = Image.new("RGB", (8, 8), color)
        if mode == "LAB":
            profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
            image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
        else:
            image = image.convert(mode)
        image.save(tmp_path / name)
        with Image.open(tmp_path / name) as saved:
            assert saved.mode == ("RGB" if (mode, name) == ("YCbCr", "x.jpg") else mode)
        assert np.abs(look(tmp_path / name)[0] - color).max() <= 4, color


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "tif", "webp", "ppm", "jp2"])
def test_files_that_are_cut_off_are_broken(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    write(path, noise(64, 64, 3))
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) * 9 // 10):
        path.write_bytes(whole[:length])
        reason, _ = decoding.examine(str(path), 8, "white")
        assert reason, length
        assert (reason == "the file is empty") == (length == 0)
        assert str(tmp_path) not in reason


def test_what_is_no_image_is_broken(tmp_path):
    for name, content in (
        ("page.jpg", b"<html>404</html>"),
        ("lfs.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("figure.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
    ):
        (tmp_path / name).write_bytes(content)
        reason, _ = decoding.examine(str(tmp_path / name), 8, "white")
        assert reason == "not an image of a known format"
    assert (
        decoding.examine(str(tmp_path / "none.png"), 8, "white")[0] == "No such file or directory"
    )
