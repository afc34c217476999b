"""The loop, end to end: the shipped configs shrunk, and runs that are interrupted."""

import gc
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath
from jax._src.array import ArrayImpl

from layermatch_jax import automatic, config, evaluate, setup, train
from layermatch_jax.data import feed
from layermatch_jax.errors import InputError, Stopped
from layermatch_jax.runtime import checkpoint, clock, hosts, metrics

ROOT = pathlib.Path(__file__).parent.parent
DATA = os.environ.get("TFDS_DATA_DIR", "")


def run_main(config_arg, workdir, *flags, **environment):
    """`python -m layermatch_jax.main` in a process of its own, as a user starts it."""
    environment = os.environ | {
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    } | environment  # fmt: skip
    command = [sys.executable, "-m", "layermatch_jax.main"]
    command += [f"--config={config_arg}", f"--workdir={workdir}", *flags]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def without_tensorflow(tmp_path):
    """A folder for PYTHONPATH in which importing TensorFlow leaves a trace, and fails."""
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


@pytest.mark.parametrize("shipped", SHRUNK)
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
    # Accuracies are shares of the whole test set, whatever the batches it was cut into.
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
    for name in ("_value", "__array__"):  # all that looks at an array goes through one of them
        original = getattr(ArrayImpl, name)
        look = original.fget if name == "_value" else original

        def told(self, *args, look=look, **kwargs):
            fetched.append(self.shape)
            return look(self, *args, **kwargs)

        monkeypatch.setattr(ArrayImpl, name, property(told) if name == "_value" else told)
    created = feed.create

    def create(*args):
        made = created(*args)

        def calls(steps):
            for last, call in made.calls(steps):
                by_call.append((last, len(compiled), len(fetched)))
                yield last, call

        return made._replace(calls=calls)

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
    assert compilations[36] == compilations[12 + 2 * K]  # all after what came with it
    fetches = {last: count for last, _, count in by_call}
    assert fetches[12 + 2 * K] > fetches[12], "nothing was counted"
    assert fetches[24] == fetches[12 + 2 * K]
    assert fetches[12] == fetches[K]


# ------------------------------------------------------------------------------------ interruption


def tiny(method="layermatch", **fields):
    c = config.base()
    c.update_from_flattened_dict(
        {
            "dataset.name": "fake",
            "dataset.num_labels": 20,
            "dataset.stored_size": 8,
            "dataset.image_size": 8,
            "dataset.padding": 1,
            "model.name": "conv4",
            "model.width": 4,
            "batch_size": 8,
            "unlabeled_ratio": 2,
            "train_steps": 8,
            "policy.threshold": 0.15,
            "log_every": 3,  # does not divide checkpoint_every: a window is cut by the restart
            "eval_every": 4,
            "checkpoint_every": 4,
            "eval_batch_size": 64,
            "input.backend": "device",
            "tensorboard": False,
            # A long memory: averages differ from what they are of.
            "ema_decay": 0.999,
            "model.bn_decay": 0.999,
            "policy.momentum": 0.999,
        }
    )
    config.apply_method(c, method)
    c.update_from_flattened_dict(fields)
    return automatic.resolve(c)


class KilledError(Exception):
    pass


def before_step(monkeypatch, step, action):
    """The next runs do this when they ask for what a step (1-based) needs."""
    original = feed.create

    def create(*args):
        created = original(*args)

        def calls(steps):
            begun = steps.start
            for last, call in created.calls(steps):
                if begun < step <= last:
                    action()
                yield last, call
                begun = last

        return created._replace(calls=calls)

    monkeypatch.setattr(feed, "create", create)


def die():
    raise KilledError


def final_state(workdir):
    """The newest checkpoint as {path: array}, without what depends on the machine."""
    with checkpoint.open_manager(epath.Path(workdir), kept=2) as manager:
        tree = manager.restore(manager.latest_step())["run"]
    del tree["clock"]
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def lines(workdir):
    """metrics.jsonl without what depends on the machine."""
    return [
        {name: value for name, value in line.items() if name not in metrics.TIME_FIELDS}
        for line in metrics.read(epath.Path(workdir))
    ]


