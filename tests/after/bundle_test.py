"""Bundles: their content, reading them, and the errors for other files."""

import json
import struct

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from predict_runs import CLASSES, cut, make_bundle, make_model
from runs_test import made, workdir  # noqa: F401 (fixtures)

from layermatch_jax.after import bundle, model, predict, runs, trained
from layermatch_jax.data import images as images_lib
from layermatch_jax.errors import InputError


def with_header(path, to, change):
    """Writes a copy of a bundle with changed JSON in its metadata."""
    with safetensors.safe_open(path, "np") as file:
        header = json.loads(file.metadata()["layermatch"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header)
    safetensors.numpy.save_file(arrays, to, {"layermatch": json.dumps(header)})
    return to


def test_a_bundle_is_the_model(tmp_path):
    before = make_model("conv4")
    after = bundle.read(str(make_bundle(tmp_path, backbone="conv4")))
    assert after.variables["batch_stats"].keys() == before.variables["batch_stats"].keys()
    assert model.card(after) == model.card(before)
    assert after.class_names == CLASSES
    assert model.flat(after.variables).keys() == model.flat(before.variables).keys()
    for name, array in model.flat(before.variables).items():
        np.testing.assert_array_equal(model.flat(after.variables)[name], array)
        assert model.flat(after.variables)[name].dtype == np.float32
    assert model.fingerprint(after) == model.fingerprint(before)


def test_the_file_can_be_read_without_this_package(tmp_path):
    """Eight bytes of length, JSON, and little-endian arrays."""
    content = make_bundle(tmp_path).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    told = json.loads(header["__metadata__"]["layermatch"])
    assert told["format"] == 1
    assert told["class_names"] == list(CLASSES)
    assert (told["mean"], told["std"]) == ([0.5, 0.25, 0.75], [0.25, 0.5, 0.125])
    assert (told["stored_size"], told["image_size"], told["alpha"]) == (8, 6, "white")
    assert told["backbone"]["name"] == "linear"
    assert told["about"]["method"] == "fixmatch"
    of_bias = header["classifier/bias"]
    assert (of_bias["dtype"], of_bias["shape"]) == ("F32", [3])
    start, stop = of_bias["data_offsets"]
    bias = np.frombuffer(content[8 + length :][start:stop], "<f4")
    np.testing.assert_array_equal(bias, make_model().variables["classifier"]["bias"])


def test_a_run_and_its_bundle_predict_the_same(made, tmp_path):  # noqa: F811
    path = tmp_path / "run.layermatch"
    bundle.write(trained.read(str(made)), str(path))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    images = images_lib.from_array(pixels, None)
    of_run, of_bundle = (predict.predict(trained.read(str(p)), images) for p in (made, path))
    np.testing.assert_array_equal(of_bundle.probabilities, of_run.probabilities)
    np.testing.assert_array_equal(of_bundle.features, of_run.features)
    about = bundle.read(str(path)).about
    result = json.loads((made / "result.json").read_text())
    assert about["result"] == result
    assert (about["step"], about["train_steps"], about["data_set"]) == (4, 4, "fake")
    assert about["weights"] == {"source": "random initialization", "license": None}
    run = runs.read(str(made))
    params = run.state.ema_params["classifier"]["kernel"]
    np.testing.assert_array_equal(bundle.read(str(path)).variables["classifier"]["kernel"], params)


def test_written_once(tmp_path):
    path = make_bundle(tmp_path)
    before = path.read_bytes()
    bundle.write(make_model(), str(path))
    assert path.read_bytes() == before
    with pytest.raises(InputError, match="already exists and is not this model"):
        bundle.write(make_model(alpha="drop"), str(path))
    assert path.read_bytes() == before
    for name, told in (
        ("model.zip", r"the name must end with \.layermatch"),
        ("none/model.layermatch", "there is no folder .*none. Make it"),
        ("gs://b/model.layermatch", "give a local path, and copy the file"),
    ):
        with pytest.raises(InputError, match=told):
            bundle.write(make_model(), name if "://" in name else str(tmp_path / name))
    assert [p.name for p in tmp_path.iterdir()] == ["model.layermatch"]


def test_what_is_no_whole_bundle(tmp_path):
    path, other = make_bundle(tmp_path), tmp_path / "other.layermatch"
    size = path.stat().st_size
    for keep in (size - 1, size // 2, 100):
        with pytest.raises(InputError, match=r"The bundle .* is incomplete or damaged. Copy it"):
            trained.read(str(cut(path, keep, other)))
    for content in (b"", b"abc", b"no bundle at all, but text\n" * 9, b"\x89PNG" + bytes(200)):
        other.write_bytes(content)
        with pytest.raises(
            InputError, match=r"is not a bundle. Use the folder of a run, or a file"
        ):
            trained.read(str(other))
    safetensors.numpy.save_file({"x": np.zeros(3)}, other, {"format": "np"})
    with pytest.raises(InputError, match="is not a bundle"):
        trained.read(str(other))
    flipped = bytearray(path.read_bytes())
    flipped[-1] ^= 1
    other.write_bytes(flipped)
    with pytest.raises(InputError, match=r"The bundle .* is damaged"):
        trained.read(str(other))

    def later(header):
        header["format"] = 2
        header["new"] = 1

    with pytest.raises(InputError, match=r"has format 2, but this version .* up to 1. Install a"):
        trained.read(str(with_header(path, other, later)))
    for change in (
        lambda header: header.pop("mean"),
        lambda header: header.update(stored_size=9),
        lambda header: header.update(new=1),
    ):
        with pytest.raises(InputError, match=r"The bundle .* is damaged"):
            trained.read(str(with_header(path, other, change)))
    assert trained.read(str(with_header(path, other, lambda header: None))).stored_size == 8


def test_neither_run_nor_bundle(tmp_path):
    with pytest.raises(InputError, match=r"no such folder or file. Use the folder of a run, or a"):
        trained.read(str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"holds no run: there is no .*config.json"):
        trained.read(str(tmp_path))


def test_export_on_the_command_line(made, tmp_path, call):  # noqa: F811
    export, out = ["--mode=export", f"--workdir={made}"], f"--out={tmp_path}/a.layermatch"
    status, said, err = call(*export, "--format=bundle", out)
    assert (status, said) == (0, f"bundle: {tmp_path}/a.layermatch\n")
    assert "linear, 10 classes, 6 pixels, step 4 of 4" in err
    again = call("--mode=export", f"--workdir={tmp_path}/a.layermatch", "--format=bundle",
                 f"--out={tmp_path}/b.layermatch")  # fmt: skip
    assert again[0] == 0
    assert (tmp_path / "a.layermatch").read_bytes() == (tmp_path / "b.layermatch").read_bytes()
    for flags, told in (
        ([out], "--format is needed: bundle"),
        ([out, "--format=bundel"], "unknown --format 'bundel'. Did you mean 'bundle'?"),
        (["--format=bundle"], "--out is needed"),
        ([out, "--format=bundle", "--top=3"], "--top is not read by --mode=export, but by --mode="),
        ([out, "--format=bundle", "--config.seed=3"], "--config.seed is not read"),
    ):
        status, said, err = call(*export, *flags)
        assert (status, said) == (2, "")
        assert told in err
