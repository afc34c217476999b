"""Small training runs: their config, how tests interrupt them, and how tests compare them."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
from etils import epath

from layermatch_jax import automatic, config, presets
from layermatch_jax.data import feed
from layermatch_jax.runtime import checkpoint, metrics

ROOT = pathlib.Path(__file__).parent.parent


def run_main(config_arg, workdir, *flags, **environment):
    """Runs `python -m layermatch_jax.main` in its own process, as a user starts it."""
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
            "log_every": 3,  # does not divide checkpoint_every, so the restart cuts a window
            "eval_every": 4,
            "checkpoint_every": 4,
            "eval_batch_size": 64,
            "input.backend": "device",
            "tensorboard": False,
            # A long memory, so that averages differ from the averaged values.
            "ema_decay": 0.999,
            "model.bn_decay": 0.999,
            "policy.momentum": 0.999,
        }
    )
    presets.apply_method(c, method)
    c.update_from_flattened_dict(fields)
    return automatic.resolve(c)


class KilledError(Exception):
    pass


def before_step(monkeypatch, step, action, feeds=feed):
    """Makes the next runs call `action` before the chunk with this step (1-based).

    `feeds`: the module whose `create` makes the feed.
    """
    original = feeds.create

    def create(*args):
        created = original(*args)

        def chunks(steps):
            begun = steps.start
            for last, chunk in created.chunks(steps):
                if begun < step <= last:
                    action()
                yield last, chunk
                begun = last

        return created._replace(chunks=chunks)

    monkeypatch.setattr(feeds, "create", create)


def die():
    raise KilledError


def final_state(workdir):
    """Reads the newest checkpoint as {path: array}, without the clock."""
    with checkpoint.open_manager(epath.Path(workdir), kept=2) as manager:
        tree = manager.restore(manager.latest_step())["run"]
    del tree["clock"]
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def lines(workdir):
    """Reads metrics.jsonl without times and speeds."""
    return [
        {name: value for name, value in line.items() if name not in metrics.TIME_FIELDS}
        for line in metrics.read(epath.Path(workdir))
    ]


def assert_same(whole, other):
    """Asserts that the whole state is equal bit for bit, and metrics.jsonl except for times."""
    assert lines(other) == lines(whole)
    expected, actual = final_state(whole), final_state(other)
    assert expected.keys() == actual.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)