# State of all kinds (by sample, of the classifier, of batches' statistics), and both backends.
@pytest.mark.parametrize(
    ("method", "centres", "backend"),
    [
        ("flexmatch+layerwise", "classifier", "device"),
        ("freematch", "outputs", "tf_data"),
    ],
)
def test_an_interrupted_run_equals_an_uninterrupted_one(
    method, centres, backend, tmp_path, monkeypatch
):
    c = tiny(method, **{"avg_clustering.centres": centres, "input.backend": backend})
    whole = train.train_and_evaluate(c, tmp_path / "whole")
    with monkeypatch.context() as patch:
        before_step(patch, 8, die)
        with pytest.raises(KilledError):
            train.train_and_evaluate(c, tmp_path / "cut")
    assert [line["step"] for line in lines(tmp_path / "cut")] == [3, 4, 6]
    resumed = train.train_and_evaluate(c, tmp_path / "cut")

    assert resumed["test_accuracy"] == whole["test_accuracy"]
    assert [(line["step"], line["split"]) for line in lines(tmp_path / "cut")] == [
        (3, "train"),
        (4, "test"),
        (6, "train"),
        (8, "train"),
        (8, "test"),
    ]
    expected = final_state(tmp_path / "whole")
    assert any("ema_params" in path for path in expected)
    assert any("centres" in path for path in expected)
    assert any("policy" in path for path in expected)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def assert_same(whole, other):
    """Parameters and all other state bit for bit, metrics.jsonl but for the times."""
    assert lines(other) == lines(whole)
    expected, actual = final_state(whole), final_state(other)
    assert expected.keys() == actual.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)


def test_a_run_that_died_before_its_first_checkpoint_gives_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))  # of a Python caller, ~ is a folder, too
    c = tiny("supervised", **{"model.name": "linear"})
    with monkeypatch.context() as patch:
        before_step(patch, 4, die)
        with pytest.raises(KilledError):
            train.train_and_evaluate(c, "~/cut")
    before = (tmp_path / "cut" / "metrics.jsonl").read_bytes()
    c.optimizer.learning_rate = 0.01
    train.train_and_evaluate(c, "~/cut")
    assert f"its files are now in {tmp_path}/cut/before-1" in capsys.readouterr().err
    assert (tmp_path / "cut" / "before-1" / "metrics.jsonl").read_bytes() == before
    old = json.loads((tmp_path / "cut" / "before-1" / "config.json").read_text())
    assert old["optimizer.learning_rate"] == 0.03
    steps = [(line["step"], line["split"]) for line in lines(tmp_path / "cut")]
    assert steps == [(3, "train"), (4, "test"), (6, "train"), (8, "train"), (8, "test")]


def test_missing_lines_and_a_damaged_result_are_told_and_mended(tmp_path, monkeypatch):
    c = tiny("supervised", **{"model.name": "linear"})
    with monkeypatch.context() as patch:
        before_step(patch, 8, die)
        with pytest.raises(KilledError):
            train.train_and_evaluate(c, tmp_path)
    # The checkpoint of step 4 knows of the lines of steps 3 and 4.
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[1:2]))
    config_before = (tmp_path / "config.json").read_bytes()
    c.checkpoint_every = 2
    with pytest.raises(InputError, match=r"metrics\.jsonl holds 1 of the 2 lines"):
        train.train_and_evaluate(c, tmp_path)
    assert path.read_text() == whole[1]
    assert (tmp_path / "config.json").read_bytes() == config_before
    path.write_text("".join(whole[:2]))
    result = train.train_and_evaluate(c, tmp_path)
    assert [(x["step"], x["split"]) for x in lines(tmp_path)] == [
        (3, "train"), (4, "test"), (6, "train"), (8, "train"), (8, "test"),
    ]  # fmt: skip

    (tmp_path / "result.json").write_text("")
    with pytest.raises(InputError, match=r"result\.json is damaged: .*Delete it"):
        train.train_and_evaluate(c, tmp_path)
    (tmp_path / "result.json").unlink()
    assert train.train_and_evaluate(c, tmp_path) == result


