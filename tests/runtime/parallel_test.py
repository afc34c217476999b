"""One device, eight devices with pmap and eight with jit make the same run."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layermatch_jax import automatic, presets
from layermatch_jax import config as config_lib
from layermatch_jax.batches import EvalBatch, TrainBatch
from layermatch_jax.errors import InputError
from layermatch_jax.method import assembly, reductions, state, steps
from layermatch_jax.runtime import parallel

CLASSES, UNLABELED, B, MU = 3, 20, 8, 2
# Policies that accept (nearly) every row at first; Mean Teacher always does.
ADAPTIVE = ("dash", "flexmatch", "freematch", "mean_teacher", "softmatch")


def configuration(**fields):
    config = presets.apply_method(config_lib.base(), "layermatch")
    config.update_from_flattened_dict(
        {
            "batch_size": B,
            "unlabeled_ratio": MU,
            "dataset.image_size": 8,
            "policy.threshold": 0.7,
            "model.name": "linear",
            "model.width": 6,
        }
        | fields
    )
    return automatic.resolve(config)


LABELS = np.arange(B, dtype=np.int32) % CLASSES


def make_batch(step=0, side=8):
    rng = np.random.RandomState(step)
    return TrainBatch(
        images=rng.randint(0, 256, (B, 1 + 2 * MU, side, side, 3)).astype(np.uint8),
        labels=(np.arange(B) % CLASSES).astype(np.int32),
        labeled_indices=np.arange(B, dtype=np.int32),
        unlabeled_indices=rng.randint(0, UNLABELED, (B, MU)).astype(np.int32),
        true_labels=rng.randint(-1, CLASSES, (B, MU)).astype(np.int32),
    )


def start(config, axis_name):
    """Makes a method and a state whose classifier is confident on some rows and not on others."""
    initial = state.create(config, CLASSES, UNLABELED, LABELS, axis_name)
    kernel = initial.params["classifier"]["kernel"]
    scaled = {"kernel": kernel * 1.5, "bias": jnp.array([0.1, -0.1, 0.0])}
    params = initial.params | {"classifier": scaled}
    method = assembly.create_method(config, params, ((0.5,) * 3, (0.3,) * 3), axis_name)
    policy_state = initial.policy
    if config.policy.name == "flexmatch":  # as if most samples had been selected before
        classes = jnp.array([-1, 0, 0, 0, 1, 1, 1, 2, 2, 2] * 2, jnp.int32)
        policy_state = {"classes": classes, "counts": jnp.array([6, 6, 6, 2], jnp.int32)}
    return method, initial.replace(
        params=params,
        ema_params=jax.tree.map(lambda p: 0.5 * p, params),
        centers=method.centers.init(params["classifier"], UNLABELED),
        policy=policy_state,
    )


def run(config, devices, num_steps=3):
    """Returns state and metrics after some steps on 'one' device, or eight with 'pmap' or 'jit'."""
    method, current = start(config, "batch" if devices == "pmap" else None)
    step = functools.partial(steps.train_step, method=method)
    if devices == "one":
        compiled, place = jax.jit(step), lambda batch: batch
    else:
        compiled = parallel.compile_step(step, devices)
        place = functools.partial(parallel.place_batch, parallelism=devices)
        current = parallel.replicate(current, devices)
    for k in range(num_steps):
        current, metrics = compiled(current, place(make_batch(k, config.dataset.image_size)))
        used, count = np.asarray(metrics["mask_rate"])
        if config.policy.name not in ADAPTIVE or (
            config.policy.name != "mean_teacher" and k == num_steps - 1
        ):
            assert 0.2 <= used / count <= 0.8, "an uninformative batch: all or no rows pass"
    return jax.device_get((current, metrics))


def assert_equal_within(actual, expected, tolerance):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


# These policies use different parts of the global batch: statistics, state for each sample, both
# kinds of views, the labeled rows, a second network.
@pytest.mark.parametrize(
    ("policy", "centers"),
    [
        ("fixed_threshold", "features"),
        ("fixed_threshold", "outputs"),
        ("fixed_threshold", "none"),
        ("flexmatch", "outputs"),
        ("freematch", "features"),
        ("softmatch", "none"),
        ("adamatch", "none"),
        ("uda", "none"),
        ("dash", "none"),
        ("mean_teacher", "classifier"),
    ],
)
def test_one_device_equals_eight(policy, centers):
    config = configuration(
        **{
            "policy.name": policy,
            "avg_clustering.centers": centers,
            "policy.momentum": 0.1,
            "policy.relative_threshold": 1.0,
            "policy.fairness_weight": 0.5,
            "policy.signal_annealing": "linear",
            "policy.warm_up": 0.0,
            "policy.period": 0.0,
            "policy.ramp": 0.0,
        }
    )
    num_steps = 10 if policy == "dash" else 3  # Dash accepts every row until its bound falls
    expected = run(config, "one", num_steps)
    for devices in ("pmap", "jit"):
        assert_equal_within(run(config, devices, num_steps), expected, 1e-5)
    before = start(config, None)[1].policy
    if before:
        moved = jax.tree.map(lambda a, b: np.any(a != b), before, expected[0].policy)
        assert all(jax.tree.leaves(moved)), "a state that stays as it is proves nothing"


def test_one_device_equals_eight_with_batch_norm():
    config = configuration(
        **{
            "model.name": "wide_resnet",
            "model.depth": 10,
            "model.widen_factor": 1,
            "policy.threshold": 0.5,
            # With fewer pixels, a value that rounding moves across LeakyReLU's kink would show.
            "dataset.image_size": 16,
        }
    )
    expected, expected_metrics = run(config, "one")
    for devices in ("pmap", "jit"):
        actual, metrics = run(config, devices)
        assert_equal_within(actual, expected, 1e-5)
        assert_equal_within(metrics, expected_metrics, 1e-4)
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), expected.params, start(config, None)[1].params
    )
    assert min(jax.tree.leaves(moved)) > 1e-4, "a parameter that hardly moved proves nothing"


@pytest.mark.parametrize("devices", ["pmap", "jit"])
@pytest.mark.parametrize(
    ("policy", "centers"),
    [("flexmatch", "classifier"), ("freematch", "features"), ("fixed_threshold", "outputs")],
)
def test_images_and_state_stay_where_they_are(devices, policy, centers):
    config = configuration(**{"policy.name": policy, "avg_clustering.centers": centers})
    method, current = start(config, parallel.axis_name(devices))
    compiled = parallel.compile_step(functools.partial(steps.train_step, method=method), devices)
    placed = parallel.place_batch(make_batch(), devices)
    program = compiled.lower(parallel.replicate(current, devices), placed).compile().as_text()
    assert "all-reduce" in program, "not the program of several devices"
    found = re.findall(r"all-to-all|collective-permute", program)
    assert not found
    gathered = re.findall(r"= (?:\()?u8\[[^=]*all-gather", program)
    assert not gathered, "images are gathered"
    assert not re.findall(r"callback|infeed|outfeed", program), "a round trip to the host"


# Each of conv4's four layers sums BatchNorm's statistics once forward and once backward; gradients
# and losses are one sum. The true labels and the logits of the weak and of the strong view are
# gathered; the latter once more if the features get the loss through averaged centers. With state
# for each sample, the samples' positions are gathered, too.
@pytest.mark.parametrize(
    ("devices", "policy", "centers", "sums", "gathers"),
    [
        ("pmap", "fixed_threshold", "classifier", 2 * 4 + 1, 4),
        ("pmap", "flexmatch", "outputs", 2 * 4 + 1, 4),
        ("jit", "fixed_threshold", "classifier", 2 * 4 + 1, 0),
        ("jit", "flexmatch", "outputs", 2 * 4 + 3, 11),
    ],
)
def test_collectives_of_a_step(devices, policy, centers, sums, gathers):
    fields = {"policy.name": policy, "avg_clustering.centers": centers, "model.name": "conv4"}
    config = configuration(**fields)
    method, current = start(config, parallel.axis_name(devices))
    compiled = parallel.compile_step(functools.partial(steps.train_step, method=method), devices)
    placed = parallel.place_batch(make_batch(), devices)
    program = compiled.lower(parallel.replicate(current, devices), placed).compile().as_text()
    found = re.findall(r" (all-reduce|all-gather|reduce-scatter)(?:-start)?\(", program)
    assert (found.count("all-reduce"), found.count("all-gather")) == (sums, gathers)
    assert "reduce-scatter" not in found


@pytest.mark.parametrize("devices", ["pmap", "jit"])
def test_evaluation_counts_every_image_once(devices):
    config = configuration(**{"model.width": 4})
    method, current = start(config, parallel.axis_name(devices))
    rng = np.random.RandomState(0)
    batch = EvalBatch(
        images=rng.randint(0, 256, (16, 8, 8, 3)).astype(np.uint8),
        labels=rng.randint(0, CLASSES, 16).astype(np.int32),
        mask=(np.arange(16) < 11).astype(np.float32),
    )
    params = jax.device_get(current.params)
    pixels = (batch.images.reshape(16, -1) / 255 - 0.5) / 0.3
    logits = (
        pixels @ params["backbone"]["stem"]["kernel"] @ params["classifier"]["kernel"]
        + params["classifier"]["bias"]
    )
    correct = (logits.argmax(-1) == batch.labels)[:11].sum()
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -log_probabilities[np.arange(16), batch.labels][:11].sum()

    compiled = parallel.compile_step(
        functools.partial(steps.eval_step, method=method), devices, donate_state=False
    )
    placed = parallel.place_batch(batch, devices)
    metrics = compiled(parallel.replicate(current, devices), placed)
    np.testing.assert_array_equal(metrics["accuracy"], [correct, 11])
    np.testing.assert_allclose(metrics["loss"], [loss, 11], rtol=1e-5)


def test_rows_are_gathered_in_order_and_cut_again():
    rows = np.arange(32).reshape(16, 2)

    def step(state, x, *, axis_name):
        everything = reductions.gather_rows(x, axis_name)
        own = reductions.local_rows(everything, axis_name)
        sums = reductions.total((jnp.sum(jnp.abs(own - x)), jnp.sum(x)), axis_name)
        return everything, *sums, reductions.num_shards(axis_name)

    compiled = parallel.compile_step(step, "pmap", donate_state=False)
    everything, difference, total, shards = compiled(
        jnp.zeros(()), parallel.place_batch(rows, "pmap")
    )
    np.testing.assert_array_equal(everything, rows)
    assert (difference, total, shards) == (0, 31 * 32 / 2, 8)


def test_replicated_state_is_a_copy():
    value = jnp.arange(3.0)
    step = parallel.compile_step(lambda state, batch, *, axis_name: (state + 1, batch), "jit")
    step(parallel.replicate(value, "jit"), parallel.place_batch(np.zeros(8), "jit"))
    np.testing.assert_array_equal(value, [0, 1, 2])  # if it were donated, it would be deleted


@pytest.mark.parametrize("devices", ["pmap", "jit"])
def test_an_array_is_put_on_every_device_part_by_part(devices):
    whole = np.random.RandomState(0).randint(0, 256, (10, 3, 2)).astype(np.uint8)
    filled = parallel.fill(whole.shape, (whole[i : i + 4] for i in (0, 4, 8)), devices)
    assert filled.sharding == parallel.replicated(devices)
    assert filled.dtype == np.uint8
    assert len(filled.addressable_shards) == 8
    for shard in filled.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole)
    assert parallel.fill((0, 3, 2), iter(()), devices).shape == (0, 3, 2)


@pytest.mark.parametrize(
    ("memory", "count", "size", "told"),
    [
        ({"bytes_limit": 10e9, "bytes_in_use": 4e9}, 2, 6e9, None),
        ({"bytes_limit": 10e9, "bytes_in_use": 4e9}, 2, 6.1e9, "6.1 GB, and GPU:0 has 6.0 GB free"),
        (None, 1, 5e9, None),  # a CPU device uses the memory of the host
        (None, 1, 5.1e9, "5.1 GB, and this machine has 5.0 GB free"),
        (None, 2, 2.6e9, "5.2 GB, 2 copies, and this machine has 5.0 GB free"),
    ],
)
def test_what_a_device_has_no_memory_for_is_refused(memory, count, size, told, monkeypatch):
    class Device:
        def memory_stats(self):
            return memory

        def __str__(self):
            return "GPU:0"

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()] * count)
    monkeypatch.setattr(parallel, "_free_memory_of_host", lambda: 5e9)
    if told is None:
        parallel.check_room(size)
        return
    with pytest.raises(InputError) as caught:
        parallel.check_room(size)
    assert f"on each device: {told}" in str(caught.value)
    assert "--config.input.backend=tf_data" in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="known on Linux alone")
def test_free_memory_of_the_host():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    # Available memory is at least half of the unused memory, and less than the total.
    assert free / 2 < parallel._free_memory_of_host() < total


# ---------------------------------------------------------------- convolutions on all cores

# Prints whether YNNPACK computes XLA's convolution, and the greatest relative error of its outputs
# and gradients against a product of patches.
CONVOLUTION = """
import jax, jax.numpy as jnp, numpy as np
from layermatch_jax.runtime import parallel
from layermatch_jax.models.small import matrix_convolution

