"""Exports as StableHLO and what all forms share: the check, the refusals, the line of Pillow."""

import json
import sys
import zipfile

import numpy as np
import pytest
from jax import export
from PIL import Image, ImageOps
from predict_runs import CLASSES, expected, make_bundle, make_model

from layermatch_jax.after.export import function, onnx, stablehlo, writing
from layermatch_jax.data.augment import crop
from layermatch_jax.data.sources import decoding
from layermatch_jax.errors import InputError


def test_stablehlo_on_the_command_line(tmp_path, call):
    """The file computes what NumPy does, for any number of images, and tells about itself."""
    bundle, path = make_bundle(tmp_path), tmp_path / "a.stablehlo"
    flags = ("--mode=export", "--format=stablehlo", f"--workdir={bundle}", f"--out={path}")
    status, said, _ = call(*flags)
    assert (status, said) == (0, f"stablehlo: {path}\n")
    with zipfile.ZipFile(path) as file:
        told = json.loads(file.read("layermatch.json"))
        program = export.deserialize(bytearray(file.read("model.stablehlo")))
    assert program.platforms == ("cpu", "cuda", "tpu")
    for count in (1, 2, 7):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        found = program.call(crop.center_crop(pixels, 6))
        assert (found.shape, found.dtype) == ((count, 3), np.float32)
        np.testing.assert_allclose(found, expected(make_model(), pixels)[1], atol=1e-6)
    assert told["class_names"] == list(CLASSES)
    assert told["input"] == {"name": "images", "dtype": "uint8", "shape": ["n", 6, 6, 3]}
    assert told["output"] == {"name": "probabilities", "dtype": "float32", "shape": ["n", 3]}
    assert (told["stored_size"], told["image_size"]) == (8, 6)
    assert told["preprocessing"].endswith("(8, 8), Image.Resampling.BILINEAR).crop((1, 1, 7, 7))")
    before = path.read_bytes()
    assert b"backprop.py" not in before  # no paths of the machine that wrote it
    assert call(*flags)[0] == 0  # of the same bytes
    with pytest.raises(InputError, match="is there already, and is not this export"):
        stablehlo.write(make_model(alpha="drop"), str(path))
    assert path.read_bytes() == before


def test_what_computes_something_else_is_not_written(tmp_path):
    model, path = make_model(), tmp_path / "a.stablehlo"
    other = make_model(mean=(0.5, 0.25, 0.7))
    for content, told in (
        (lambda _: stablehlo._content(other), r"its probabilities differ by .*, more than 1e-04"),
        (lambda _: b"no model", "zipfile.BadZipFile: File is not a zip file"),
        (lambda _: {}[0], "KeyError: 0"),
    ):
        with pytest.raises(
            InputError, match=rf"\(linear, float32\) cannot be exported so \({told}"
        ):
            writing.write(model, str(path), "stablehlo", content)
    assert list(tmp_path.iterdir()) == []


def test_refused_places(tmp_path):
    for name, told in (
        ("a.zip", r"the name of such a file ends with \.stablehlo"),
        ("none/a.stablehlo", "there is no folder .*none. Make it"),
    ):
        with pytest.raises(InputError, match=told):
            stablehlo.write(make_model(), str(tmp_path / name))


def test_onnx_without_its_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(InputError, match=r"pip install 'jax2onnx>=0\.17' onnxruntime"):
        onnx.write(make_model(), str(tmp_path / "a.onnx"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [(8, 8), (11, 8), (7, 5), (40, 31), (31, 40), (8, 20), (5, 9)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_line_of_pillow_makes_our_pixels(size, mode, tmp_path):
    height_width = (*size, 3) if mode == "RGB" else size
    pixels = np.random.default_rng(0).integers(0, 256, height_width, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    line = function.preprocessing(make_model(stored_size=8, image_size=5))
    with Image.open(tmp_path / "a.png") as image:
        made = eval(line, {"image": image, "Image": Image, "ImageOps": ImageOps})
    ours = decoding.decode(str(tmp_path / "a.png"), 8)
    if size == (11, 8):  # the shorter side is 8, and the other is larger by an odd number
        assert np.asarray(made).shape == (5, 5, 3)
    else:
        np.testing.assert_array_equal(made, crop.center_crop(ours[None], 5)[0])
