"""The feeds of both backends."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from image_builders import fake_run

from layermatch_jax import config as config_lib
from layermatch_jax import rules
from layermatch_jax.data import feed
from layermatch_jax.errors import InputError


def prepared(**fields):
    periods = {
        "train_steps": 24,
        "log_every": 8,
        "eval_every": 12,
        "checkpoint_every": 4,
        "input.backend": "device",
        "input.steps_per_call": 4,
    }
    config, _, partition, sampler = fake_run(config_lib.base(), **periods | fields)
    rules.validate(config)
    return config, partition, sampler


def of_step(chunk, k):
    """Selects one step of a chunk; the policy's draws are a tree."""
    return jax.tree.map(lambda x: x[:, k], chunk)


def test_calls_lie_between_multiples_of_k():
    config, partition, sampler = prepared()
    created = feed.create(config, partition, sampler, slice(None))
    chunks = list(created.chunks(range(6, 19)))
    assert [(step, chunk.labeled.shape[1]) for step, chunk in chunks] == [
        (8, 2), (12, 4), (16, 4), (19, 3),
    ]  # fmt: skip
    np.testing.assert_array_equal(chunks[1][1].value[:, 2], sampler.draw(10).value)
    assert jax.tree.map(np.shape, chunks[1][1]) == jax.tree.map(np.shape, created.example)


@pytest.mark.parametrize("backend", ["tf_data", "device"])
def test_a_host_gets_its_rows(backend):
    K = {"tf_data": 1, "device": 4}[backend]
    fields = {"input.backend": backend, "input.steps_per_call": K}
    config, partition, sampler = prepared(**fields)
    whole, own = (
        next(feed.create(config, partition, sampler, rows).chunks(range(1, 5)))
        for rows in (slice(None), slice(2, 3))
    )
    assert whole[0] == own[0] == {"tf_data": 2, "device": 4}[backend]  # from step 2 on
    for all_rows, mine in zip(whole[1], own[1], strict=True):
        np.testing.assert_array_equal(mine, all_rows[2:3])


@pytest.mark.parametrize("ops", [0, 2])
def test_both_backends_make_the_same_batches(ops):
    chunks = {}
    for backend, K in (("tf_data", 1), ("device", 4)):
        fields = {"input.backend": backend, "input.steps_per_call": K}
        config, partition, sampler = prepared(**fields, **{"augment.randaugment_ops": ops})
        created = feed.create(config, partition, sampler, slice(None))
        resident, batch = created.resident("jit"), jax.jit(created.batch)
        chunks[backend] = [
            batch(resident, of_step(chunk, k))
            for _, chunk in created.chunks(range(3, 8))
            for k in range(chunk[0].shape[1])
        ]
    assert len(chunks["tf_data"]) == len(chunks["device"]) == 5
    for expected, actual in zip(*chunks.values(), strict=True):
        for name in ("labels", "labeled_indices", "unlabeled_indices", "true_labels"):
            np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))
        difference = np.abs(np.int32(actual.images) - np.int32(expected.images))
        assert difference[:, :3].max() == 0  # weak views
        assert difference.max() <= 1


def test_what_stays_on_the_devices():
    config, partition, sampler = prepared()
    created = feed.create(config, partition, sampler, slice(None))
    resident = created.resident("jit")
    everything = partition.unlabeled.read(np.arange(400))
    np.testing.assert_array_equal(resident.unlabeled_images, everything)
    labeled = everything[partition.record["indices"]]
    np.testing.assert_array_equal(resident.labeled_images, labeled)
    truths = np.arange(400) % 10
    truths[partition.record["indices"]] = -1  # labeled images test no pseudo-label
    np.testing.assert_array_equal(resident.true_labels, truths)
    assert created.resident_bytes == (400 + 20) * 12 * 12 * 3


# Prints how much the process's memory rises while images are placed, in multiples of their size.
# The images are made at each read, as decoded files are.
MEMORY = """
import re
import numpy as np
from layermatch_jax import config as config_lib
from layermatch_jax import setup
from layermatch_jax.data import feed, images, splits

def of(count):
    read = lambda positions: np.ones((len(positions), 64, 64, 3), np.uint8)
    train = images.Images(np.arange(count) % 10, read)
    source = images.Source(tuple("abcdefghij"), train, None, train)
    config = config_lib.base()
    config.dataset.stored_size, config.input.backend = 64, "device"
    partition = splits.partition(source, config.dataset)
    sampler = setup.create_sampler(config, partition)
    return feed.create(config, partition, sampler, slice(8))

def peak():  # of this program; getrusage's peak includes the process that started it
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])

of(1000).resident("jit")
before, large = peak(), of(20_000)
kept = large.resident("jit")
print((peak() - before) / large.resident_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is read")
def test_one_copy_of_the_images_is_held_while_they_are_placed():
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], env=environment, check=True, capture_output=True, text=True
    )
    assert 0.8 < float(done.stdout) < 1.2


@pytest.mark.parametrize("backend", ["tf_data", "device"])
@pytest.mark.parametrize("method", ["fixmatch", "supervised"])
def test_one_step_reads_its_own_images_alone(backend, method):
    fields = {"input.backend": backend, "input.steps_per_call": 1}
    if method == "supervised":
        fields |= {"unsupervised_weight": 0.0, "method": method, "applied_method": method}
    config, partition, sampler = prepared(**fields)
    whole = feed.create(config, partition, sampler, slice(None))
    resident = whole.resident("jit")
    _, chunk = next(whole.chunks(range(7, 8)))
    expected = jax.jit(whole.batch)(resident, of_step(chunk, 0))

    asked = []

    def counted(part):
        return part._replace(read=lambda i: (asked.extend(i), part.read(i))[1])

    few = partition._replace(
        labeled=counted(partition.labeled), unlabeled=counted(partition.unlabeled)
    )
    made = feed.create(config, few, sampler, slice(None))
    asked.clear()  # the example's
    for actual, wanted in zip(made.one_step(7), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
    assert len(asked) == 4 + (
        8 if method == "fixmatch" else 0
    )  # 4 labeled and 2 unlabeled ones for each


def test_supervised_training_keeps_no_unlabeled_image():
    config, partition, sampler = prepared(
        unsupervised_weight=0.0, method="supervised", applied_method="supervised"
    )
    created = feed.create(config, partition, sampler, slice(None))
    resident = created.resident("jit")
    assert resident.unlabeled_images.shape == (0, 12, 12, 3)
    assert created.resident_bytes == 20 * 12 * 12 * 3
    _, chunk = next(created.chunks(range(4)))
    batch = jax.jit(created.batch)(resident, of_step(chunk, 0))
    assert batch.images.shape == (4, 1, 8, 8, 3)


def test_tf_data_without_tensorflow(monkeypatch):
    config, partition, sampler = prepared(**{"input.backend": "tf_data", "input.steps_per_call": 1})
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # not installed
    with pytest.raises(InputError, match="tf_data needs TensorFlow: pip install tensorflow"):
        feed.create(config, partition, sampler, slice(None))
