"""launch/benchmark.py: the commands it runs, and its table."""

import importlib.util
import json
import pathlib
import shlex
import sys

import pytest

PATH = pathlib.Path(__file__).parents[2] / "launch" / "benchmark.py"
spec = importlib.util.spec_from_file_location("launch_benchmark", PATH)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def report(step, loop, fixmatch, share):
    rates = {"train step": step, "train step, fixmatch": fixmatch, "whole loop": loop, "input": 400}
    parts = {
        name: {
            "steps_per_second": rate,
            "images_per_second": 960.0 * rate,
            "relative_speed": rate / step,
        }
        for name, rate in rates.items()
    }
    return {
        "parts": parts,
        "program": {"peak_share": share, "compile_seconds": 21.4},
        "config": {"batch_size": 64, "unlabeled_ratio": 7, "model.name": "wide_resnet"},
        "device": {"kind": "GPU", "count": 1},
        "versions": {"jax": "1.2"},
        "git_commit": "abc",
    }


def test_a_dry_run_prints_a_command_for_each_row(tmp_path, capsys):
    status = script.main(
        [f"--workdir={tmp_path}", "--networks=WRN-28-8", "--dry-run", "--config.batch_size=8"]
    )
    assert status == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(commands) == 2 * 3
    for command in commands:
        assert command[:4] == [sys.executable, "-m", "layermatch_jax.main", "--mode=benchmark"]
        assert "--config.dataset.name=fake" in command
        assert command[-1] == "--config.batch_size=8"
    assert [c for c in commands if "--config.model.dtype=bfloat16" in c] == commands[3:]
    assert "--config.input.steps_per_call=8" in commands[1]
    assert not list(tmp_path.iterdir())


def test_what_is_not_known_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main([f"--workdir={tmp_path}", "--networks=WRN-28-2,VGG"])
    assert "unknown: VGG; allowed are: WRN-28-2, WRN-28-8" in capsys.readouterr().err


def test_the_table():
    rows = [
        ("WRN-28-2", "float32", "device", report(50, 48, 51, 0.25), 40.0),
        ("ResNet-50", "bfloat16", "tf_data", report(8, 4, 8, None), None),
    ]
    _, _, first, second, _, last = script.table(rows).splitlines()
    assert [cell.strip() for cell in first.strip("|").split("|")] == [
        "WRN-28-2", "float32", "device", "50.00", "48.00 (0.96)", "46,080", "25.0%", "1.020",
        "400.0", "21", "40.00", "1.25",
    ]  # fmt: skip
    assert [cell.strip() for cell in second.strip("|").split("|")][-2:] == ["", ""]
    assert last.startswith("1 x GPU, jax 1.2, commit abc. Steps of 64 labeled images and 7")


def test_runs_that_fail_are_told_and_survived(tmp_path, monkeypatch, capsys):
    def run(command, dry):
        folder = next(x.partition("=")[2] for x in command if x.startswith("--workdir"))
        if "bfloat16" in folder:
            return False
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        (pathlib.Path(folder) / "benchmark.json").write_text(json.dumps(report(2, 1, 2, None)))
        return True

    monkeypatch.setattr(script, "run", run)
    arguments = [f"--workdir={tmp_path}", "--networks=WRN-28-2", "--inputs=device"]
    assert script.main(arguments) == 1
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert script.main([*arguments, "--dtypes=float32"]) == 0


def test_pytorch_gets_the_same_settings(tmp_path, monkeypatch):
    commands = []

    def run(command, dry):
        commands.append(command)
        (tmp_path / "torch.json").write_text('{"steps_per_second": 3.5}')
        return True

    monkeypatch.setattr(script, "run", run)
    config = {
        "model.name": "wide_resnet", "dataset.image_size": 96, "dataset.num_classes": 10,
        "model.depth": 28, "model.widen_factor": 2, "model.stages": 4, "model.first_stride": 2,
        "model.dtype": "bfloat16", "batch_size": 64, "unlabeled_ratio": 7,
    }  # fmt: skip
    assert script.torch_step("python-with-torch", config, tmp_path / "torch.json") == 3.5
    assert commands[0][0] == "python-with-torch"
    assert set(commands[0][3:]) == {
        "--side=96", "--classes=10", "--depth=28", "--widen=2", "--stages=4", "--stride=2",
        "--dtype=bfloat16", "--batch_size=64", "--unlabeled_ratio=7",
    }  # fmt: skip
    assert script.torch_step("python", config | {"model.name": "resnet50"}, tmp_path) is None
