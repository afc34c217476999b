"""The sweep: which runs it starts and skips, failed runs, and its files."""

import csv
import hashlib
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags

from layermatch_jax import automatic, main
from layermatch_jax.after import drawing
from layermatch_jax.runtime import workdir
from layermatch_jax.sweep import command
from layermatch_jax.sweep import grid as grid_lib

ROOT = pathlib.Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "digits.py")

# Replaces layermatch_jax.main: writes the accuracies of scores.json; 'crash' makes the run fail.
PROGRAM = """
import json, os, pathlib, sys, time
flags = dict(arg.lstrip("-").split("=", 1) for arg in sys.argv[1:])
folder = pathlib.Path(flags["workdir"])
with (folder.parent / "calls.txt").open("a") as file:
    file.write(folder.name + "\\n")
score = json.loads((folder.parent / "scores.json").read_text())[folder.name]
if score == "nothing":
    sys.exit()
if score == "sleep":
    (folder / "asleep").write_text(str(os.getpid()))
    time.sleep(100)
if score == "crash":
    print("step 1")
    print("ValueError: out of paper\\n")
    sys.exit(7)
accuracies = {"last": score, "median20": score, "best": score}
lines = [{"split": "train", "step": 10}]
for step, accuracy in ((10, score / 2), (100, score)):
    lines.append({"split": "test", "step": step, "accuracy_ema": accuracy})
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
(folder / "result.json").write_text(json.dumps({
    "dataset": "digits", "num_labels": 40, "train_steps": 100,
    "test_accuracy": {"ema": accuracies, "raw": {}},
    "mask_rate": 0.5, "pseudo_label_accuracy": None, "pseudo_label_accuracy_all": 0.75,
    "wall_seconds": 2.0, "device": {"kind": "abacus", "count": 2},
    "versions": {"jax": "1.2"}, "git_commit": "abc",
}))
"""


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """A function that sets the accuracies, runs a sweep in a folder and returns its exit status."""
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(grid_lib, "PROGRAM", [sys.executable, str(tmp_path / "program.py")])

    def run(scores, *arguments):
        (tmp_path / "scores.json").write_text(json.dumps(scores))
        (tmp_path / "calls.txt").write_text("")
        return command.main(
            [f"{DIGITS}:labels=40", "--methods=fixmatch,freematch+layerwise", "--label-seeds=0,1,2",
             f"--workdir={tmp_path}", *arguments]
        )  # fmt: skip

    run.folder = tmp_path
    run.calls = lambda: sorted((tmp_path / "calls.txt").read_text().split())
    return run


FIXMATCH = {"fixmatch-l0": 0.5, "fixmatch-l1": 0.6, "fixmatch-l2": 0.7}
FREEMATCH = {f"freematch+layerwise-l{seed}": 0.6 + 0.15 * seed for seed in range(3)}  # .6 .75 .9


def test_a_failing_run_is_survived_reported_and_made_up_for(grid, capsys):
    scores = FIXMATCH | FREEMATCH | {"fixmatch-l1": "crash"}
    assert grid(scores, "--jobs=2") == 1
    assert grid.calls() == sorted(scores)
    out, err = capsys.readouterr()
    assert "FAILED: fixmatch, label seed 1: exit status 7, ValueError: out of paper" in err
    assert str(grid.folder / "fixmatch-l1" / "log.txt") in err
    assert "6 runs: 0 finished, 6 to do, 2 at a time" in out
    assert out.count("% ") == 5
    assert "6/6" in out
    assert "| `fixmatch` | none | none | 2 |" in (grid.folder / "table.md").read_text()

    # The second time, only the missing runs are made.
    assert grid(FIXMATCH | FREEMATCH) == 0
    assert grid.calls() == ["fixmatch-l1"]
    out, err = capsys.readouterr()
    assert "FAILED" not in err
    assert "6 runs: 5 finished, 1 to do" in out
    assert "| `fixmatch` | none | none | 3 |" in (grid.folder / "table.md").read_text()


