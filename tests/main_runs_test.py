"""Whole runs by the command line: messages, exit statuses, and the files that remain."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from command_line import DIGITS, ROOT, SUPERVISED, TINY, assert_refused, parsed, started
from PIL import Image
from runs_of_tests import before_step

from layermatch_jax import setup
from layermatch_jax.data import pipeline, sources, splits
from layermatch_jax.data.sources import checking
from layermatch_jax.runtime import metrics

# ---- A whole run, started again ----


def test_run_is_made_once(tmp_path, call, monkeypatch):
    steps = ["--config.train_steps=4", "--config.eval_every=2"]
    status, out, err = started(*SUPERVISED, *steps, cwd=tmp_path)
    assert status == 0, err
    workdir = tmp_path / "runs" / "fake-20-supervised-l0-s0"
    result = json.loads((workdir / "result.json").read_text())
    last = 100 * result["test_accuracy"]["raw"]["last"]
    assert "supervised on fake, 20 labels (label seed 0, seed 0): 4 steps" in out
    assert f" {last:.2f} %" in out
    assert {p.name for p in workdir.iterdir()} == {
        ".lock", ".lock.holder", "checkpoints", "config.json", "data.json",
        "labeled_split.json", "metrics.jsonl",
        "result.json",
    }  # fmt: skip

    def contents():
        return {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}

    before = contents()
    monkeypatch.chdir(tmp_path)
    status, again, err = call(*SUPERVISED, *steps)
    assert status == 0
    assert again == out
    assert (
        err.strip()
        == f"The run in {workdir.relative_to(tmp_path)} is already finished: nothing to do."
    )
    assert_refused(
        call(*SUPERVISED, *steps, "--config.optimizer.momentum=0.5", f"--workdir={workdir}"),
        "  optimizer.momentum: 0.9 before, 0.5 now",
        lines=3,
    )
    assert contents() == before


# ---- Runs that end early ----


def numpy_loss(params, batch, statistics):
    """Returns the mean cross-entropy of the labeled images under the linear model, in float32."""
    images = (batch.images[:, 0] / np.float32(255) - np.float32(statistics[0])) / np.float32(
        statistics[1]
    )
    features = images.reshape(len(images), -1) @ params["backbone"]["stem"]["kernel"]
    logits = features @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    logits = logits - logits.max(axis=1, keepdims=True)
    log_z = np.log(np.exp(logits).sum(axis=1))
    return np.mean(log_z - logits[np.arange(len(logits)), batch.labels], dtype=np.float32)


def signals_before_step(monkeypatch, step, *numbers):
    """Makes the process send itself these signals before the batch of a step (1-based)."""

    def signalling():
        for number in numbers:
            os.kill(os.getpid(), number)

    before_step(monkeypatch, step, signalling)


def test_told_to_stop_it_says_how_to_go_on(call, tmp_path, monkeypatch):
    workdir = tmp_path / "exp[1]"  # which Orbax reads as a pattern
    args = [*SUPERVISED, f"--workdir={workdir}", "--config.train_steps=9"]
    with monkeypatch.context() as patch:
        signals_before_step(patch, 3, signal.SIGINT)
        status, out, err = call(*args)
    assert (status, out) == (0, "")
    stopped = re.fullmatch(
        rf"Stopped: by SIGINT at step (\d) of 9\. A checkpoint is saved in "
        rf"{re.escape(str(workdir))}\. Run the same command again to resume",
        err.splitlines()[-1],
    )
    assert 3 <= int(stopped[1]) <= 3 + 5
    status, out, err = call(*args)
    assert status == 0
    assert f"step {stopped[1]} of 9" in err
    assert "9 steps" in out


def test_a_folder_in_use_is_refused(call, tmp_path):
    args = [*SUPERVISED, f"--workdir={tmp_path}", "--config.train_steps=2"]
    holder = (
        "import sys, time; from etils import epath\n"
        "from layermatch_jax.runtime import workdir\n"
        "with workdir.lock(epath.Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        status, out, err = call(*args)
        assert (status, out) == (2, "")
        assert err.endswith(
            f"InputError: {tmp_path} is in use by process {other.pid} on {socket.gethostname()}. "
            "Wait until it is done, stop it, or use another --workdir.\n"
        )
        assert not (tmp_path / "config.json").exists()
        other.kill()
    status, _, err = call(*args)  # SIGKILL has released the lock
    assert status == 0, err


def test_a_full_disk_is_no_traceback(call, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "metrics.jsonl"))

    monkeypatch.setattr(metrics.Log, "_write", full)
    status, out, err = call(*SUPERVISED, f"--workdir={tmp_path}", "--config.train_steps=2")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == (
        f"StorageError: {tmp_path}/metrics.jsonl: No space left on device. Make room; "
        "then run the same command again to resume"
    )
    assert "Traceback" not in err


def test_no_memory_says_what_to_turn_and_the_mended_command_begins_anew(
    call, tmp_path, monkeypatch
):
    def no_memory():
        # A GPU's message.
        said = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 21474836480 bytes."
        raise jax.errors.JaxRuntimeError(said)

    args = [*SUPERVISED, f"--workdir={tmp_path}", "--config.train_steps=2"]
    with monkeypatch.context() as patch:
        before_step(patch, 1, no_memory)
        status, out, err = call(*args, "--config.batch_size=16")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("OutOfMemory: this run needs more memory than the ")
    assert "Lower --config.batch_size, " in err.splitlines()[-1]
    assert "Traceback" not in err
    status, out, err = call(*args)
    assert status == 0, err
    assert f"its files are now in {tmp_path}/before-1, and this run starts at step 0.\n" in err
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 8


@pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")
def test_divergence_keeps_the_last_good_checkpoint(call, tmp_path):
    args = [
        *SUPERVISED, f"--workdir={tmp_path}", "--config.train_steps=20", "--config.eval_every=20",
        "--config.checkpoint_every=1", "--config.checkpoints_kept=20",
        "--config.optimizer.learning_rate=1e5",
    ]  # fmt: skip
    status, out, err = call(*args)
    assert (status, out) == (1, "")

    # The loss of every step in NumPy, from the checkpoint of the step before.
    config = parsed(*args[:-1])
    source = sources.load(config.dataset)
    partition = splits.partition(source, config.dataset)
    sampler = setup.create_sampler(config, partition)
    statistics = sources.channel_statistics(source.train)
    manager = ocp.CheckpointManager(tmp_path / "checkpoints")
    written = {line["step"]: line["loss"] for line in metrics.read(tmp_path)}
    kept = sorted(manager.all_steps())
    assert len(kept) >= 3  # some steps were fine before it diverged
    for step in kept:
        tree = manager.restore(step, args=ocp.args.StandardRestore())["run"]
        state = jax.tree.map(np.asarray, tree["state"])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
        batch, _ = pipeline.moved_views(partition, sampler, 1, step, slice(None))
        loss = numpy_loss(state["params"], batch, statistics)
        if step < kept[-1]:
            assert written[step + 1] == pytest.approx(loss, rel=1e-4)
    manager.close()
    assert not np.isfinite(loss)
    assert kept == list(range(1, kept[-1] + 1))
    assert max(written) == kept[-1]

    ends = f"the loss is not finite at step {kept[-1] + 1}. "
    ends += f"The checkpoint of step {kept[-1]} is kept in {tmp_path}. "
    ends += "Start a new run with a lower --config.optimizer.learning_rate\n"
    assert err.endswith(f"NonFiniteLossError: {ends}")
    assert "Traceback" not in err
    assert not (tmp_path / "result.json").exists()

    # It can be loaded, and resuming from it diverges again.
    status, _, err = call(*args)
    assert status == 1
    assert f"step {kept[-1]} of 20" in err
    assert err.endswith(ends)


def test_update_that_is_not_finite_is_no_checkpoint(call, tmp_path):
    # A learning rate beyond float32: only the first step has a finite loss.
    status, out, err = call(
        *SUPERVISED, f"--workdir={tmp_path}", "--config.train_steps=3",
        "--config.checkpoint_every=1", "--config.optimizer.learning_rate=1e39",
    )  # fmt: skip
    assert (status, out) == (1, "")
    assert err.endswith(
        "NonFiniteLossError: the update of step 1 is not finite. "
        f"No checkpoint was written yet in {tmp_path}. "
        "Start a new run with a lower --config.optimizer.learning_rate\n"
    )
    assert list((tmp_path / "checkpoints").iterdir()) == []


def image_folder(root):
    """Two classes with 8 training and 4 test images each, and 40 images without a label."""
    rng = np.random.RandomState(0)
    places = [f"train/{c}/{i}.png" for c in "ab" for i in range(8)]
    places += [f"test/{c}/{i}.png" for c in "ab" for i in range(4)]
    places += [f"unlabeled/{i:02}.png" for i in range(40)]
    for place in places:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.randint(0, 256, (8, 8, 3)).astype(np.uint8)).save(root / place)
    return [root / place for place in places if place.startswith("unlabeled")]


def damage(path):
    """Truncates a file; returns a function that restores it."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return lambda: path.write_bytes(whole)


