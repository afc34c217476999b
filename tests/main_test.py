"""What a user sees: the command line, its messages and exit statuses, and what is left behind."""

import errno
import importlib.util
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags, logging
from PIL import Image
from train_test import before_step

from layermatch_jax import config as config_lib
from layermatch_jax import main, setup
from layermatch_jax.data import pipeline, sources, splits
from layermatch_jax.data.sources import checking
from layermatch_jax.runtime import metrics

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
    """`python -m layermatch_jax.main …` in a process of its own, as a user starts it."""
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


@pytest.fixture
def call(capfd):
    """The same in this process, which has JAX and TensorFlow already: (status, stdout, stderr)."""
    verbosity = logging.get_verbosity()

    def run(*args):
        values = flags.FlagValues()
        capfd.readouterr()
        try:
            status = main.main(main.parse_flags(["main", *args], values), values)
        except SystemExit as end:
            status = end.code
        return status, *capfd.readouterr()

    yield run
    logging.set_verbosity(verbosity)


def parsed(*args):
    values = flags.FlagValues()
    main.parse_flags(["main", *args], values)
    return values.config


def test_a_shipped_config_by_its_name():
    """As one word and as two, and with an argument."""
    for config in (
        ["--config=cifar100"],
        ["--config", "cifar100"],
        ["-config=cifar100:labels=400"],
    ):
        assert parsed(*config, "--config.seed=7") == parsed(
            f"--config={ROOT}/configs/cifar100.py", "--config.seed=7"
        )


def assert_refused(done, message, workdir=None, lines=1):
    """Status 2, an error a person can read, and nothing written."""
    status, out, err = done
    assert status == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert err.count("\n") == lines
    assert workdir is None or not workdir.exists()


# ---- Flags ----


def test_no_config_is_the_demo():
    config = parsed()
    assert (config.dataset.name, config.dataset.num_labels) == ("digits", 40)
    assert config.method == "layermatch"


@pytest.mark.parametrize("form", [("--config={}",), ("--config", "{}"), ("-config={}",)])
def test_config_with_argument_and_fields(form, monkeypatch):
    monkeypatch.chdir(ROOT)
    form = [part.format("configs/digits.py:labels=10,method=fixmatch") for part in form]
    config = parsed(
        *form,
        "--config.seed", "5",
        "--config.train_steps=7",
        "--noconfig.optimizer.nesterov",
        "--config.avg_clustering.momentum=0.9",
        "--config.layerwise.gradient_mask=(('backbone/stem/.*', 0.5), ('classifier/.*', 0.0))",
    )  # fmt: skip
    assert (config.dataset.num_labels, config.method) == (10, "fixmatch")
    assert (config.seed, config.train_steps, config.optimizer.nesterov) == (5, 7, False)
    assert config.avg_clustering.momentum == 0.9
    assert config.layerwise.gradient_mask == (("backbone/stem/.*", 0.5), ("classifier/.*", 0.0))
    assert config.is_locked


