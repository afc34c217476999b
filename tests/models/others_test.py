"""Compares features from pretrained weights with those of timm and torchvision."""

import dataclasses
import functools
import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import networks_of_others as others
import numpy as np
import pytest
from flax import traverse_util

from layermatch_jax.models import create_model, pretrained
from layermatch_jax.models.pretrained import tables
from layermatch_jax.models.vit import VisionTransformer, resample_positions

QUICK_COMPILE = {"xla_backend_optimization_level": 0}
STORED = np.load(others.FILE)
with_timm = pytest.mark.skipif(
    not importlib.util.find_spec("timm"), reason="needs timm, torchvision and torch"
)


def variables_of(weights, module, family, side):
    """Converts the weights of a file to the variables of a network; all weights are used."""
    found = tables.translate(weights, family)
    assert not found.unknown
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), train=False)
    )
    wanted = {
        name: {path: x.shape for path, x in traverse_util.flatten_dict(tree, sep="/").items()}
        for name, tree in shapes.items()
    }
    assert {path: x.shape for path, x in found.arrays.items()} == {
        path: shape for tree in wanted.values() for path, shape in tree.items()
    }
    return {
        name: traverse_util.unflatten_dict({path: found.arrays[path] for path in tree}, sep="/")
        for name, tree in wanted.items()
    }


def apply(module, variables, x, train):
    program = jax.jit(
        lambda v, x: module.apply(v, x, train, mutable=["batch_stats"]),
        compiler_options=QUICK_COMPILE,
    )
    return program(variables, x)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", others.CASES)
