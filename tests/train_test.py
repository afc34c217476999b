"""Whole runs: shrunk versions of the shipped configs, several devices, and no wasted work."""

import gc
import json
import os
import pathlib
import re

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from runs_of_tests import lines, run_main, tiny

from layermatch_jax import setup, train
from layermatch_jax.data import feed
from layermatch_jax.runtime import metrics

DATA = os.environ.get("TFDS_DATA_DIR", "")


@pytest.fixture
def without_tensorflow(tmp_path):
    """A folder for PYTHONPATH that makes the import of TensorFlow fail and leave a trace."""
    folder = tmp_path / "blocked"
    folder.mkdir()
    code = f"open({str(folder / 'imported')!r}, 'w').close()\nraise ImportError('not here')\n"
    for name in ("tensorflow", "tensorflow_datasets"):
        (folder / f"{name}.py").write_text(code)
    return folder


SHRUNK = {
    "digits.py": ["--config.model.width=4"],
    "cifar10.py:labels=20": ["--config.model.depth=10", "--config.model.widen_factor=1"],
    "cifar100.py:labels=200,method=fixmatch": ["--config.model.name=conv4"],
    "stl10.py:labels=18": ["--config.model.name=conv4", "--config.model.width=4"],
}


@pytest.mark.parametrize(
    "shipped",
    [
        pytest.param(shipped, marks=[pytest.mark.slow] if k > 1 else [])
        for k, shipped in enumerate(SHRUNK)
    ],
)
def test_a_shipped_config_runs(shipped, tmp_path, without_tensorflow):
    name = shipped.partition(".")[0]
    if name != "digits" and not (pathlib.Path(DATA) / name).is_dir():
        pytest.skip(f"needs {name}: set TFDS_DATA_DIR to a folder in which tfds has prepared it")
    small = ["batch_size=4", "unlabeled_ratio=2", "train_steps=6", "log_every=2", "eval_every=3"]
    small += ["checkpoint_every=3", "eval_batch_size=64", "policy.threshold=0.01"]
    small += [f"compilation_cache={tmp_path / 'cache'}"]
    flags = [f"--config.{field}" for field in small] + SHRUNK[shipped]
    environment = {"PYTHONPATH": str(without_tensorflow)} if name == "digits" else {}
    done = run_main(f"configs/{shipped}", tmp_path, *flags, **environment)
    assert done.returncode == 0, done.stderr
    assert not (without_tensorflow / "imported").exists()
    assert "median2" in done.stdout
    assert "compiling the train step ..." in done.stderr
    assert re.search(r"a step takes \S+ s: the remaining [34] steps will take about", done.stderr)
    progress = [line for line in done.stderr.splitlines() if line.startswith("6/6  loss ")]
    assert len(progress) == 1

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["split"], line["step"]) for line in lines]
    assert steps == [("train", 2), ("test", 3), ("train", 4), ("train", 6), ("test", 6)]
    train_line = lines[0]
    assert {"loss", "loss_supervised", "loss_unsupervised", "learning_rate", "mask_rate"} <= set(
        train_line
    )
    assert {"gradient_norm", "parameter_norm", "images_per_second"} <= set(train_line)
    num_classes = {"cifar100": 100}.get(name, 10)
    assert len(train_line["class_acceptance"]) == len(train_line["class_threshold"]) == num_classes
    assert {"pseudo_label_accuracy", "pseudo_label_accuracy_all"} <= set(train_line)
    assert 0 < train_line["mask_rate"] <= 1
    result = json.loads((tmp_path / "result.json").read_text())
    split = json.loads((tmp_path / "labeled_split.json").read_text())
    assert result["split_sha256"] == split["sha256"]
    assert result["num_labels"] == len(split["indices"])
    tests = [line for line in lines if line["split"] == "test"]
    assert result["test_accuracy"]["ema"] == {
        "last": tests[-1]["accuracy_ema"],
        "median20": np.median([line["accuracy_ema"] for line in tests]),
        "best": max(line["accuracy_ema"] for line in tests),
    }
    assert f"test {tests[-1]['accuracy']:.1%} EMA {tests[-1]['accuracy_ema']:.1%}" in progress[0]
    assert list((tmp_path / "tensorboard").glob("events*"))
    kept = [path.stat().st_size for path in (tmp_path / "cache").iterdir()]
    assert max(kept) > 100_000, "the train step's program is kept"
    # Accuracies are shares of the whole test set, independent of the batches.
    images = split["num_evaluation"]
    for line in tests:
        assert abs(line["accuracy"] * images - round(line["accuracy"] * images)) < 1e-4


# ---------------------------------------------------------------------------------------- no waste


