"""Runs that are interrupted, told to stop or damaged, and resumed."""

import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
from etils import epath
from runs_of_tests import (
    KilledError,
    assert_same,
    before_step,
    die,
    final_state,
    lines,
    run_main,
    tiny,
)

from layermatch_jax import evaluate, train
from layermatch_jax.errors import InputError, Stopped
from layermatch_jax.method import windows
from layermatch_jax.runtime import checkpoint, clock, hosts, metrics


# These have all kinds of state (of samples, classifier and batch statistics), and both backends.
@pytest.mark.parametrize(
    ("method", "centers", "backend"),
    [
        pytest.param("flexmatch+layerwise", "classifier", "device", marks=pytest.mark.slow),
        ("freematch", "outputs", "tf_data"),
        pytest.param("vat+layerwise", "classifier", "device", marks=pytest.mark.slow),
        pytest.param("vat+layerwise", "classifier", "tf_data", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_equals_an_uninterrupted_one(
    method, centers, backend, tmp_path, monkeypatch
):
    c = tiny(method, **{"avg_clustering.centers": centers, "input.backend": backend})
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
    assert any("centers" in path for path in expected)
    assert any("policy" in path for path in expected)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_run_that_died_before_its_first_checkpoint_gives_way(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))  # ~ works from Python, too
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
    # The checkpoint of step 4 counts the lines of steps 3 and 4.
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


# With several steps a call, the run stops between two calls.
@pytest.mark.parametrize(
    ("number", "K"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 3, marks=pytest.mark.slow),
    ],
)
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
        f"by {number.name} at step {step} of 18. A checkpoint is saved in {tmp_path / 'cut'}. "
        "Run the same command again to resume"
    )
    assert not (tmp_path / "cut" / "result.json").exists()

    train.train_and_evaluate(c, tmp_path / "cut")
    train.train_and_evaluate(c, tmp_path / "whole")
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("with_clock", [True, False])
def test_seconds_are_of_training_alone_and_none_is_lost(with_clock, tmp_path, monkeypatch):
    """By this clock each step takes a second; evaluations and checkpoints take 1,000."""
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
    # Waits, because the devices may be a step behind when step 10 is logged: then its second
    # would count later.
    join = windows.join
    monkeypatch.setattr(windows, "join", lambda *both: jax.block_until_ready(join(*both)))
    for step in range(1, 21):
        before_step(monkeypatch, step, taking(1, lambda: None))
    # An evaluation, a checkpoint and the stop lie inside log windows.
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
        # When the loop checks the devices, they may be done with the step or a step behind, which
        # is a second more or less by this clock.
        assert 4 - lost <= line["seconds"] <= 6
        if line["step"] == 15 and line["steps_per_second"] is None:
            continue  # step 14 compiles, and step 15 may not be timed yet
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
    # So that the version that wrote it can resume it.
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
        "from runs_of_tests import tiny as get_config\n"
    )
    done = run_main(tmp_path / "tiny_config.py", tmp_path / "cut", "--config.parallelism=jit")
    assert done.returncode == 0, done.stderr
    assert "step 4 of 8" in done.stderr
    assert "1 x cpu (jit)" in done.stderr
    expected, actual = final_state(tmp_path / "whole"), final_state(tmp_path / "cut")
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, rtol=0, atol=1e-4, err_msg=path)