@pytest.mark.parametrize("field", ["compilation_cache", "avg_clustering.momentum"])
def test_none_is_none(field):
    for form in ([f"--config.{field}=None"], [f"--config.{field}", "None"]):
        value = parsed(f"--config={DIGITS}", *form, "--config.seed=3")
        assert config_lib.fields(value)[field] is None
        assert value.seed == 3
    # What a config file sets can be taken back; and 'None' is a name where a text is wanted.
    assert (
        config_lib.fields(parsed(f"--config.{field}=0.5", f"--config.{field}=None"))[field] is None
    )
    assert parsed("--config.dataset.split_file=None").dataset.split_file == "None"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.metod=x"], "unknown config field 'metod'. Did you mean 'method'?"),
        (["--config.gradient_mask=()"], "Did you mean 'layerwise.gradient_mask'?"),
        (["--noconfig.optimizer.nestorov"], "Did you mean 'optimizer.nesterov'?"),
        ([f"--config={DIGITS}", "--config.batch_sise=3"], "Did you mean 'batch_size'?"),
        ([f"--config={DIGITS}:method=fixmach"], "Did you mean 'fixmatch'?"),
        ([f"--config={DIGITS}:label=10"], "Did you mean 'labels'?"),
        ([f"--config={DIGITS}:labels=ten"], "labels=ten: give a whole number"),
        (["--config=nonexistent.py"], "--config=nonexistent.py: no such config file in "),
        (["--config", "nonexistent.py:labels=1"], "--config=nonexistent.py: no such config file"),
        (["--config=configs"], "--config=configs: no such config file"),
        (["--config="], "--config=: no such config file"),
        (["--config"], "Missing value for flag --config"),
        (["--config.dataset.name=folder"], "Give a config, too: --config=imagenet100 for photog"),
        (["--config.dataset.name=npz"], "Give a config, too: --config=cifar10 for images of 32"),
        (["--config.dataset.name=cifar100"], "Give a config, too: --config=cifar100. To take"),
        (["--config.dataset.class_list=None"], "class_list=None: this setting is never automatic"),
        (["--config.batch_size=abc"], "--config.batch_size=abc: invalid literal for int()"),
        (["--config.batch_size=2.5"], "--config.batch_size=2.5: invalid literal for int()"),
        (["--config.dataset.flip=maybe"], "--config.dataset.flip=maybe: "),
        (["--config.seed=1", f"--config={DIGITS}"], "--config.seed=1 in argv before a value for"),
        (["--confg=x"], "Unknown command line flag 'confg'. Did you mean: config"),
        (["train"], "unexpected argument 'train': flags are written --name=value"),
        (["--mode=foo"], "unknown --mode 'foo'. There are: train"),
    ],
)
def test_flag_that_cannot_be_read(args, message, call):
    assert_refused(call(*args), message)


def test_none_makes_a_setting_automatic():
    config = parsed(
        f"--config={DIGITS}",
        "--config.avg_clustering.momentum=None",
        "--config.compilation_cache=None",
        "--config.policy.temperature", "None",
        "--config.ema_decay=0.5", "--config.ema_decay=None",
        "--config.model.bn_decay=None", "--config.model.bn_decay=0.5",
    )  # fmt: skip
    assert config.avg_clustering.momentum is config.compilation_cache is None
    assert config.policy.temperature is config.ema_decay is None
    assert config.model.bn_decay == 0.5


def test_demo_settings_on_other_images_must_be_asked_for():
    config = parsed(f"--config={DIGITS}", "--config.dataset.name=folder")
    assert (config.dataset.name, config.dataset.image_size) == ("folder", 16)


def test_config_file_that_ends_the_program(tmp_path, call):
    (tmp_path / "mine.py").write_text('import sys\nsys.exit("no such cluster")\n')
    done = call(f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run")
    assert_refused(done, "line 2 ended the program by sys.exit: no such cluster", tmp_path / "run")


def test_statuses_of_the_process(tmp_path):
    status, out, err = started("--help")
    assert (status, err) == (0, "")
    assert "--config.FIELD=VALUE" in out
    assert "--workdir" in out
    done = started("--config.metod=x", cwd=tmp_path)
    assert_refused(done, "InputError: unknown config field 'metod'. Did you mean 'method'?")
    assert list(tmp_path.iterdir()) == []


# ---- What cannot be run ----


def test_batch_that_three_devices_cannot_share(tmp_path):
    workdir = tmp_path / "run"
    done = started(f"--workdir={workdir}", "--config.batch_size=8", devices=3)
    message = "not divisible by 3 devices: --config.batch_size=8 (use 6 or 9), "
    message += "--config.eval_batch_size=512 (use 510 or 513)"
    assert_refused(done, message, workdir)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.method=fixmatch"], "Write --config=FILE:method=fixmatch"),
        (["--config.policy.threshold=1.5"], "threshold=1.5 must be between 0 and 1"),
        (["--config.train_steps=0"], "train_steps=0 must be at least 1"),
        (["--config.layerwise.gradient_mask=classifier"], "write (regular expression, multiplier)"),
        (["--config.layerwise.gradient_mask=(('(', 0.0),)"], "'(' is no expression: missing )"),
        (["--config.dataset.num_labels=401"], "Allowed are 10..400 (the number of training images"),
        (["--config.dataset.num_labels=9"], "Allowed are 10..400 "),
        (["--config.dataset.name=cifar11"], "'cifar11'. Did you mean 'cifar10'?"),
        (["--config.dataset.name=folder", "--config.dataset.data_dir=/no/such"], "'/no/such' is"),
        (["--config.model.name=resnet"], "'resnet'. Did you mean 'resnet50'?"),
    ],
)
def test_setting_that_cannot_be_run(args, message, call, tmp_path):
    workdir = tmp_path / "run"
    done = call(f"--config={DIGITS}", f"--workdir={workdir}", *TINY, *args)
    assert_refused(done, message, workdir)


