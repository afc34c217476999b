"""Backbones: size and arithmetic, a NumPy forward pass, BatchNorm, dtypes, initialization."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layermatch_jax.errors import InputError
from layermatch_jax.models import create_model
from layermatch_jax.models.layers import Layers
from layermatch_jax.models.resnet import ResNet

DECAY, EPSILON = 0.9, 1e-3
# Compilation takes most of the time of these tests.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
LAYERS = Layers(jnp.dtype(jnp.float32), DECAY, EPSILON)


def config(name, **fields):
    """Makes a model config: a WRN-28-2 with the given fields replaced."""
    defaults = {
        "depth": 28,
        "widen_factor": 2,
        "stages": 3,
        "first_stride": 1,
        "dtype": "float32",
        "bn_decay": DECAY,
        "bn_epsilon": EPSILON,
        "width": 16,
        "remat": False,
        "freeze": "",
        "batch_stats": "batch",
        "drop_path": 0.0,
    }
    return types.SimpleNamespace(name=name, **(defaults | fields))


def wide_resnet(**fields):
    return create_model(config("wide_resnet", **fields))


def tiny_wide_resnet(**fields):
    return wide_resnet(**({"depth": 10, "widen_factor": 1} | fields))


def tiny_resnet(**fields):
    return ResNet(**({"blocks": (1, 2), "layers": LAYERS, "width": 4} | fields))


def conv4(**fields):
    return create_model(config("conv4", **({"width": 4} | fields)))


def linear():
    return create_model(config("linear", width=5))


def images(n, size, seed=0):
    return np.random.default_rng(seed).normal(size=(n, size, size, 3)).astype(np.float32)


@functools.cache
def abstract_variables(module, size):
    shape = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(lambda key, x: module.init(key, x, train=False), jax.random.key(0), shape)


def random_variables(module, size):
    """Makes variables without default values, so that skipped or swapped layers are detected."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        match path[-1].key:
            case "kernel":
                return rng.normal(size=leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))
            case "scale" | "var":
                return rng.uniform(0.5, 2.0, leaf.shape)
            case "bias" | "mean":
                return 0.5 * rng.normal(size=leaf.shape)

    def draw_float32(path, leaf):
        return draw(path, leaf).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw_float32, abstract_variables(module, size))


def apply(module, variables, x, train=True):
    program = jax.jit(
        lambda v, x: module.apply(v, x, train, mutable=["batch_stats"]),
        compiler_options=QUICK_COMPILE,
    )
    return program(variables, x)


def paths(tree):
    """{"stem/kernel": leaf, ...}."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in flat}


# ---------------------------------------------------------------- size and arithmetic


def equations(jaxpr):
    """Yields all equations, also those of inner programs (jit, remat, custom derivatives)."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def forward_equations(module, size, train=False):
    variables = abstract_variables(module, size)
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    forward = jax.make_jaxpr(lambda v, x: module.apply(v, x, train, mutable=["batch_stats"]))
    return list(equations(forward(variables, x).jaxpr))


def convolutions(eqns):
    return [e for e in eqns if e.primitive.name == "conv_general_dilated"]


def macs(eqns):
    """Counts the multiply-accumulates of convolutions and matrix products."""
    total = 0
    for e in convolutions(eqns):
        kernel = e.invars[1].aval
        out_channels = kernel.shape[e.params["dimension_numbers"].rhs_spec[0]]
        total += e.outvars[0].aval.size * kernel.size // out_channels
    for e in eqns:
        if e.primitive.name == "dot_general":
            (contracted, _), _ = e.params["dimension_numbers"]
            left = e.invars[0].aval.shape
            total += e.outvars[0].aval.size * math.prod(left[d] for d in contracted)
    return total


# (fields, side, D, classes, parameters, multiply-accumulates), the last two with the classifier.
# The numbers of ResNet-50 are torchvision's. 2.57 and 0.65 GMAC: the STL-10 variant with first
# stride 1 and 2.
SIZES = {
    "wrn-28-2": ({"name": "wide_resnet"}, 32, 128, 10, 1_467_610, 214_353_152),
    "wrn-28-8": (
        {"name": "wide_resnet", "widen_factor": 8},
        *(32, 512, 10, 23_354_842, 3_360_084_992),
    ),
    "wrn-37-2": (
        {"name": "wide_resnet", "stages": 4},
        *(96, 256, 10, 5_929_434, 2_570_897_920),
    ),
    "wrn-37-2-stride-2": (
        {"name": "wide_resnet", "stages": 4, "first_stride": 2},
        *(96, 256, 10, 5_929_434, 645_712_384),
    ),
    "resnet50": ({"name": "resnet50"}, 224, 2048, 1000, 25_557_032, 4_089_184_256),
    "conv4": ({"name": "conv4"}, 16, 64, 10, 61_338, 212_608),
    "linear": ({"name": "linear"}, 16, 16, 10, 12_458, 12_448),
}


