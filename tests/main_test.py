"""The command line: its flags, and what it refuses."""

import importlib.util
import os
import time

import pytest
from command_line import DIGITS, ROOT, SUPERVISED, TINY, assert_refused, parsed, started

from layermatch_jax import config as config_lib


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
    # A setting of a config file can be undone.
    assert (
        config_lib.fields(parsed(f"--config.{field}=0.5", f"--config.{field}=None"))[field] is None
    )


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
        (["--config.dataset.name=cifar100"], "Give a config, too: --config=cifar100. To use"),
        (["--config.dataset.class_list=None"], "class_list=None: this setting is never automatic"),
        (["--config.batch_size=abc"], "--config.batch_size=abc: invalid literal for int()"),
        (["--config.batch_size=2.5"], "--config.batch_size=2.5: invalid literal for int()"),
        (["--config.dataset.flip=maybe"], "--config.dataset.flip=maybe: "),
        (["--config.seed=1", f"--config={DIGITS}"], "--config.seed=1 in argv before a value for"),
        (["--confg=x"], "Unknown command line flag 'confg'. Did you mean: config"),
        (
            ["--workdir=http://host/run"],
            "--workdir=http://host/run: give a local folder, or gs://BUCKET/PATH",
        ),
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


# ---- Settings and data that are refused ----


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
        (["--config.policy.threshold=1.5"], "threshold=1.5 must be at least 0 and at most 1"),
        (["--config.train_steps=0"], "train_steps=0 must be at least 1"),
        (["--config.layerwise.gradient_mask=classifier"], "write (regular expression, multiplier)"),
        (["--config.layerwise.gradient_mask=(('(', 0.0),)"], "'(' is not a regular expression"),
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
        assert_refused(done, f"{tmp_path / 'file'} is not a writable folder")
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


def test_convolutions_may_use_all_cores(call, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert call(*SUPERVISED, "--num_processes=2")[0] == 2  # refused where processes connect
    assert "=-individual_convolution" in os.environ["XLA_FLAGS"]
