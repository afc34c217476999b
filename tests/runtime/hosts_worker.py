"""One process of hosts_test.py: hosts_worker.py PORT NUM_PROCESSES PROCESS_ID FOLDER MODEL.

MODEL is 'linear', 'conv4' or 'fails'.

It trains some steps of each combination, evaluates a set of images, and begins a run in which the
last process gets SIGTERM. It writes the results to FOLDER/PROCESS_ID.npz.
"""

import functools
import os
import signal
import sys
import time

import jax
import numpy as np
import parallel_test
import pytest
from runs_of_tests import before_step, tiny

from layermatch_jax import evaluate, train
from layermatch_jax.data import images, pipeline
from layermatch_jax.errors import InputError, Stopped, StorageError
from layermatch_jax.method import steps
from layermatch_jax.runtime import checkpoint, hosts, parallel

# Policy and centers: FixMatch's, LayerMatch's, and ones with state for each sample.
COMBINATIONS = {
    "fixmatch": ("fixed_threshold", "none"),
    "layermatch": ("fixed_threshold", "classifier"),
    "flexmatch": ("flexmatch", "outputs"),
}
STEPS = 4
STOP_AT = 5  # the step before which the last process gets SIGTERM
EVALUATION = 37  # images, in batches of 16, so the last batch is padded


def combination(name):
    policy, centers = COMBINATIONS[name]
    return parallel_test.configuration(**{"policy.name": policy, "avg_clustering.centers": centers})


def flat(tree):
    """{path: array} of a tree that is the same on all devices."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def make_steps(config, parallelism):
    """State and metrics after STEPS steps on this process's rows of parallel_test's batches."""
    method, current = parallel_test.start(config, parallel.axis_name(parallelism))
    step = parallel.compile_step(functools.partial(steps.train_step, method=method), parallelism)
    current = parallel.replicate(current, parallelism)
    rows = parallel.host_rows(config.batch_size)
    for k in range(STEPS):
        batch = jax.tree.map(lambda x: x[rows], parallel_test.make_batch(k))
        current, metrics = step(current, parallel.place_batch(batch, parallelism))
    return flat({"state": current, "metrics": metrics})


def evaluation_set():
    pixels = np.random.RandomState(3).randint(0, 256, (EVALUATION, 8, 8, 3)).astype(np.uint8)
    return images.from_array(pixels, np.arange(EVALUATION) % parallel_test.CLASSES)


def evaluate_all(parallelism):
    """Returns the scores of the evaluation set."""
    config = parallel_test.configuration(parallelism=parallelism, eval_batch_size=16)
    method, current = parallel_test.start(config, parallel.axis_name(parallelism))
    step = functools.partial(steps.eval_step, method=method)
    step = parallel.compile_step(step, parallelism, donate_state=False)
    current = parallel.replicate(current, parallelism)
    return evaluate.evaluate(step, current, evaluation_set(), config)


def seen():
    """Returns the labels of the evaluation images that this process counts."""
    everything = images.from_array(np.zeros((EVALUATION, 8, 8, 3), np.uint8), np.arange(EVALUATION))
    batches = pipeline.eval_batches(everything, 16, 8, parallel.host_rows(16))
    return np.concatenate([batch.labels[batch.mask > 0] for batch in batches])


def run_config(model):
    fields = {"train_steps": 12, "checkpoint_every": 100, "model.name": model}
    return tiny("flexmatch+layerwise", **fields)


def stopped_run(config, folder):
    """Begins a run in which the last process gets SIGTERM; returns the message of Stopped."""

    def tell():
        if jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with pytest.MonkeyPatch.context() as patch, hosts.signals() as told:
            before_step(patch, STOP_AT, tell)
            train.train_and_evaluate(config, folder, told)
    except Stopped as error:
        return str(error)
    return "not stopped"


def refused():
    """Returns this process's error if only the last process cannot start."""
    try:
        with hosts.all_or_none():
            if jax.process_index() == jax.process_count() - 1:
                raise InputError("no data here")
    except InputError as error:
        return str(error)
    return "not refused"


def fail(*_):
    print("failed", time.time(), flush=True)
    raise StorageError("no room")


def main(port, num_processes, process_id, folder, model):
    hosts.connect(f"localhost:{port}", int(num_processes), int(process_id))
    if model == "fails":  # only the first process cannot write
        checkpoint.save = fail
        train.train_and_evaluate(run_config("linear"), os.path.join(folder, "run"))
    config, run_folder = run_config(model), os.path.join(folder, "run")
    out = {}
    for parallelism in ("pmap", "jit"):
        for name in COMBINATIONS:
            arrays = make_steps(combination(name), parallelism)
            out |= {f"{parallelism} {name} {k}": v for k, v in arrays.items()}
        scores = evaluate_all(parallelism)
        out |= {f"{parallelism} scores {k}": np.array(v) for k, v in scores.items()}
    out["seen"] = seen()
    out["refused"] = np.array(refused())
    out["stopped"] = np.array(stopped_run(config, run_folder))
    if (
        num_processes == "2"
    ):  # two processes resume their run; after four, hosts_test.py resumes it with one
        result = train.train_and_evaluate(config, run_folder)
        out["finished"] = np.array(result is not None)
    np.savez(os.path.join(folder, process_id), **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
