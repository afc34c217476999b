"""Calls of the command line for tests: arguments, processes, and refusals."""

import os
import pathlib
import subprocess
import sys

from absl import flags

from layermatch_jax import main

ROOT = pathlib.Path(__file__).parent.parent
DIGITS = str(ROOT / "configs" / "digits.py")
TINY = [
    "--config.dataset.name=fake", "--config.dataset.stored_size=8", "--config.dataset.image_size=8",
    "--config.dataset.padding=1", "--config.model.name=linear", "--config.model.width=4",
    "--config.batch_size=8", "--config.eval_batch_size=64", "--config.augment.randaugment_ops=0",
    "--config.tensorboard=False", "--config.log_every=1",
]  # fmt: skip
SUPERVISED = [f"--config={DIGITS}:labels=20,method=supervised", *TINY]


def started(*args, cwd=ROOT, devices=1, **environment):
    """Runs `python -m layermatch_jax.main …` in its own process, as a user starts it."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    } | environment
    command = [sys.executable, "-m", "layermatch_jax.main", *args]
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def parsed(*args):
    values = flags.FlagValues()
    main.parse_flags(["main", *args], values)
    return values.config


def assert_refused(done, message, workdir=None, lines=1):
    """Asserts status 2, a message without a traceback, and that nothing was written."""
    status, out, err = done
    assert status == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert err.count("\n") == lines
    assert workdir is None or not workdir.exists()