# Several steps a call: it stops between two calls.
@pytest.mark.parametrize(("number", "K"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (15, 3)])
def test_a_run_that_is_told_to_stop_saves_and_goes_on(number, K, tmp_path, monkeypatch):
    periods = {"log_every": 6, "eval_every": 6, "checkpoint_every": 18, "train_steps": 18}
    fields = {"model.name": "linear", "input.steps_per_call": K}
    c = tiny("flexmatch+layerwise", **fields, **periods)
    number = signal.Signals(number)
    with monkeypatch.context() as patch:
        before_step(patch, 5, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Stopped) as caught, hosts.signals() as told:
            train.train_and_evaluate(c, tmp_path / "cut", told)
    (step,) = final_state(tmp_path / "cut")["['state']['step']"].reshape(1)
    assert 5 <= step <= 5 + 5
    assert step % K == 0
    assert str(caught.value) == (
        f"by {number.name} at step {step} of 18, and saved in {tmp_path / 'cut'}: the same command "
        "goes on"
    )
    assert not (tmp_path / "cut" / "result.json").exists()

    train.train_and_evaluate(c, tmp_path / "cut")
    train.train_and_evaluate(c, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("with_clock", [True, False])
def test_seconds_are_of_training_alone_and_none_is_lost(with_clock, tmp_path, monkeypatch):
    """Each step takes a second by this clock; evaluations and checkpoints take 1,000."""
    now = [0.0]
    for module in (clock, train):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def taking(seconds, function):
        def slow(*args):
            now[0] += seconds
            return function(*args)

        return slow

    monkeypatch.setattr(evaluate, "evaluate", taking(1000, evaluate.evaluate))
    save = taking(1000, checkpoint.save)
    for step in range(1, 21):
        before_step(monkeypatch, step, taking(1, lambda: None))
    # An evaluation lies within a log window, a checkpoint too, and the stop.
    periods = {"log_every": 5, "eval_every": 8, "checkpoint_every": 9, "train_steps": 20}
    c = tiny("supervised", **{"model.name": "linear"}, **periods)

    def save_before_there_was_a_clock(manager, step, tree):
        save(manager, step, {name: part for name, part in tree.items() if name != "clock"})

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save if with_clock else save_before_there_was_a_clock)
        before_step(patch, 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="at step 13 of 20"), hosts.signals() as told:
            train.train_and_evaluate(c, tmp_path, told)
    monkeypatch.setattr(checkpoint, "save", save)
    result = train.train_and_evaluate(c, tmp_path)

    logged = metrics.read(epath.Path(tmp_path))
    assert [(line["step"], line["seconds"]) for line in logged if line["split"] == "test"] == [
        (8, 1000), (16, 1000), (20, 1000),
    ]  # fmt: skip
    trained = [line for line in logged if line["split"] == "train"]
    assert [line["step"] for line in trained] == [5, 10, 15, 20]
    lost = 0 if with_clock else 3  # steps 11 to 13
    assert sum(line["seconds"] for line in trained) == 20 - lost
    assert result["wall_seconds"] == 3020 - lost
    for line in trained:
        # When the loop looks at the devices, they may be done with the step or be a step behind:
        # by this clock, a second more or less.
        assert 4 - lost <= line["seconds"] <= 6
        assert 1 / 2 <= line["steps_per_second"] <= 2
        assert line["images_per_second"] == c.batch_size * line["steps_per_second"]


