"""Runs in a bucket (gs://) equal runs in a local folder, and survive the same failures.

The clients are the real ones; the bucket is that of bucket_server.py. Google's delays, limits,
permissions and hierarchical namespaces are not tested.
"""

import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import zlib

import bucket_server
import numpy as np
import pytest
from hosts_test import free_port
from runs_of_tests import final_state, lines

pytest.importorskip("google.cloud.storage", reason="needs google-cloud-storage")
if not shutil.which("openssl"):
    pytest.skip("needs openssl, for a certificate", allow_module_level=True)
pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
RUN, PROJECT = "gs://bucket/run", {"GOOGLE_CLOUD_PROJECT": "any"}
FIELDS = {
    "model.width": 4,
    "batch_size": 4,
    "unlabeled_ratio": 2,
    "policy.threshold": 0.01,
    "eval_batch_size": 64,
    "train_steps": 11,
    "log_every": 2,
    "eval_every": 4,
    "checkpoint_every": 3,  # the last two are kept
}
LATEST = "run/checkpoints/11/"
ARRAYS = LATEST + "default/ocdbt.process_0/d/.*"


@pytest.fixture
def storage(tmp_path):
    with bucket_server.serve("bucket", tmp_path) as storage:
        yield storage


def start(workdir, *flags, **environment):
    """Starts `python -m layermatch_jax.main` in a new process."""
    command = [sys.executable, "-m", "layermatch_jax.main", "--config=configs/digits.py"]
    command += [f"--config.{name}={value}" for name, value in FIELDS.items()]
    environment |= {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(storage, *flags, workdir=RUN, during=None, project=PROJECT):
    """Runs in the bucket; returns the exit status and the output.

    `during` is called with the process and the arguments of Storage.intercept for each request.
    """
    # By default, clients wait at least 1 s between attempts.
    hurry = {"GCS_RETRY_CONFIG_INIT_DELAY_TIME_US": "1000"}
    process = start(workdir, *flags, **storage.environment() | hurry | project)
    if during:
        storage.intercept = functools.partial(during, process)
    try:
        said = process.communicate(timeout=240)[0]
    finally:
        process.kill()
        storage.intercept = lambda *moment: None
    return process.returncode, said


def refuse(status, what, pattern):
    """Makes a `during` that answers matching requests with this HTTP status."""

    def during(process, now, name, done):
        return status if now == what and not done and re.fullmatch(pattern, name) else None

    return during


def send(number, what, pattern, done):
    """Makes a `during` that sends a signal before or after the first matching request is done."""
    sent = []

    def during(process, now, name, now_done):
        if not sent and (now, now_done) == (what, done) and re.fullmatch(pattern, name):
            sent.append(process.send_signal(number))
            return None if done else 503

    return during


def download(storage, folder):
    """Copies the run from the bucket to a local folder, and returns the folder."""
    shutil.rmtree(folder / "copy", ignore_errors=True)
    for name, (content, _) in storage.objects.items():
        if not name.endswith("/"):
            path = folder / "copy" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder / "copy" / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a local run without failures."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The objects of a finished run in the bucket, without result.json: the run can end again."""
    with bucket_server.serve("bucket", tmp_path_factory.mktemp("finished")) as storage:
        status, said = run(storage)
        assert status == 0, said
        return {name: o for name, o in storage.objects.items() if name != "run/result.json"}


def assert_same(copy, whole, tolerance=0.0):
    """Asserts that two runs left the same files, except for times."""
    assert sorted(path.name for path in copy.iterdir()) == sorted(
        path.name for path in whole.iterdir() if path.name not in (".lock", ".lock.holder")
    )
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["11", "9"]
    expected, actual = final_state(whole), final_state(copy)
    assert expected.keys() == actual.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, rtol=0, atol=tolerance, err_msg=path)
    steps = [(line["step"], line["split"]) for line in lines(whole)]
    assert [(line["step"], line["split"]) for line in lines(copy)] == steps
    if not tolerance:
        assert lines(copy) == lines(whole)
        assert result(copy) == result(whole)
        for name in ("config.json", "labeled_split.json"):
            assert (copy / name).read_text() == (whole / name).read_text()


def result(folder):
    everything = json.loads((folder / "result.json").read_text())
    return everything | {"wall_seconds": None, "images_per_second": None}