def test_mask_that_matches_nothing(call, tmp_path):
    workdir = tmp_path / "run"
    mask = "--config.layerwise.gradient_mask=(('head/.*', 0.0),)"
    paths = ["backbone/stem/kernel", "classifier/bias", "classifier/kernel"]
    done = call(f"--workdir={workdir}", *TINY, mask)
    assert_refused(done, "'head/.*' matches no parameter", workdir, lines=1 + len(paths))
    assert done[2].split("\n  ")[1:] == [*paths[:-1], paths[-1] + "\n"]


def test_workdir_that_is_a_file(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("mine")
    for name in (tmp_path / "file", tmp_path / "file" / "run", "~/file"):
        done = call(f"--workdir={name}", *TINY)
        assert_refused(done, f"{tmp_path / 'file'} is no folder that can be written to")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None, reason="needs TensorFlow Datasets"
)
def test_data_set_that_is_not_there_while_offline(tmp_path):
    nobody = "http://127.0.0.1:9"
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nobody)
    config, data, workdir = ROOT / "configs" / "cifar10.py", tmp_path / "data", tmp_path / "run"
    before = time.monotonic()
    done = started(
        f"--config={config}", f"--workdir={workdir}", f"--config.dataset.data_dir={data}",
        TF_CPP_MIN_LOG_LEVEL="3", no_proxy="", NO_PROXY="", **proxies,
    )  # fmt: skip
    assert time.monotonic() - before < 60  # tfds would try again for many minutes
    status, out, err = done
    assert (status, out) == (2, "")
    told = err.splitlines()[-1]
    assert told.startswith(f"InputError: Data set 'cifar10' is not in {data}, and ")
    assert "Do one of these: set TFDS_DATA_DIR or --config.dataset.data_dir" in told
    assert "Traceback" not in err
    assert not workdir.exists()


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
        ".lock", "checkpoints", "config.json", "data.json", "labeled_split.json", "metrics.jsonl",
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
        == f"{workdir.relative_to(tmp_path)} holds this run, and it is finished: "
        + ("nothing to do.")
    )
    assert_refused(
        call(*SUPERVISED, *steps, "--config.optimizer.momentum=0.5", f"--workdir={workdir}"),
        "  optimizer.momentum: 0.9 before, 0.5 now",
        lines=3,
    )
    assert contents() == before


# ---- Runs that end early ----


def numpy_loss(params, batch, statistics):
    """The mean cross-entropy of the labelled images under the linear model, in float32."""
    images = (batch.images[:, 0] / np.float32(255) - np.float32(statistics[0])) / np.float32(
        statistics[1]
    )
    features = images.reshape(len(images), -1) @ params["backbone"]["stem"]["kernel"]
    logits = features @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    logits = logits - logits.max(axis=1, keepdims=True)
    log_z = np.log(np.exp(logits).sum(axis=1))
    return np.mean(log_z - logits[np.arange(len(logits)), batch.labels], dtype=np.float32)


def signals_before_step(monkeypatch, step, *numbers):
    """The process sends itself these signals when it asks for the batch of a step (1-based)."""

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
        rf"Stopped: by SIGINT at step (\d) of 9, and saved in {re.escape(str(workdir))}: the same "
        "command goes on",
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
        "import sys, time; from etils import epath; from layermatch_jax import workdir\n"
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
            "Wait until it is done, stop it, or take another --workdir.\n"
        )
        assert not (tmp_path / "config.json").exists()
        other.kill()
    status, _, err = call(*args)  # SIGKILL has freed it
    assert status == 0, err


def test_a_full_disk_is_no_traceback(call, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "metrics.jsonl"))

    monkeypatch.setattr(metrics.Log, "_write", full)
    status, out, err = call(*SUPERVISED, f"--workdir={tmp_path}", "--config.train_steps=2")
    assert (status, out) == (1, "")
    assert err.splitlines()[-1] == (
        f"StorageError: {tmp_path}/metrics.jsonl: No space left on device. Make room; the same "
        "command goes on"
    )
    assert "Traceback" not in err