def test_another_number_of_steps_a_call_goes_on_between_its_multiples(tmp_path, monkeypatch):
    periods = {"log_every": 4, "eval_every": 8, "checkpoint_every": 8, "train_steps": 8}
    c = tiny("layermatch", **{"model.name": "linear"}, **periods)
    c.input.steps_per_call = 1
    with monkeypatch.context() as patch:
        before_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="at step 3 of 8"), hosts.signals() as told:
            train.train_and_evaluate(c, tmp_path / "cut", told)
    c.input.steps_per_call = 4
    train.train_and_evaluate(c, tmp_path / "cut")
    train.train_and_evaluate(c, tmp_path / "whole")
    assert [(x["step"], x["split"]) for x in lines(tmp_path / "cut")] == [
        (4, "train"),
        (8, "train"),
        (8, "test"),
    ]
    expected, actual = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, atol=1e-5, err_msg=path)


def test_a_signal_in_the_last_step_comes_too_late(tmp_path, monkeypatch):
    c = tiny("supervised", **{"model.name": "linear", "train_steps": 2})
    save = checkpoint.save

    def told_to_stop(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*args)

    monkeypatch.setattr(checkpoint, "save", told_to_stop)
    with hosts.signals() as told:
        assert train.train_and_evaluate(c, tmp_path, told)["train_steps"] == 2


def test_a_run_of_another_version_is_refused_and_left_as_it_was(tmp_path):
    c = tiny("supervised", **{"model.name": "linear", "train_steps": 2})
    train.train_and_evaluate(c, tmp_path)
    (tmp_path / "result.json").unlink()
    older = json.loads((tmp_path / "config.json").read_text())
    del older["avg_clustering.warm_up"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    shutil.rmtree(tmp_path / "checkpoints")
    with checkpoint.open_manager(epath.Path(tmp_path), kept=2) as manager:
        checkpoint.save(manager, 2, {"state": {"params": np.ones(3, np.float32)}})
    with pytest.raises(InputError, match=r"run/state/params: float32\[3\] in the checkpoint, none"):
        train.train_and_evaluate(c, tmp_path)
    # So that the version that wrote it can go on.
    assert json.loads((tmp_path / "config.json").read_text()) == older
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_checkpoint_of_eight_devices_goes_on_on_one(tmp_path, monkeypatch):
    assert jax.device_count() == 8
    c = tiny()
    train.train_and_evaluate(c, tmp_path / "whole")
    with monkeypatch.context() as patch:
        before_step(patch, 6, die)
        with pytest.raises(KilledError):
            train.train_and_evaluate(c, tmp_path / "cut")

    (tmp_path / "tiny_config.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
        "from train_test import tiny as get_config\n"
    )
    done = run_main(tmp_path / "tiny_config.py", tmp_path / "cut", "--config.parallelism=jit")
    assert done.returncode == 0, done.stderr
    assert "step 4 of 8" in done.stderr
    assert "1 x cpu (jit)" in done.stderr
    expected, actual = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, rtol=0, atol=1e-4, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("parallelism", ["pmap", "jit"])
def test_one_two_four_and_eight_devices_make_the_same_run(parallelism, tmp_path):
    (tmp_path / "tiny_config.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
        "import train_test\n"
        "def get_config():\n"
        "    return train_test.tiny('flexmatch+layerwise', train_steps=10, log_every=1)\n"
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
    assert max(on_devices[1:]) - min(on_devices[1:]) < 1e-3, "more than a log window"
    early = np.median([resident for step, (resident, _) in measured.items() if 500 < step <= 800])
    late = np.median([resident for step, (resident, _) in measured.items() if step > 1700])
    assert late - early < 10, f"{early:.0f} MB, then {late:.0f} MB"


@pytest.mark.parametrize("num_labels", [20, 400])
def test_a_run_that_cannot_test_its_pseudo_labels_says_so(num_labels):
    """All 400 training images are labelled, so the truth of none tests a pseudo-label."""
    c = tiny(**{"dataset.num_labels": num_labels})
    told = train.unmeasured(c, setup.load(c).partition)
    assert bool(told) == (num_labels == 400)
    if told:
        assert told == [
            "accuracy of pseudo-labels: not measured, because no unlabelled image has a known "
            "class (labelled images do not count)"
        ]
    c = tiny("supervised", **{"dataset.num_labels": num_labels})
    assert train.unmeasured(c, setup.load(c).partition) == []