@pytest.mark.parametrize("case", SIZES)
def test_parameters_and_arithmetic(case):
    fields, size, features, classes, expected_parameters, expected_macs = SIZES[case]
    module = create_model(config(**fields))
    eqns = forward_equations(module, size)
    parameters = jax.tree.leaves(abstract_variables(module, size)["params"])
    classifier = features * classes
    assert sum(p.size for p in parameters) + classifier + classes == expected_parameters
    assert macs(eqns) + classifier == expected_macs


@pytest.mark.parametrize("make", [tiny_wide_resnet, tiny_resnet, conv4])
def test_every_convolution_is_padded_alike_on_all_sides(make):
    for e in convolutions(forward_equations(make(), 16)):
        side = e.invars[1].aval.shape[e.params["dimension_numbers"].rhs_spec[2]]
        assert e.params["padding"] == ((side // 2, side // 2),) * 2


@pytest.mark.parametrize(
    "name", ["wide_resnet", "resnet50", "efficientnet_lite0", "conv4", "linear"]
)
def test_parameter_paths_are_regular(name):
    for path, leaf in paths(abstract_variables(create_model(config(name)), 32)["params"]).items():
        module, *_, kind = path.split("/")
        assert module in ("stem", "final_norm") or module.startswith("stage")
        assert kind in ("kernel", "scale", "bias")
        assert (kind == "kernel") == (leaf.ndim > 1)  # weight decay and masks go by the name


def test_wide_resnet_tree():
    params = abstract_variables(wide_resnet(), 32)["params"]
    blocks = {f"stage{s}_block{b}" for s in (1, 2, 3) for b in range(4)}
    assert set(params) == {"stem", "final_norm"} | blocks
    assert set(params["stage1_block0"]) == {"norm1", "conv1", "norm2", "conv2", "shortcut"}
    assert set(params["stage3_block1"]) == {"norm1", "conv1", "norm2", "conv2"}


# ---------------------------------------------------------------- the same networks in NumPy


class NumpyForward:
    """Computes the networks in float64 by their definitions; records all BatchNorm moments."""

    def __init__(self, variables, train):
        self.params, self.stats = (
            {path: np.asarray(leaf, np.float64) for path, leaf in paths(tree).items()}
            for tree in (variables["params"], variables.get("batch_stats", {}))
        )
        self.train = train
        self.moments = {}

    def conv(self, name, x, stride=1):
        kernel = self.params[f"{name}/kernel"]
        side = len(kernel)
        pad = side // 2
        x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(1, 2))
        return np.einsum("nyxcij,ijcd->nyxd", windows[:, ::stride, ::stride], kernel)

    def norm(self, name, x):
        moments = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        self.moments[name] = moments
        mean, var = (
            moments if self.train else (self.stats[f"{name}/mean"], self.stats[f"{name}/var"])
        )
        normal = (x - mean) / np.sqrt(var + EPSILON)
        return normal * self.params[f"{name}/scale"] + self.params[f"{name}/bias"]

    def leaky(self, x):
        return np.where(x > 0, x, 0.1 * x)

    def relu(self, x):
        return np.maximum(x, 0)

    def wide_resnet(self, x):
        x = self.conv("stem", x)
        blocks = sorted({p.split("/")[0] for p in self.params if p.startswith("stage")})
        for block in blocks:
            stride = 2 if block in ("stage2_block0", "stage3_block0") else 1
            active = self.leaky(self.norm(f"{block}/norm1", x))
            y = self.conv(f"{block}/conv1", active, stride)
            y = self.leaky(self.norm(f"{block}/norm2", y))
            y = self.conv(f"{block}/conv2", y)
            shortcut = active if block == "stage1_block0" else x
            if f"{block}/shortcut/kernel" in self.params:
                shortcut = self.conv(f"{block}/shortcut", shortcut, stride)
            x = shortcut + y
        return self.leaky(self.norm("final_norm", x)).mean(axis=(1, 2))

    def resnet(self, x):
        x = self.relu(self.norm("stem/norm", self.conv("stem/conv", x, 2)))
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # after ReLU, 0 is as good as -inf
        x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
        x = x[:, ::2, ::2].max(axis=(-2, -1))
        blocks = sorted({p.split("/")[0] for p in self.params if p.startswith("stage")})
        for block in blocks:
            stride = 2 if block == "stage2_block0" else 1
            y = self.relu(self.norm(f"{block}/norm1", self.conv(f"{block}/conv1", x)))
            y = self.relu(self.norm(f"{block}/norm2", self.conv(f"{block}/conv2", y, stride)))
            y = self.norm(f"{block}/norm3", self.conv(f"{block}/conv3", y))
            if f"{block}/shortcut/kernel" in self.params:
                x = self.norm(f"{block}/shortcut_norm", self.conv(f"{block}/shortcut", x, stride))
            x = self.relu(x + y)
        return x.mean(axis=(1, 2))

    def conv4(self, x):
        strides = {"stem": 2, "stage1_block0": 2, "stage2_block0": 2, "stage3_block0": 2}
        for name, stride in strides.items():
            x = self.leaky(self.norm(f"{name}/norm", self.conv(f"{name}/conv", x, stride)))
        return x.mean(axis=(1, 2))

    def linear(self, x):
        return x.reshape(len(x), -1) @ self.params["stem/kernel"]


# Depth 16 has two blocks a stage, because the first block of a stage differs from the others. In
# the smallest network, the shortcut of the first block has no convolution.
SMALL = {
    "wide_resnet": (functools.partial(wide_resnet, depth=16), NumpyForward.wide_resnet, 8),
    "tiny_wide_resnet": (tiny_wide_resnet, NumpyForward.wide_resnet, 8),
    "resnet": (tiny_resnet, NumpyForward.resnet, 24),
    "conv4": (conv4, NumpyForward.conv4, 16),
    "linear": (linear, NumpyForward.linear, 4),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("case", SMALL)
def test_forward_pass_and_batch_statistics_against_numpy(case, train):
    make, forward, size = SMALL[case]
    module, x = make(), images(4, size)
    variables = random_variables(module, size)
    features, new = apply(module, variables, x, train)

    reference = NumpyForward(variables, train)
    expected = forward(reference, x.astype(np.float64))
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)

    new_stats = paths(new.get("batch_stats", {}))
    assert len(new_stats) == 2 * len(reference.moments)
    for name, moments in reference.moments.items():
        for kind, moment in zip(("mean", "var"), moments, strict=True):
            old = reference.stats[f"{name}/{kind}"]
            updated = DECAY * old + (1 - DECAY) * moment if train else old
            np.testing.assert_allclose(
                new_stats[f"{name}/{kind}"], updated, rtol=1e-4, atol=1e-5, err_msg=f"{name}/{kind}"
            )


# ---------------------------------------------------------------- BatchNorm over devices, remat


def test_axis_name_makes_the_batch_global():
    """Two halves under a named axis (here vmap) must equal the whole batch."""
    alone = conv4()
    shared = create_model(config("conv4", width=4), axis_name="batch")
    variables, x = random_variables(alone, 16), images(8, 16)
    expected, expected_new = apply(alone, variables, x)
    halves = jax.vmap(
        lambda x: shared.apply(variables, x, True, mutable=["batch_stats"]), axis_name="batch"
    )
    features, new = jax.jit(halves, compiler_options=QUICK_COMPILE)(x.reshape(2, 4, 16, 16, 3))
    np.testing.assert_allclose(features.reshape(8, -1), expected, rtol=1e-4, atol=1e-5)
    for path, leaf in paths(new).items():
        np.testing.assert_allclose(leaf[1], paths(expected_new)[path], rtol=1e-4, atol=1e-5)
    jax.eval_shape(lambda: shared.apply(variables, x, False))  # evaluation needs no axis


def loss_and_gradients(module, variables, x):
    """Returns a weighted sum of the features, the new statistics, and the gradients of the sum."""

    def loss(params):
        features, new = module.apply(variables | {"params": params}, x, True, mutable="batch_stats")
        weights = jnp.cos(jnp.arange(features.size)).reshape(features.shape)
        return jnp.sum(weights * jnp.square(features)), new

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(tiny_wide_resnet, depth=16, stages=1),
        functools.partial(tiny_resnet, blocks=(2,)),
    ],
    ids=["wide_resnet", "resnet"],
)
def test_remat_wraps_every_block_and_keeps_the_trees(make):
    variables = abstract_variables(make(), 16)
    blocks = sum(name.startswith("stage") for name in variables["params"])
    trees = []
    for remat in (False, True):
        module = make(remat=remat)
        names = [e.primitive.name for e in forward_equations(module, 16, train=True)]
        assert sum(name.startswith("remat") for name in names) == remat * blocks
        gradients = functools.partial(loss_and_gradients, module)
        trees.append(jax.eval_shape(gradients, variables, images(2, 16)))
    assert trees[0] == trees[1]