def test_no_memory_says_what_to_turn_and_the_mended_command_begins_anew(
    call, tmp_path, monkeypatch
):
    def no_memory():
        # As a GPU says it.
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
    assert f"its files are now in {tmp_path}/before-1, and this run begins anew.\n" in err
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

    # In NumPy: the loss of every step, from the checkpoint of the step before.
    config = parsed(*args[:-1])
    source = sources.load(config.dataset)
    partition = splits.partition(source, config.dataset)
    sampler = setup.create_sampler(config, partition)
    statistics = sources.channel_statistics(source.train)
    manager = ocp.CheckpointManager(tmp_path / "checkpoints")
    written = {line["step"]: line["loss"] for line in metrics.read(tmp_path)}
    kept = sorted(manager.all_steps())
    assert len(kept) >= 3  # it was a run before it diverged
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
    ends += f"The checkpoint of step {kept[-1]} is kept in {tmp_path}\n"
    assert err.endswith(f"NonFiniteLossError: {ends}")
    assert "Traceback" not in err
    assert not (tmp_path / "result.json").exists()

    # It loads, and to go on from it leads to the same end.
    status, _, err = call(*args)
    assert status == 1
    assert f"step {kept[-1]} of 20" in err
    assert err.endswith(ends)


def test_update_that_is_not_finite_is_no_checkpoint(call, tmp_path):
    # A rate beyond float32: the loss of the first step is finite, and nothing is after it.
    status, out, err = call(
        *SUPERVISED, f"--workdir={tmp_path}", "--config.train_steps=3",
        "--config.checkpoint_every=1", "--config.optimizer.learning_rate=1e39",
    )  # fmt: skip
    assert (status, out) == (1, "")
    assert err.endswith(
        "NonFiniteLossError: the update of step 1 is not finite. "
        f"No checkpoint was written yet in {tmp_path}\n"
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
    """Cuts a file off; returns what mends it."""
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
    ]  # fmt: skip

    # At the start all are found, those for the evaluation, too; nothing has been written yet.
    broken = [data / "train/b/3.png", data / "test/b/3.png", extra[7]]
    mend = [damage(path) for path in broken]
    done = call(*args)
    assert_refused(done, "InputError: 3 of 64 images cannot be decoded:\n", workdir, lines=5)
    assert [line.split(" (")[0] for line in done[2].splitlines()[1:4]] == [f"  {x}" for x in broken]
    for mend_it in mend:
        mend_it()

    # From here on images break after they were checked.
    monkeypatch.setattr(checking, "check", lambda *_: checking.Findings({}, ()))
    # An unlabelled image that is needed in the fourth step for the first time.
    config = parsed(*args[:2], *args[3:])
    partition = splits.partition(sources.load(config.dataset), config.dataset)
    sampler = setup.create_sampler(config, partition)
    first = {}
    for step in range(8):
        for index in sampler.draw(step).unlabeled.ravel():
            first.setdefault(int(index), step + 1)
    index = next(i for i, step in first.items() if step == 4 and i >= 16)
    mend = damage(extra[index - 16])  # behind the 16 training images
    status, out, err = call(*args)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith(
        f"InputError: Cannot decode the image {extra[index - 16]} ("
    )
    assert "Traceback" not in err
    # What is there is whole, and enough to go on.
    assert {p.name for p in workdir.iterdir()} == {
        ".lock", "checkpoints", "config.json", "data.json", "labeled_split.json", "metrics.jsonl",
    }  # fmt: skip
    # A line is written when the step after it is under way: the third may be missing.
    assert [line["step"] for line in metrics.read(workdir)] in ([1, 2], [1, 2, 3])
    assert json.loads((workdir / "config.json").read_text())["train_steps"] == 8
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["2"]
    mend()
    (workdir / "data.json").unlink()  # of the data set with the broken image

    # Removed instead of mended, it makes another data set.
    image = extra[index - 16].read_bytes()
    extra[index - 16].unlink()
    before = (workdir / "labeled_split.json").read_text()
    done = call(*args)
    assert_refused(done, "  num_unlabeled: 56 before, 55 now", lines=3)
    assert (workdir / "labeled_split.json").read_text() == before
    extra[index - 16].write_bytes(image)

    # A test image: met in the evaluation.
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


def test_convolutions_may_use_all_cores(call, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert call(*SUPERVISED, "--num_processes=2")[0] == 2  # refused where processes connect
    assert "=-individual_convolution" in os.environ["XLA_FLAGS"]