def events(folder):
    """Returns the (step, tag) of everything in the event file, except for speeds."""
    import tensorflow as tf
    from tensorboard.compat.proto import event_pb2

    (file,) = (folder / "tensorboard").iterdir()
    records = tf.data.TFRecordDataset(str(file)).as_numpy_iterator()
    return [
        (event.step, value.tag)
        for event in map(event_pb2.Event.FromString, records)
        for value in event.summary.value
        if "per_second" not in value.tag  # whether a speed is known depends on the time
    ]


def test_a_run_is_the_one_in_a_local_folder(storage, whole, tmp_path):
    assert {path.name for path in whole.iterdir()} >= {
        "config.json",
        "result.json",
        "metrics.jsonl",
    }
    before = sorted(path.name for path in ROOT.iterdir())
    status, said = run(storage, "--config.compilation_cache=gs://bucket/cache")
    assert status == 0, said
    assert f"files: {RUN}/ (result.json" in said
    assert sorted(path.name for path in ROOT.iterdir()) == before, "it wrote here as well"
    copy = download(storage, tmp_path)
    assert '"compilation_cache": "gs://bucket/cache"' in (copy / "config.json").read_text()
    shutil.copy(whole / "config.json", copy)
    assert_same(copy, whole)
    assert events(copy) == events(whole)
    assert len(events(whole)) > len(lines(whole))
    kept = {name for name in storage.objects if re.match("cache/.*-cache", name)}
    assert max(len(storage.objects[name].content) for name in kept) > 100_000

    storage.requests.clear()
    status, said = run(storage)
    assert status == 0, said
    assert "is already finished: nothing to do" in said
    assert not [what for what, _ in storage.requests if what in ("write", "delete")]

    storage.requests.clear()
    cached = "--config.compilation_cache=gs://bucket/cache"
    status, said = run(storage, cached, workdir="gs://bucket/other")
    assert status == 0, said
    assert kept <= {name for what, name in storage.requests if what == "read"}
    assert not [name for what, name in storage.requests if what == "write" and name in kept]


def test_one_that_is_told_to_stop_goes_on(storage, whole, tmp_path):
    status, said = run(
        storage, during=send(signal.SIGTERM, "write", "run/metrics.jsonl", done=True)
    )
    assert status == 0, said
    (step,) = re.findall(
        rf"Stopped: by SIGTERM at step (\d+) of 11. A checkpoint is saved in {RUN}", said
    )
    assert 1 <= int(step) <= 6
    assert f"run/checkpoints/{step}/commit_success.txt" in storage.objects
    status, said = run(storage)
    assert status == 0, said
    assert f"{RUN}, step {step} of 11" in said
    copy = download(storage, tmp_path)
    shutil.rmtree(copy / "tensorboard")
    shutil.copytree(whole / "tensorboard", copy / "tensorboard")
    assert_same(copy, whole)


def test_sigkill_at_any_moment_costs_nothing(storage, whole, tmp_path):
    killed = [
        ("write", "run/config.json", False),
        ("write", "run/checkpoints/3/default/.*/d/.*", True),
        ("write", "run/checkpoints/3/commit_success.txt", False),
        ("write", "run/metrics.jsonl", True),
        ("write", "run/checkpoints/3/commit_success.txt", True),
        ("write", "run/metrics.jsonl", False),  # which the resumed run cuts back
        ("write", "run/checkpoints/6/default/_METADATA", True),
        ("delete", "run/checkpoints/3/.*", True),  # the run deletes it after it saves step 9
        ("write", "run/result.json", False),
    ]
    for moment in killed:
        status, said = run(storage, during=send(signal.SIGKILL, *moment))
        assert status == -signal.SIGKILL, f"{moment}\n{said}"
    status, said = run(storage)
    assert status == 0, said
    assert "step 11 of 11" in said, "result.json alone was missing"
    copy = download(storage, tmp_path)
    # Starts that were killed before their first checkpoint.
    aside = sorted(path.name for path in copy.glob("before-*"))
    assert aside == [f"before-{n}" for n in range(1, len(aside) + 1)] != []
    for name in aside:
        shutil.rmtree(copy / name)
    assert_same(copy, whole)