# ---------------------------------------------------------------- initialization, gradients, dtypes


@pytest.mark.parametrize(
    "module",
    [tiny_wide_resnet(widen_factor=2, stages=2), tiny_resnet(blocks=(1,)), conv4(), linear()],
    ids=["wide_resnet", "resnet", "conv4", "linear"],
)
def test_a_gradient_reaches_every_parameter(module):
    variables = random_variables(module, 16)
    program = jax.jit(functools.partial(loss_and_gradients, module), compiler_options=QUICK_COMPILE)
    _, gradients = program(variables, images(4, 16))
    for path, gradient in paths(gradients).items():
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 1e-5, path


def test_initialization_is_he_normal_by_fan_out():
    module = wide_resnet(depth=10, widen_factor=8, stages=1)  # stem, 3x3, 1x1
    # "rbg" compiles in half the time; the test only looks at the distribution.
    variables = jax.jit(
        lambda: module.init(jax.random.key(0, impl="rbg"), images(1, 8), train=False),
        compiler_options=QUICK_COMPILE,
    )()
    for path, leaf in paths(variables).items():
        if path.endswith("kernel"):
            side, _, _, out = leaf.shape
            np.testing.assert_allclose(
                leaf.std(),
                math.sqrt(2 / (side * side * out)),
                rtol=5 / math.sqrt(2 * leaf.size),  # five standard errors
                err_msg=path,
            )
            if leaf.size > 30_000:  # a truncated normal has no such values
                assert np.abs(leaf).max() > 3.5 * leaf.std()
        else:
            assert (leaf == (1 if path.endswith(("scale", "var")) else 0)).all(), path