def test_broken_images_are_named_and_the_run_goes_on_when_they_are_mended(
    call, tmp_path, monkeypatch
):
    data, workdir = tmp_path / "data", tmp_path / "run"
    extra = image_folder(data)
    args = [
        f"--config={DIGITS}:labels=4,method=fixmatch", *TINY, f"--workdir={workdir}",
        "--config.dataset.name=folder", f"--config.dataset.data_dir={data}",
        "--config.unlabeled_ratio=1", "--config.train_steps=8", "--config.eval_every=8",
        "--config.checkpoint_every=2", "--config.input.backend=tf_data",
        "--config.dataset.cache_dir=none",
    ]  # fmt: skip

    # All are found at the start, also those for the evaluation, before anything is written.
    broken = [data / "train/b/3.png", data / "test/b/3.png", extra[7]]
    mend = [damage(path) for path in broken]
    done = call(*args)
    assert_refused(done, "InputError: 3 of 64 images cannot be decoded:\n", workdir, lines=5)
    assert [line.split(" (")[0] for line in done[2].splitlines()[1:4]] == [f"  {x}" for x in broken]
    for mend_it in mend:
        mend_it()

    # From here on images break after they were checked.
    monkeypatch.setattr(checking, "check", lambda *_: checking.Findings({}, ()))
    # An unlabeled image that the fourth step is the first to need.
    config = parsed(*args[:2], *args[3:])
    partition = splits.partition(sources.load(config.dataset), config.dataset)
    sampler = setup.create_sampler(config, partition)
    first = {}
    for step in range(8):
        for index in sampler.draw(step).unlabeled.ravel():
            first.setdefault(int(index), step + 1)
    index = next(i for i, step in first.items() if step == 4 and i >= 16)
    mend = damage(extra[index - 16])  # after the 16 training images
    status, out, err = call(*args)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith(
        f"InputError: Cannot decode the image {extra[index - 16]} ("
    )
    assert "Traceback" not in err
    # All files are intact, and sufficient to resume.
    assert {p.name for p in workdir.iterdir()} == {
        ".lock", ".lock.holder", "checkpoints", "config.json", "data.json",
        "labeled_split.json", "metrics.jsonl",
    }  # fmt: skip
    # A line is written while the next step runs, so the third may be missing.
    assert [line["step"] for line in metrics.read(workdir)] in ([1, 2], [1, 2, 3])
    assert json.loads((workdir / "config.json").read_text())["train_steps"] == 8
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["2"]
    mend()
    (workdir / "data.json").unlink()  # it describes the data set with the broken image

    # Without this image, the data set is another one.
    image = extra[index - 16].read_bytes()
    extra[index - 16].unlink()
    before = (workdir / "labeled_split.json").read_text()
    done = call(*args)
    assert_refused(done, "  num_unlabeled: 56 before, 55 now", lines=3)
    assert (workdir / "labeled_split.json").read_text() == before
    extra[index - 16].write_bytes(image)

    # A test image, which is read in the evaluation.
    mend = damage(data / "test/b/3.png")
    status, out, err = call(*args)
    assert (status, out) == (2, "")
    assert "step 2 of 8" in err
    assert err.splitlines()[-1].startswith(
        f"InputError: Cannot decode the image {data / 'test/b/3.png'} ("
    )
    assert not (workdir / "result.json").exists()
    mend()
    (workdir / "data.json").unlink()

    status, out, err = call(*args)
    assert status == 0
    assert "step 6 of 8" in err
    assert "fixmatch on folder, 4 labels" in out
    lines = [(line["split"], line["step"]) for line in metrics.read(workdir)]
    assert lines == [("train", step) for step in range(1, 9)] + [("test", 8)]