def test_the_table(grid):
    assert grid(FIXMATCH | FREEMATCH) == 0
    # 50, 60, 70: deviation 10. 60, 75, 90: 15. Differences 10, 15, 20: 5, by √3 seeds 2.887.
    # After a tenth of the steps, the accuracies are half of these.
    head, _, fixmatch, freematch, _, legend, provenance = (
        (grid.folder / "table.md").read_text().split("\n")[:7]
    )
    assert legend.startswith("Accuracy of the EMA parameters on test images, %")
    assert head == (
        "| method | mask | centers | n | median20 | − fixmatch | last | best | a tenth "
        "| − fixmatch | used | used right | all right | − fixmatch | seconds |"
    )
    assert fixmatch == (
        "| `fixmatch` | none | none | 3 | 60.0 ± 10.0 |  | 60.0 ± 10.0 | 60.0 ± 10.0 "
        "| 30.0 ± 5.0 |  | 50.0 ± 0.0 |  | 75.0 ± 0.0 |  | 2.0 ± 0.0 |"
    )
    assert freematch == (
        "| `freematch+layerwise` | classifier | classifier | 3 | 75.0 ± 15.0 | +15.0 ± 2.9 "
        "| 75.0 ± 15.0 | 75.0 ± 15.0 | 37.5 ± 7.5 | +7.5 ± 1.4 "
        "| 50.0 ± 0.0 |  | 75.0 ± 0.0 | +0.0 ± 0.0 | 2.0 ± 0.0 |"
    )
    assert provenance == (
        "6 of 6 runs. Data: digits, 40 labels; steps: 100; device: 2 x abacus; jax 1.2; commit abc."
    )
    with (grid.folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["fixmatch", "freematch+layerwise"]
    assert [(row["mask"], row["centers"]) for row in rows] == [("none",) * 2, ("classifier",) * 2]
    assert float(rows[1]["median20"]) == pytest.approx(75)
    assert float(rows[1]["median20, standard deviation"]) == pytest.approx(15)
    assert float(rows[1]["median20 − fixmatch, standard error"]) == pytest.approx(5 / 3**0.5)
    assert rows[1]["median20 − fixmatch, n"] == "3"
    assert rows[0]["used right"] == ""


def test_a_table_says_why_accuracies_of_pseudo_labels_are_missing(grid):
    assert grid(FIXMATCH | FREEMATCH) == 0
    for path in grid.folder.glob("*/result.json"):
        unknown = json.loads(path.read_text()) | {"pseudo_label_accuracy_all": None}
        path.write_text(json.dumps(unknown))
    assert grid(FIXMATCH | FREEMATCH) == 0
    assert (
        "\nAccuracies of pseudo-labels are missing where no unlabeled image has a known class "
        "(labeled images do not count).\n6 of 6 runs."
    ) in (grid.folder / "table.md").read_text()


def test_masks_are_rows(grid, capsys):
    rows = ("fixmatch", "fixmatch+mask=from_stage3")
    scores = {f"{row}-l{seed}": 0.5 + 0.1 * i for i, row in enumerate(rows) for seed in range(2)}
    arguments = ["--methods=fixmatch", "--masks=none,from_stage3", "--label-seeds=0,1"]
    assert grid({}, *arguments, "--dry-run") == 0
    told = [shlex.split(line)[-4:-2] for line in capsys.readouterr().out.splitlines()]
    assert told[1] == [
        f"--config={DIGITS}:labels=40,method=fixmatch,mask=from_stage3",
        f"--workdir={grid.folder}/fixmatch+mask=from_stage3-l0",
    ]
    assert grid(scores, *arguments) == 0
    assert grid.calls() == sorted(scores)
    lines = (grid.folder / "table.md").read_text().split("\n")
    assert "− fixmatch |" in lines[0]
    assert lines[2].startswith("| `fixmatch` | none | none | 2 | 50.0 ± 0.0 |  |")
    assert lines[3].startswith(
        "| `fixmatch+mask=from_stage3` | from_stage3 | none | 2 | 60.0 ± 0.0 | +10.0 ± 0.0 |"
    )


def test_the_figure_needs_matplotlib_and_the_table_does_not(grid, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # not installed
    assert grid(FIXMATCH | FREEMATCH) == 0
    assert capsys.readouterr().err == (
        "comparison.png is not drawn: figures need matplotlib: pip install matplotlib\n"
    )
    assert (
        "| `fixmatch` | none | none | 3 | 60.0 ± 10.0 |" in (grid.folder / "table.md").read_text()
    )
    assert not (grid.folder / "comparison.png").exists()


def test_the_figure(grid, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    comparison = drawing.comparison
    monkeypatch.setattr(
        drawing, "comparison", lambda *x, **y: drawn.append(comparison(*x, **y)) or drawn[-1]
    )
    # The third run of freematch+layerwise is missing.
    assert grid(FIXMATCH | FREEMATCH | {"freematch+layerwise-l2": "crash"}) == 1
    assert drawn[0].get_suptitle() == "digits, 40 labels; steps: 100"
    accuracies, differences = drawn[0].axes
    assert [text.get_text() for text in accuracies.get_yticklabels()] == [
        "fixmatch",
        "freematch+layerwise",
    ]
    # For each row the points of the seeds, then the mean; only the second row has differences.
    drawn_at = [list(line.get_xdata()) for line in accuracies.lines if line.get_marker() in "oD"]
    assert drawn_at == [pytest.approx(x) for x in ([50, 60, 70], [60], [60, 75], [67.5])]
    drawn_at = [list(line.get_xdata()) for line in differences.lines if line.get_marker() in "oD"]
    assert drawn_at == [pytest.approx(x) for x in ([10, 15], [12.5])]
    spreads = [*accuracies.collections, *differences.collections]
    spreads = [np.diff(bars.get_segments()[0][:, 0]) / 2 for bars in spreads]
    # Standard deviations of 50, 60, 70 and of 60, 75; standard error of 10, 15.
    assert np.ravel(spreads) == pytest.approx([10, 15 / 2**0.5, 2.5])
    assert (grid.folder / "comparison.png").stat().st_size > 10_000


def test_a_pair_needs_both_and_a_tenth_an_evaluation_near_it(grid):
    grid(FIXMATCH | FREEMATCH | {"fixmatch-l0": "crash", "fixmatch-l2": "crash"})
    metrics = grid.folder / "freematch+layerwise-l1" / "metrics.jsonl"
    metrics.write_text('{"split": "test", "step": 100, "accuracy_ema": 0.75}\n')
    grid(FIXMATCH | FREEMATCH | {"fixmatch-l0": "crash", "fixmatch-l2": "crash"})
    freematch = (grid.folder / "table.md").read_text().split("\n")[3].split(" | ")
    # Only seed 1 has both rows: 75 − 60. At a tenth, seeds 0 and 2 remain, 30 and 45.
    assert freematch[3:6] == ["3", "75.0 ± 15.0", "+15.0 (n = 1)"]
    assert freematch[8:10] == ["37.5 ± 10.6 (n = 2)", ""]


def test_a_run_that_ends_well_without_a_result_has_failed(grid, capsys):
    assert grid(FIXMATCH | FREEMATCH | {"fixmatch-l1": "nothing"}) == 1
    out, err = capsys.readouterr()
    assert "fixmatch, label seed 1: FAILED, exit status 0" in out
    assert "FAILED: fixmatch, label seed 1: exit status 0, no output" in err


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_leaves_no_run_behind_and_goes_on(ending, grid):
    scores = FIXMATCH | FREEMATCH | {"fixmatch-l1": "sleep"}
    (grid.folder / "scores.json").write_text(json.dumps(scores))
    script = (
        "import signal, sys\n"
        # Background jobs of a shell, and their children, ignore Ctrl-C.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from layermatch_jax.sweep import command, grid\n"
        f"grid.PROGRAM = {grid_lib.PROGRAM!r}\n"
        f"command.main([{DIGITS!r}, '--methods=fixmatch', '--label-seeds=0,1,2', "
        f"'--workdir={grid.folder}'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    asleep = grid.folder / "fixmatch-l1" / "asleep"
    deadline = time.monotonic() + 60
    while not (asleep.exists() and asleep.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(ending)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped; run the same command again to resume" in err
    while alive(int(asleep.read_text())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(int(asleep.read_text()))
    assert grid(FIXMATCH | FREEMATCH, "--methods=fixmatch") == 0
    assert grid.calls() == ["fixmatch-l1", "fixmatch-l2"]


def test_a_dry_run_prints_the_commands_of_what_is_not_finished(grid, capsys):
    grid(FIXMATCH | {name: "crash" for name in FREEMATCH})
    capsys.readouterr()
    assert grid(FIXMATCH | FREEMATCH, "--dry-run", "--config.train_steps=7") == 0
    assert grid.calls() == []
    out, err = capsys.readouterr()
    commands = out.splitlines()
    assert len(commands) == 3
    assert commands[2].endswith(
        f"--config={DIGITS}:labels=40,method=freematch+layerwise "
        f"--workdir={grid.folder}/freematch+layerwise-l2 --config.seed=2 "
        "--config.dataset.label_seed=2 --config.train_steps=7"
    )
    assert err == "3 runs to do, 3 finished\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods=fixmatch,freemach"], "Did you mean 'freematch'?"),
        (
            ["--methods=fixmatch,freematch+adamatch"],
            "only +layerwise, +grad_relu, +avg_clustering can",
        ),
        (["--methods=supervised+layerwise"], "no unsupervised gradient"),
        (
            ["--methods=mean_teacher", "--config.avg_clustering.centers=outputs"],
            "targets from the EMA",
        ),
        (["--methods=fixmatch,fixmatch"], "twice: fixmatch and fixmatch are both fixmatch. Leave"),
        (
            ["--methods=layermatch,fixmatch+layerwise"],
            "twice: layermatch and fixmatch+layerwise are both layermatch",
        ),
        (
            ["--methods=grad_relu,fixmatch", "--masks=none,classifier"],
            "twice: grad_relu with mask none and fixmatch with mask none are both fixmatch",
        ),
        (
            ["--methods=fixmatch,grad_relu", "--config.layerwise.gradient_mask=()"],
            "twice: fixmatch and grad_relu are both fixmatch",
        ),
        (["--label-seeds=0,x"], "write whole numbers, as in 0,1,2"),
        (["--baseline=dash"], "--baseline=dash is not among the rows: fixmatch, freematch+layerw"),
        (
            ["--masks=none,clasifier"],
            "unknown gradient mask 'clasifier'. Did you mean 'classifier'",
        ),
        (["--masks=from_stage3,from_stage4"], "'backbone/stage4.*' matches no parameter"),
        (["--label-seeds=0,1,0"], "--label-seeds=0,1,0: a seed is given twice"),
        (["--masks=none,none"], "fixmatch with mask none are both fixmatch"),
        (
            ["--masks=from_stage3", "--baseline=fixmatch"],
            "rows: fixmatch+mask=from_stage3, freematch+mask=from_stage3+avg_clustering",
        ),
        (["--jobs=0"], "--jobs=0 must be at least 1"),
        (["--workdir=gs://bucket/runs"], "give a local folder"),
        (["--config.seed=3"], "--config.seed=3: give the config as CONFIG and the seeds"),
        (["--config.dataset.label_seed=3"], "give the config as CONFIG"),
        ([f"--config={DIGITS}:method=dash"], "give the config as CONFIG"),
        (["--config.policy.threshold=2"], "must be at least 0 and at most 1"),
        (["--config.policy.thresold=0.5"], "Did you mean 'policy.threshold'?"),
        (["--nonsense=1"], "nonsense"),
        (["more"], "unexpected argument 'more'"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_the_first_run(arguments, message, grid, capsys):
    try:
        status = grid(FIXMATCH | FREEMATCH, *arguments)
    except SystemExit as end:  # the parser of main exits
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert grid.calls() == []


def test_layerwise_of_the_config_is_in_the_name(tmp_path, capsys):
    status = command.main(
        [f"{DIGITS}:layerwise=True", "--methods=dash", "--label-seeds=0", f"--workdir={tmp_path}",
         "--dry-run"]
    )  # fmt: skip
    assert status == 0
    assert f"--workdir={tmp_path}/dash+layerwise-l0" in capsys.readouterr().out


def test_a_folder_with_other_settings_is_refused(grid, capsys):
    values = flags.FlagValues()
    main.parse_flags(["main", f"--config={DIGITS}:labels=40,method=fixmatch"], values)
    values.config.policy.threshold = 0.5
    config = automatic.resolve(values.config)
    (grid.folder / "fixmatch-l0" / "checkpoints" / "5").mkdir(parents=True)
    workdir.write_config(grid.folder / "fixmatch-l0", config)
    assert grid(FIXMATCH | FREEMATCH) == 2
    assert "policy.threshold: 0.5 before, 0.95 now" in capsys.readouterr().err
    assert grid.calls() == []


def test_real_runs(tmp_path, capsys):
    tiny = ["dataset.name=fake", "dataset.stored_size=8", "dataset.image_size=8", "train_steps=4"]
    tiny += ["dataset.padding=1", "model.name=linear", "model.width=4", "batch_size=8"]
    tiny += ["eval_batch_size=64", "eval_every=2", "tensorboard=False"]
    status = command.main(
        [DIGITS, "--methods=dash,softmatch+layerwise", "--label-seeds=3", f"--workdir={tmp_path}",
         "--jobs=2", *(f"--config.{field}" for field in tiny)]
    )  # fmt: skip
    assert status == 0, (tmp_path / "dash-l3" / "log.txt").read_text()
    result = json.loads((tmp_path / "softmatch+layerwise-l3" / "result.json").read_text())
    assert tuple(result[name] for name in ("method", "seed", "label_seed")) == (
        "softmatch+layerwise",
        3,
        3,
    )
    config = json.loads((tmp_path / "softmatch+layerwise-l3" / "config.json").read_text())
    assert config["layerwise.gradient_mask"] == [["classifier/.*", 0.0]]
    assert config["avg_clustering.centers"] == "classifier"
    median = 100 * result["test_accuracy"]["ema"]["median20"]
    row = f"| `softmatch+layerwise` | classifier | classifier | 1 | {median:.1f} |"
    assert row in capsys.readouterr().out


def test_the_grid_as_a_slurm_array_job(grid, capsys, monkeypatch):
    options = "--time=4:00:00 --partition=gpu"
    array = [
        "sbatch", "--array=1-5%2", f"--chdir={ROOT}", "--time=4:00:00", "--partition=gpu",
        f"{ROOT}/launch/slurm.sbatch",
    ]  # fmt: skip
    crashing = {name: "crash" for name in [*FREEMATCH, "fixmatch-l1", "fixmatch-l2"]}
    grid(FIXMATCH | FREEMATCH | crashing)
    capsys.readouterr()
    assert grid({}, f"--slurm={options}", "--jobs=2", "--dry-run") == 0
    first, file, *listed = capsys.readouterr().out.splitlines()
    sha256 = hashlib.sha256("".join(f"{line}\n" for line in listed).encode()).hexdigest()
    commands = grid.folder / f"commands-{sha256[:8]}.txt"  # a waiting array keeps its own file
    assert file == f"{commands}:"
    array.append(f"--commands={commands}")
    assert shlex.split(first) == array
    assert len(listed) == 5
    assert not commands.exists()

    submitted = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: submitted.append(command) or done)
    assert grid({}, f"--slurm={options}", "--jobs=2") == 0
    assert submitted == [array]
    assert grid.calls() == []
    lines = commands.read_text().splitlines()
    assert lines == listed
    assert shlex.split(lines[0])[:2] == [
        f"--config={DIGITS}:labels=40,method=freematch+layerwise",
        f"--workdir={grid.folder}/freematch+layerwise-l0",
    ]