@pytest.mark.parametrize(
    "module",
    [
        tiny_wide_resnet(dtype="bfloat16"),
        tiny_resnet(layers=dataclasses.replace(LAYERS, dtype=jnp.dtype(jnp.bfloat16))),
        conv4(dtype="bfloat16"),
    ],
    ids=["wide_resnet", "resnet", "conv4"],
)
def test_bfloat16_is_the_dtype_of_the_computation_only(module):
    variables = abstract_variables(module, 16)
    eqns = forward_equations(module, 16, train=True)
    products = [e for e in eqns if e.primitive.name in ("conv_general_dilated", "dot_general")]
    assert len(products) >= 4
    for e in products:
        assert {v.aval.dtype for v in (*e.invars, *e.outvars)} == {jnp.dtype("bfloat16")}
    results = jax.eval_shape(
        lambda v: module.apply(v, images(2, 16), True, mutable=["batch_stats"]), variables
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, results))} == {jnp.dtype("float32")}


def test_bfloat16_agrees_with_float32():
    variables, x = random_variables(conv4(), 16), images(8, 16)
    exact, _ = apply(conv4(), variables, x)
    rounded, _ = apply(conv4(dtype="bfloat16"), variables, x)
    difference = np.abs(np.asarray(exact) - np.asarray(rounded)).max()
    assert 0 < difference < 0.05 * np.abs(exact).max()


# ---------------------------------------------------------------- errors of the user


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "wideresnet"}, "Did you mean 'wide_resnet'.*: .*resnet50, .*conv4, linear"),
        ({"name": "vgg"}, "unknown .*model.name 'vgg'. There are"),
        ({"name": "conv4", "dtype": "bfloat"}, "Did you mean 'bfloat16'"),
        ({"name": "wide_resnet", "depth": 27}, r"depth=27.*6·b \+ 4"),
    ],
)
def test_wrong_names_are_explained(fields, message):
    with pytest.raises(InputError, match=message):
        create_model(config(**fields))
