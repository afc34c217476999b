"""Several processes make the same run as one, start and stop together; one can resume their run."""

import itertools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import hosts_worker
import jax
import numpy as np
import parallel_test
import pytest
from runs_of_tests import final_state, lines

from layermatch_jax import config as config_lib
from layermatch_jax import setup, train
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import hosts

TESTS = pathlib.Path(__file__).parent


def free_port():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


def launch(count, folder, model):
    """Runs hosts_worker.py in `count` processes; returns their exit statuses and outputs."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": f"{TESTS.parent.parent}{os.pathsep}{TESTS.parent}",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    port = free_port()
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                TESTS / "hosts_worker.py",
                *map(str, (port, count, k, folder, model)),
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for k in range(count)
    ]
    try:
        said = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [worker.returncode for worker in workers], said


# One test for each number of processes: they take a while to start.
@pytest.mark.parametrize(
    ("count", "model"),
    [
        (2, "linear"),
        pytest.param(2, "conv4", marks=pytest.mark.slow),
        pytest.param(4, "conv4", marks=pytest.mark.slow),
    ],
)
def test_several_processes_make_the_run_of_one(count, model, tmp_path):
    statuses, said = launch(count, tmp_path, model)
    assert statuses == [0] * count, "\n\n".join(said)
    arrays = [dict(np.load(tmp_path / f"{k}.npz")) for k in range(count)]
    for name in hosts_worker.COMBINATIONS:
        check_steps(arrays, name)
    check_evaluation(arrays)
    check_that_none_began_where_one_could_not(arrays)
    check_that_all_stopped_at_one_step(arrays, said, tmp_path)
    check_the_run_that_went_on(count, model, tmp_path)


@pytest.mark.slow
def test_one_that_fails_leaves_nobody_waiting(tmp_path):
    statuses, (first, _) = launch(2, tmp_path, "fails")
    assert "StorageError: no room" in first
    assert 0 not in statuses
    failed = float(first.split("failed ")[1].split()[0])
    assert time.time() - failed < 30


def check_steps(arrays, combination):
    """State and metrics after some steps are those of one device, in all processes."""
    config = hosts_worker.combination(combination)
    expected, expected_metrics = parallel_test.run(config, "one", hosts_worker.STEPS)
    expected = hosts_worker.flat({"state": expected, "metrics": expected_metrics})
    assert any("policy" in name for name in expected) == (combination == "flexmatch")
    for own, parallelism in itertools.product(arrays, ("pmap", "jit")):
        for name, value in expected.items():
            actual = own[f"{parallelism} {combination} {name}"]
            np.testing.assert_allclose(actual, value, rtol=0, atol=1e-5, err_msg=name)


def check_evaluation(arrays):
    """Every image counts once, and the scores are those of one process."""
    seen = np.concatenate([own["seen"] for own in arrays])
    assert sorted(seen) == list(range(hosts_worker.EVALUATION))
    assert min(len(own["seen"]) for own in arrays) > 0
    expected = hosts_worker.evaluate_all("jit")
    for own in arrays:
        for parallelism in ("pmap", "jit"):
            for name, value in expected.items():
                actual = own[f"{parallelism} scores {name}"]
                np.testing.assert_allclose(actual, value, rtol=0, atol=1e-6, err_msg=name)


def check_that_none_began_where_one_could_not(arrays):
    *others, last = [str(own["refused"]) for own in arrays]
    assert last == "no data here"
    count = len(arrays)
    assert set(others) == {
        f"process {count - 1} of {count} failed to start; its own output says why"
    }


def check_that_all_stopped_at_one_step(arrays, said, folder):
    stopped = [str(own["stopped"]) for own in arrays]
    step = int(stopped[0].split(" at step ")[1].split()[0])
    assert hosts_worker.STOP_AT <= step <= hosts_worker.STOP_AT + 5
    assert stopped[-1].startswith(
        f"by SIGTERM at step {step} of 12. A checkpoint is saved in {folder}"
    )
    assert set(stopped[:-1]) == {stopped[-1].replace("SIGTERM", "another process")}
    for number, text in enumerate(said):
        assert ("processes (pmap)" in text) == (number == 0), "one tells, the others are silent"
    if len(arrays) == 2:  # the processes resumed the run themselves
        assert [bool(own["finished"]) for own in arrays] == [True, False]
        assert f"step {step} of 12" in said[0]


def check_the_run_that_went_on(count, model, folder):
    """The resumed run equals a run of one process that was never stopped."""
    config = hosts_worker.run_config(model)
    train.train_and_evaluate(config, folder / "whole")
    if count == 4:  # one process resumes the run of four
        config.parallelism = "jit"
        train.train_and_evaluate(config, folder / "run")
    expected, actual = final_state(folder / "whole"), final_state(folder / "run")
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, rtol=0, atol=1e-4, err_msg=path)
    whole, run = (
        [(line["step"], line["split"]) for line in lines(folder / name)]
        for name in ("whole", "run")
    )
    assert run == whole


# --------------------------------------------------------------------------------- one process


def test_who_connects_to_whom(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    hosts.connect()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    hosts.connect()
    assert not calls, "a run of one process needs no network"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    hosts.connect()
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "libtpu")
    hosts.connect()
    hosts.connect("10.0.0.1:8476", 4, 3)
    assert calls == [
        ((), {"cluster_detection_method": "slurm", "shutdown_timeout_seconds": 10}),
        ((), {"shutdown_timeout_seconds": 10}),
        (("10.0.0.1:8476", 4, 3), {"shutdown_timeout_seconds": 10}),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1234", None, None), "all of --coordinator=HOST:PORT, --num_processes=N"),
        ((None, 2, 0), "all of --coordinator=HOST:PORT"),
        (("localhost", 2, 0), "--coordinator=localhost: write HOST:PORT"),
        (("localhost:1234", 2, 2), "--process_id=2 must be between 0 and --num_processes − 1 = 1"),
        (("localhost:1234", 2, -1), "--process_id=-1 must be between 0"),
    ],
)
def test_mistaken_flags(given, message):
    with pytest.raises(InputError) as caught:
        hosts.connect(*given)
    assert message in str(caught.value)


def test_of_one_process():
    assert hosts.is_first()
    tree = {"a": 1}
    assert hosts.from_first(tree) is tree
    with hosts.all_or_none():
        pass
    for kind in (InputError, PermissionError):
        with pytest.raises(kind, match="mine"), hosts.all_or_none():
            raise kind("mine")
    assert hosts.vote(True) is True
    assert hosts.vote(False) is False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_caught_and_told(number):
    before = signal.getsignal(number)
    with hosts.signals() as received:
        assert received() is None
        os.kill(os.getpid(), number)
        assert received() == number.name
    assert signal.getsignal(number) == before


def test_the_second_interrupt_ends_a_process_that_compiles(tmp_path):
    """While it compiles, the main thread does not return to Python."""
    code = (
        "import hashlib; from layermatch_jax.runtime import hosts\n"
        "with hosts.signals():\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 100_000_000)\n"  # a minute within C
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == (
            "SIGTERM: the run finishes the steps under way, saves a checkpoint and stops. Ctrl-C "
            "twice ends it at once\n"
        )
        process.send_signal(signal.SIGTERM)  # as Slurm sends it again at the end
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert process.poll() is None
        before = time.monotonic()
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(timeout=20) == 130
        assert time.monotonic() - before < 5
    assert said == "Interrupted: all steps since the last checkpoint are lost\n"


def test_the_first_signal_is_told_of_at_once(capfd):
    with hosts.signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received() == "SIGINT"
    assert capfd.readouterr().err == (
        "SIGINT: the run finishes the steps under way, saves a checkpoint and stops. Ctrl-C again "
        "ends it at once\n"
    )


def test_signals_are_left_alone_outside_the_main_thread():
    seen = []

    def body():
        with hosts.signals() as received:
            seen.append(received())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [None]


def test_a_process_with_other_images_than_the_first_is_refused(monkeypatch):
    config = config_lib.base()
    config.dataset.name = "digits"
    config.dataset.stored_size = 16
    monkeypatch.setattr(hosts, "from_first", lambda digest: digest ^ 1)
    with pytest.raises(
        InputError, match="images or classes of this process differ from those of the first"
    ):
        setup.load(config)