@pytest.mark.parametrize("damage", ["cut", "gone", "changed"])
def test_a_damaged_checkpoint_gives_way(damage, storage, finished, whole, tmp_path):
    storage.objects = dict(finished)
    name = max(
        (name for name in storage.objects if re.fullmatch(ARRAYS, name)),
        key=lambda name: len(storage.objects[name].content),
    )
    content = bytearray(storage.objects.pop(name).content)
    if damage == "changed":
        content[len(content) // 2] ^= 0xFF
    if damage != "gone":
        kept = bytes(content[: len(content) // (2 if damage == "cut" else 1)])
        storage.objects[name] = bucket_server.Object(kept, next(storage.generations))
    status, said = run(storage)
    assert status == 0, said
    assert f"Checkpoint of step 11 is damaged, moved to {RUN}/checkpoints_damaged/11: " in said
    assert "Resuming from step 9." in said
    assert "run/checkpoints_damaged/11/commit_success.txt" in storage.objects
    copy = download(storage, tmp_path)
    shutil.rmtree(copy / "checkpoints_damaged")
    assert_same(copy, whole)


@pytest.mark.parametrize("name", ["default/_METADATA", "default/manifest.ocdbt", "default/d/.*"])
def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(name, storage, finished):
    storage.objects = dict(finished)
    status, said = run(storage, during=refuse(403, "read", LATEST + name))
    assert status == 1, said
    assert re.search(r"\nStorageError: .*403.*Mend this; then run the same command again", said)
    assert storage.objects == finished


@pytest.mark.parametrize(
    ("status", "pattern"),
    [
        (403, "run/checkpoints/9/.*"),  # TensorFlow is told
        (403, "run/checkpoints/9/.*/d/.*"),  # tensorstore is
        (507, "run/checkpoints/9/commit_success.txt"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_costs_no_earlier_one(
    status, pattern, storage, whole, tmp_path
):
    ended, said = run(storage, during=refuse(status, "write", pattern))
    assert ended == 1, said
    assert f"StorageError: a checkpoint could not be written to {RUN}/checkpoints: " in said
    assert f"{status} on purpose" in said
    assert "Earlier ones are kept (steps: 3, 6)" in said
    # If several arrays fail at once, asyncio may print tracebacks as well.
    assert "Traceback" not in said or "/d/" in pattern
    ended, said = run(storage)
    assert ended == 0, said
    assert f"{RUN}, step 6 of 11" in said
    copy = download(storage, tmp_path)
    shutil.rmtree(copy / "tensorboard")
    shutil.copytree(whole / "tensorboard", copy / "tensorboard")
    assert_same(copy, whole)


@pytest.mark.parametrize("name", ["run/", "run/config.json.*", "run/metrics.jsonl", ".*/events.*"])
def test_small_files_that_cannot_be_written_are_told_of(name, storage):
    status, said = run(storage, during=refuse(403, "write", name))
    assert status == 1, said
    assert re.search(r"\nStorageError: .*403.*gs://bucket/run.*Mend this; then run the", said)
    assert "Traceback" not in said


def test_a_bucket_that_is_not_there_is_refused(storage):
    status, said = run(storage, workdir="gs://buckett/run")
    assert status == 2, said
    assert "InputError: --workdir=gs://buckett/run: there is no gs://buckett" in said


def test_a_project_that_is_not_known_is_asked_for(storage, monkeypatch):
    """Google's own machines know the project."""
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    status, said = run(storage, project={})
    assert status == 2, said
    assert f"InputError: --workdir={RUN}: Project was not passed" in said
    assert "Set GOOGLE_CLOUD_PROJECT." in said


def test_a_busy_bucket_is_asked_again(storage, whole, tmp_path):
    """After too many requests, or a temporary failure."""
    asked = {}

    def during(process, what, name, done):
        asked[what, name] = asked.get((what, name), 0) + (not done)
        if not done and asked[what, name] == 1 and zlib.crc32(name.encode()) % 4 == 0:
            return 429 if len(asked) % 2 else 503

    status, said = run(storage, during=during)
    assert status == 0, said
    assert_same(download(storage, tmp_path), whole)


def test_two_processes_share_a_run(storage, whole, tmp_path):
    """They are told to stop first, and resume."""
    for attempt in range(2):
        flags = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
        with start(RUN, *flags, "--process_id=1", **storage.environment()) as other:

            def tell(first, what, name, done, other=other, stop=attempt == 0):
                if stop and (what, name) == ("write", "run/metrics.jsonl"):
                    other.send_signal(signal.SIGTERM)

            status, said = run(storage, *flags, "--process_id=0", during=tell)
            said += other.communicate(timeout=60)[0]
        assert (status, other.returncode) == (0, 0), said
        assert ("Stopped: by another process at step" in said) == (attempt == 0), said
    copy = download(storage, tmp_path)
    shutil.rmtree(copy / "tensorboard")
    shutil.copytree(whole / "tensorboard", copy / "tensorboard")
    assert_same(copy, whole, tolerance=1e-4)