def test_features_are_those_that_timm_computed(name, train):
    case = others.CASES[name]
    if train and case.family.bn_epsilon is None:
        pytest.skip("nothing in a transformer looks at the batch")
    weights = others.random_weights(json.loads(STORED[f"{name}/shapes"].tobytes()))
    variables = variables_of(weights, case.module, case.family, case.side)
    features, _ = apply(case.module, variables, others.images(case.side), train)
    expected = STORED[f"{name}/{train}"]
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(features[:, :16], expected, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- position embeddings


def test_positions_are_resampled_by_the_antialiased_cubic_filter():
    # From 4 to 2: a cubic filter of support 4 around the center of each half, in steps of a half:
    # weights at the distances 0.25, 0.75 and 1.25 target pixels, cut at the border, normalized.
    def cubic(t):  # Keys, a = -0.5
        return 1.5 * t**3 - 2.5 * t**2 + 1 if t < 1 else -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2

    weights = np.array([cubic(0.25), cubic(0.25), cubic(0.75), cubic(1.25)])
    first = weights / weights.sum()
    matrix = np.stack([first, first[::-1]])
    positions = np.random.RandomState(0).randn(4, 4, 3)
    expected = np.einsum("ai,bj,ijd->abd", matrix, matrix, positions)
    got = resample_positions(jnp.array(positions.reshape(1, 16, 3), jnp.float32), (2, 2))
    np.testing.assert_allclose(got[0], expected.reshape(4, 3), atol=1e-6)


@with_timm
@pytest.mark.parametrize(("side", "grid"), [(14, (6, 6)), (4, (7, 5)), (37, (16, 16))])
def test_positions_are_resampled_as_timm_does(side, grid):
    import torch
    from timm.layers import resample_abs_pos_embed

    positions = np.random.RandomState(0).randn(1, side**2, 8).astype(np.float32)
    theirs = resample_abs_pos_embed(torch.tensor(positions), grid, num_prefix_tokens=0).numpy()
    np.testing.assert_allclose(resample_positions(positions, grid), theirs, atol=1e-5)


def test_a_transformer_takes_images_of_other_sizes():
    module = VisionTransformer(width=64, patch=8, depth=4, dtype=others.FLOAT32)
    variables = jax.jit(module.init, static_argnames="train", compiler_options=QUICK_COMPILE)(
        jax.random.key(0), others.images(32), train=False
    )
    positions = variables["params"]["stem"]["positions"]
    assert positions.shape == (1, 16, 64)
    smaller = jax.tree_util.tree_map_with_path(
        lambda path, x: resample_positions(x, (2, 2)) if path[-1].key == "positions" else x,
        variables,
    )
    x = others.images(16)
    features, expected = (apply(module, v, x, False)[0] for v in (variables, smaller))
    np.testing.assert_allclose(features, expected, atol=1e-6)


# ---------------------------------------------------------------- drop path


def test_drop_path_is_a_function_of_its_key():
    module = VisionTransformer(width=64, patch=8, depth=4, dtype=others.FLOAT32, drop_path=0.5)
    x = others.images(16)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def features(key):
        variables = module.init(jax.random.key(0), x, train=False)  # evaluation needs no key
        return module.apply(variables, x, train=True, rngs={"drop_path": key})

    first, again, other = (features(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


# ---------------------------------------------------------------- whole networks, compared


def model_config(name, **fields):
    defaults = {
        "dtype": "float32",
        "bn_decay": 0.9,
        "bn_epsilon": 1e-3,
        "remat": False,
        "freeze": "",
        "batch_stats": "batch",
        "drop_path": 0.0,
        "registers": 0,
        "layer_scale": False,
        "pool": "token",
    }
    return types.SimpleNamespace(name=name, **(defaults | fields))


WHOLE = {
    "timm tf_efficientnet_lite0": ({"name": "efficientnet_lite0"}, 64),
    "timm resnet50": ({"name": "resnet50", "bn_epsilon": 1e-5}, 64),
    "torchvision resnet50": ({"name": "resnet50", "bn_epsilon": 1e-5}, 64),
    "timm vit_small_patch16_224": ({"name": "vit_s16"}, 64),
    "timm vit_base_patch16_224": ({"name": "vit_b16"}, 48),
    "timm vit_small_patch14_dinov2": ({"name": "vit_s14", "layer_scale": True}, 56),
    "timm vit_small_patch14_reg4_dinov2": (
        {"name": "vit_s14", "layer_scale": True, "registers": 4},
        56,
    ),
    "timm vit_base_patch14_reg4_dinov2": (
        {"name": "vit_b14", "layer_scale": True, "registers": 4},
        56,
    ),
}


@with_timm
@pytest.mark.slow
@pytest.mark.parametrize("case", WHOLE)
def test_whole_networks_beside_theirs(case, tmp_path):
    import timm
    import torch
    import torchvision
    from safetensors.numpy import save_file

    library, name = case.split()
    fields, side = WHOLE[case]
    if library == "torchvision":
        theirs = torchvision.models.resnet50()
        theirs.fc = torch.nn.Identity()
    else:
        size = {"img_size": side} if "vit" in name else {}
        theirs = timm.create_model(name, num_classes=0, **size)
    weights, apply_theirs = others.of_theirs(theirs)
    save_file(weights, tmp_path / "model.safetensors")

    config = model_config(**fields)
    module = create_model(config)
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), train=False)
    )
    read = pretrained.read(str(tmp_path / "model.safetensors"), config.name)
    params, batch_stats = pretrained.fit(read, shapes["params"], shapes.get("batch_stats", {}))
    variables = {"params": params, "batch_stats": batch_stats}
    x = others.images(side, 16)
    features, _ = apply(module, variables, x, train=False)
    np.testing.assert_allclose(features, apply_theirs(x, False), rtol=0, atol=1e-4)
    if not batch_stats:
        return

    # In training, fifty layers amplify rounding errors to 5e-4, so both compute in float64.
    with jax.enable_x64(True):
        layers = dataclasses.replace(module.layers, dtype=jnp.dtype("float64"))
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), variables)
        features, new = apply(module.clone(layers=layers), wide, x.astype(np.float64), True)
    theirs.double()
    np.testing.assert_allclose(
        features, apply_theirs(x.astype(np.float64), True), rtol=0, atol=1e-6
    )
    if "resnet50" in name:  # after one step: PyTorch stores the unbiased variance
        count = 16 * (side // 4) ** 2
        stats = new["batch_stats"]["stage1_block0"]["norm1"]
        layer = theirs.layer1[0].bn1
        np.testing.assert_allclose(stats["mean"], layer.running_mean, atol=1e-4)
        old = batch_stats["stage1_block0"]["norm1"]["var"]
        unbiased = 0.9 * old + (stats["var"] - 0.9 * old) * count / (count - 1)
        np.testing.assert_allclose(unbiased, layer.running_var, rtol=1e-4)
