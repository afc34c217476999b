"""Exports of all backbones, run by their runtimes alone; and the programs of docs/predict.md.

vit_b… is vit_s… with more features, and left out for its size.
"""

import importlib.util
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest
from command_line import ROOT
from PIL import Image
from predict_runs import CLASSES, make_model

from layermatch_jax.after import model as model_lib
from layermatch_jax.after import predict
from layermatch_jax.after.export import onnx, stablehlo, writing
from layermatch_jax.data.sources import folder
from layermatch_jax.errors import InputError

pytestmark = pytest.mark.slow
needs_onnx = pytest.mark.skipif(
    not (importlib.util.find_spec("jax2onnx") and importlib.util.find_spec("onnxruntime")),
    reason="needs jax2onnx and onnxruntime",
)
FORMS = ["stablehlo", pytest.param("onnx", marks=needs_onnx)]
WRITE = {"stablehlo": stablehlo.write, "onnx": onnx.write}
SIDES = {
    "linear": 28,
    "conv4": 28,
    "wide_resnet": 32,
    "resnet50": 64,
    "efficientnet_lite0": 64,
    "vit_s14": 56,
    "vit_s16": 64,
}


def initialized(backbone):
    """A model of a freshly initialized network, whose logits have a deviation of about 1."""
    side = SIDES[backbone]
    model = make_model(backbone, image_size=side, stored_size=side + 4)
    network = model_lib.predictor(model).backbone
    seen = np.zeros((1, side, side, 3), np.float32)
    initial = jax.jit(lambda key: network.init(key, seen, train=False))(jax.random.key(0))
    variables = {**model.variables, "backbone": initial["params"]}
    variables["batch_stats"] = initial.get("batch_stats", {})
    model = model._replace(variables=jax.device_get(variables))
    features, _ = jax.jit(model_lib.predictor(model).__call__)(
        model.variables, writing._images(side)
    )
    norm = np.sqrt(np.mean(np.sum(np.square(features), axis=-1)))
    classifier = {**model.variables["classifier"]}
    classifier["kernel"] = classifier["kernel"] / norm
    return model._replace(variables={**model.variables, "classifier": classifier})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backbone", SIDES)
def test_all_backbones(backbone, form, tmp_path, monkeypatch):
    difference, found = writing._difference, []
    monkeypatch.setattr(writing, "_difference", lambda *a: found.append(difference(*a)) or found[0])
    WRITE[form](initialized(backbone), str(tmp_path / f"model.{form}"))
    print(f"{backbone} {form}: {found[0]:.1e}")
    assert found[0] < 1e-5


@needs_onnx
def test_bfloat16_cannot_be_onnx(tmp_path):
    model = make_model("conv4")
    model = model._replace(backbone={**model.backbone, "dtype": "bfloat16"})
    with pytest.raises(InputError, match=r"this model \(conv4, bfloat16\) cannot be exported so"):
        onnx.write(model, str(tmp_path / "model.onnx"))
    assert list(tmp_path.iterdir()) == []


# ---- The programs of docs/predict.md ----


def programs():
    page = (ROOT / "docs" / "predict.md").read_text(encoding="utf-8")
    section = page.split("## Export\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def place(tmp_path):
    """A folder with a photograph, and the probabilities that we predict of it."""
    model = initialized("conv4")
    pixels = np.random.default_rng(3).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "heron.jpg", format="PNG")  # exact, whatever its name
    images = folder.from_files([str(tmp_path / "heron.jpg")], model.stored_size, model.alpha)
    return tmp_path, model, predict.predict(model, images).probabilities[0]


@pytest.mark.parametrize("form", FORMS)
def test_the_programs(form, place):
    (path, model, expected), number = place, ("stablehlo", "onnx").index(form)
    WRITE[form](model, str(path / f"mine.{form}"))
    code = programs()[number] + "\nprint(np.asarray(probabilities)[0].tolist())"
    done = subprocess.run([sys.executable, "-c", code], cwd=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, found = done.stdout.splitlines()
    assert name == CLASSES[np.argmax(expected)]
    np.testing.assert_allclose(json.loads(found), expected, atol=1e-5)


@needs_onnx
def test_the_server(place):
    path, model, expected = place
    onnx.write(model, str(path / "mine.onnx"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = programs()[2].replace("8000", str(port))
    assert code.count("\n") < 32
    server = subprocess.Popen([sys.executable, "-c", code], cwd=path)
    try:
        image, deadline = (path / "heron.jpg").read_bytes(), time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}", image, 60) as answer:
                    found = json.loads(answer.read())
                break
            except urllib.error.URLError:
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
        assert list(found) == list(CLASSES)
        np.testing.assert_allclose(list(found.values()), expected, atol=1e-5)
    finally:
        server.kill()
        server.wait()
