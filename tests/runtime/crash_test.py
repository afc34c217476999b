"""A run that is killed by SIGKILL at any moment and resumed equals a run that is never killed."""

import os
import pathlib
import random
import signal
import subprocess
import sys

import pytest
from runs_of_tests import assert_same

TESTS = pathlib.Path(__file__).parent
LONGEST = {"step": 30, "checkpoint": 60, "evaluation": 30}  # approximate duration of a phase, ms


@pytest.fixture
def start(tmp_path):
    """Returns a function that runs crash_worker.py in a folder and returns the exit status."""

    def start(folder, *moment):
        environment = os.environ | {
            "XLA_FLAGS": "",
            "JAX_PLATFORMS": "cpu",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": f"{TESTS.parent.parent}{os.pathsep}{TESTS.parent}",
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, TESTS / "crash_worker.py", tmp_path / folder, *map(str, moment)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    return start


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, 24])
def test_a_run_that_is_killed_again_and_again(kills, start, tmp_path):
    assert start("whole") == 0
    rng, killed = random.Random(0), 0
    for attempt in range(kills):
        phase = ("checkpoint", "evaluation", "step")[attempt % 3]
        # Sometimes in the first phase of its kind, so that some starts make no progress.
        call, milliseconds = rng.choice((1, 1, 2)), rng.uniform(0, LONGEST[phase])
        killed += start("killed", phase, call, round(milliseconds)) != 0
        if (tmp_path / "killed" / "result.json").exists():  # the run is finished: begin another one
            assert_whole(tmp_path / "whole", tmp_path / "killed")
            (tmp_path / "killed").rename(tmp_path / f"done after {attempt + 1}")
    assert killed >= kills - kills // 6, "too few runs were killed: this test shows nothing"
    assert start("killed") == 0
    assert_whole(tmp_path / "whole", tmp_path / "killed")


def assert_whole(whole, killed):
    assert_same(whole, killed)
    left = [path.name for path in (killed / "checkpoints").iterdir()]
    assert sorted(left) == ["12", "16"], "an incomplete checkpoint is left behind"