@pytest.mark.parametrize(
    ("backend", "parallelism", "K"), [("tf_data", "pmap", 1), ("device", "jit", 2)]
)
def test_between_log_lines_nothing_is_compiled_and_nothing_fetched(
    backend, parallelism, K, tmp_path, monkeypatch
):
    compiled, fetched, by_call = [], [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )
    for name in ("_value", "__array__"):  # every read of an array uses one of these
        original = getattr(ArrayImpl, name)
        look = original.fget if name == "_value" else original

        def told(self, *args, look=look, **kwargs):
            fetched.append(self.shape)
            return look(self, *args, **kwargs)

        monkeypatch.setattr(ArrayImpl, name, property(told) if name == "_value" else told)
    created = feed.create

    def create(*args):
        made = created(*args)

        def chunks(steps):
            for last, chunk in made.chunks(steps):
                by_call.append((last, len(compiled), len(fetched)))
                yield last, chunk

        return made._replace(chunks=chunks)

    monkeypatch.setattr(feed, "create", create)
    periods = {"log_every": 12, "eval_every": 12, "checkpoint_every": 12, "train_steps": 36}
    fields = {"model.name": "linear", "input.backend": backend, "input.steps_per_call": K}
    c = tiny("flexmatch+layerwise", parallelism=parallelism, **fields, **periods)
    train.train_and_evaluate(c, tmp_path)
    assert [last for last, *_ in by_call] == list(range(K, 37, K))
    compilations = {last: count for last, count, _ in by_call}
    assert compilations[K] > 0, "nothing was counted"
    assert compilations[2 * K] > compilations[K], "the first step is compiled when it is made"
    assert compilations[12] == compilations[3 * K]  # up to the first log line
    assert compilations[36] == compilations[12 + 2 * K]  # nothing new is compiled after that
    fetches = {last: count for last, _, count in by_call}
    assert fetches[12 + 2 * K] > fetches[12], "nothing was counted"
    assert fetches[24] == fetches[12 + 2 * K]
    assert fetches[12] == fetches[K]


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["pmap", "jit"])
def test_one_two_four_and_eight_devices_make_the_same_run(parallelism, tmp_path):
    (tmp_path / "tiny_config.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
        "import runs_of_tests\n"
        "def get_config():\n"
        "    return runs_of_tests.tiny('flexmatch+layerwise', train_steps=10, log_every=1)\n"
    )
    for devices in (1, 2, 4, 8):
        done = run_main(
            tmp_path / "tiny_config.py",
            tmp_path / str(devices),
            f"--config.parallelism={parallelism}",
            XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
        )
        assert done.returncode == 0, done.stderr
        assert f"on {devices} x cpu ({parallelism})" in done.stderr
    expected = lines(tmp_path / "1")
    assert sum(line["split"] == "train" for line in expected) == 10
    for devices in (2, 4, 8):
        for line, other in zip(expected, lines(tmp_path / str(devices)), strict=True):
            for name, value in line.items():
                np.testing.assert_allclose(
                    np.array(other[name], float) if name != "split" else 0,
                    np.array(value, float) if name != "split" else 0,
                    rtol=1e-4,
                    atol=1e-4,
                    err_msg=f"{devices} devices, step {line['step']}, {name}",
                )


@pytest.mark.slow
def test_memory_stays_flat(tmp_path, monkeypatch):
    """Over 2,000 steps with 100 evaluations and 100 checkpoints."""
    measured = {}  # by step: resident memory of the process, bytes of arrays on the devices
    evaluation = metrics.Log.evaluation

    def measure(self, step, *rest):
        gc.collect()
        resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        arrays = sum(array.nbytes for array in jax.live_arrays())
        measured[step] = (resident * os.sysconf("SC_PAGE_SIZE") / 1e6, arrays / 1e6)
        evaluation(self, step, *rest)

    monkeypatch.setattr(metrics.Log, "evaluation", measure)
    fields = {"train_steps": 2000, "eval_every": 20, "checkpoint_every": 20, "model.name": "linear"}
    train.train_and_evaluate(tiny("flexmatch+layerwise", **fields), tmp_path)
    print({step: values for step, values in measured.items() if step % 200 == 0})
    assert len(measured) == 100
    on_devices = [arrays for _, arrays in measured.values()]
    assert max(on_devices[1:]) - min(on_devices[1:]) < 1e-3, "more than the windows of the loop"
    assert max(on_devices[70:]) == max(on_devices[10:40]), "it grows"
    early = np.median([resident for step, (resident, _) in measured.items() if 500 < step <= 800])
    late = np.median([resident for step, (resident, _) in measured.items() if step > 1700])
    assert late - early < 10, f"{early:.0f} MB, then {late:.0f} MB"


@pytest.mark.parametrize("num_labels", [20, 400])
def test_a_run_that_cannot_test_its_pseudo_labels_says_so(num_labels):
    """All 400 training images are labeled, so no true label can test a pseudo-label."""
    c = tiny(**{"dataset.num_labels": num_labels})
    told = train.unmeasured(c, setup.load(c).partition)
    assert bool(told) == (num_labels == 400)
    if told:
        assert told == [
            "accuracy of pseudo-labels: not measured, because no unlabeled image has a known "
            "class (labeled images do not count)"
        ]
    c = tiny("supervised", **{"dataset.num_labels": num_labels})
    assert train.unmeasured(c, setup.load(c).partition) == []