parallel.use_all_cores()

def xla(x, kernel, *window):
    return jax.lax.conv_general_dilated(
        x, kernel, *window, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

rng, ynnpack, worst = np.random.default_rng(0), False, 0.0
for side, stride, size in ((7, 1, 3), (8, 2, 3), (7, 2, 1)):
    x = rng.normal(size=(4, side, side, 18)).astype(np.float32)
    kernel = rng.normal(size=(size, size, 18, 20)).astype(np.float32)
    window = ((stride, stride), ((size // 2, size // 2),) * 2)
    results = []
    for convolution in (xla, matrix_convolution):
        def all_of_it(x, kernel):
            y, pull_back = jax.vjp(lambda x, k: convolution(x, k, *window), x, kernel)
            return y, *pull_back(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))
        program = jax.jit(all_of_it).lower(x, kernel).compile()
        ynnpack |= convolution is xla and "ynn_fusion" in program.as_text()
        results.append(program(x, kernel))
    for ours, expected in zip(*results):
        worst = max(worst, float(jnp.abs(ours - expected).max() / jnp.abs(expected).max()))
print(ynnpack, worst)
"""


def test_convolutions_are_kept_from_the_library_of_one_thread():
    environment = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", CONVOLUTION],
        env=os.environ | environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    ynnpack, error = done.stdout.split()
    assert ynnpack == "False"  # True without use_all_cores
    assert float(error) < 1e-5


def test_what_the_user_says_of_the_library_stays(monkeypatch):
    ours = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
    for version, before, after in (
        ((0, 10, 2), "", ours),
        ((0, 12, 0), "--xla_dump_to=a", f"--xla_dump_to=a {ours}"),
        ((0, 12, 0), ours, ours),
        ((0, 10, 2), "--xla_cpu_experimental_ynn_fusion_type=-reduce", None),
        ((0, 13, 0), "", None),  # may not know the flag
    ):
        monkeypatch.setattr(jax, "__version_info__", version)
        monkeypatch.setenv("XLA_FLAGS", before)
        parallel.use_all_cores()
        assert os.environ["XLA_FLAGS"] == (before if after is None else after)
