"""The scripts of launch/: their syntax, what they refuse, and the commands they would run."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sysconfig

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
MASK = "--config.layerwise.gradient_mask=(('classifier/.*', 0.0),)"


def call(name, *args, path=None, **environment):
    """Runs a script; returns (status, stdout, stderr)."""
    environment = os.environ | {"PATH": f"{path or ''}:{os.environ['PATH']}"} | environment
    done = subprocess.run(
        [LAUNCH / name, *args], capture_output=True, text=True, timeout=60, env=environment
    )
    return done.returncode, done.stdout, done.stderr


def commands(out):
    """Returns the output of a dry run as lists of words."""
    return [shlex.split(line) for line in out.splitlines() if not line.startswith("#")]


def test_these_are_the_scripts():
    names = [script.name for script in SCRIPTS]
    assert names == ["local.sh", "slurm.sbatch", "tpu_pod.sh", "tpu_worker.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_strict_executable_and_clean(script):
    assert os.access(script, os.X_OK)
    code = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert code[0] == "set -euo pipefail"
    subprocess.run(["bash", "-n", script], check=True)
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    subprocess.run([shutil.which("shellcheck", path=path), script], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_help_and_mistakes(script):
    status, out, err = call(script.name, "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: ")
    status, out, err = call(script.name, "nonsense")
    assert (status, out) == (2, "")
    assert "nonsense" in err.splitlines()[0]
    assert "usage: " in err


# ------------------------------------------------------------------------------------------ local


def test_local_starts_one_process_or_several():
    status, out, _ = call("local.sh", "--dry-run", "--config=c.py", MASK)
    main = ["python", "-m", "layermatch_jax.main", "--config=c.py", MASK]
    assert (status, commands(out)) == (0, [main])
    status, out, _ = call(
        "local.sh", "--dry-run", "--processes=2", "--port=99", "--config=c.py", MASK
    )
    common = ["--coordinator=localhost:99", "--num_processes=2"]
    assert commands(out) == [[*main, *common, f"--process_id={k}"] for k in (0, 1)]


@pytest.mark.parametrize("flag", ["--processes=0", "--processes=two", "--port=x"])
def test_local_refuses(flag):
    status, out, err = call("local.sh", flag)
    assert (status, out) == (2, "")
    assert flag in err


@pytest.fixture
def fake(tmp_path):
    """Writes a command that prints its arguments to a folder for PATH."""

    def write(name, body=""):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"{tmp_path}/calls"\n{body}\n')
        path.chmod(0o755)

    write.path = tmp_path / "bin"
    write.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    return write


def test_local_passes_on_status_and_signals(fake, tmp_path):
    fake("main", 'case "$*" in *process_id=1*) exit 3 ;; esac')
    status, _, _ = call("local.sh", "--processes=2", "--config=c.py", path=fake.path, PYTHON="main")
    assert status == 3
    assert len(fake.calls()) == 2

    fake(
        "waits",
        f'trap "echo saved >>{tmp_path}/saved; exit 0" TERM\n'
        f"echo ready >>{tmp_path}/ready\nfor i in $(seq 600); do sleep 0.1; done; exit 1",
    )
    environment = os.environ | {"PATH": f"{fake.path}:{os.environ['PATH']}", "PYTHON": "waits"}
    script = subprocess.Popen(
        [LAUNCH / "local.sh", "--processes=2", "--config=c.py"], env=environment
    )
    while not (tmp_path / "ready").exists() or len((tmp_path / "ready").read_text()) < 12:
        assert script.poll() is None
    script.terminate()
    assert script.wait(30) == 0
    assert (tmp_path / "saved").read_text() == "saved\nsaved\n"


# ------------------------------------------------------------------------------------------ slurm


def test_slurm_runs_main_on_all_tasks():
    flags = ["--workdir=runs/a b", "--config=c.py", MASK]
    status, out, _ = call("slurm.sbatch", "--dry-run", *flags, SLURM_CPUS_PER_TASK="8")
    assert status == 0
    assert commands(out) == [
        ["srun", "--kill-on-bad-exit=1", "--cpus-per-task=8", "python", "-m",
         "layermatch_jax.main", "--workdir=runs/a b", "--config=c.py", MASK]
    ]  # fmt: skip


def test_slurm_is_told_to_warn_and_requeue():
    options = [
        line.removeprefix("#SBATCH ")
        for line in (LAUNCH / "slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH")
    ]
    assert {"--signal=TERM@120", "--requeue", "--open-mode=append"} <= set(options)


def test_slurm_array_takes_its_line(tmp_path):
    lines = [shlex.join([f"--workdir=runs/{k}", "--config=c.py", MASK]) for k in (1, 2)]
    (tmp_path / "commands.txt").write_text("\n".join(lines) + "\n")
    flag = f"--commands={tmp_path}/commands.txt"
    status, out, _ = call("slurm.sbatch", "--dry-run", flag, SLURM_ARRAY_TASK_ID="2")
    assert status == 0
    assert commands(out)[0][6:] == ["--workdir=runs/2", "--config=c.py", MASK]
    status, _, err = call("slurm.sbatch", "--dry-run", flag, SLURM_ARRAY_TASK_ID="3")
    assert (status, "has no line 3" in err) == (2, True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config=c.py"], "--workdir=FOLDER is missing"),
        (["--workdir=gs://b/x"], "must be a local folder"),
        (["--commands=nowhere"], "--commands=nowhere cannot be read"),
        (["--commands=nowhere", "--config=c.py"], "takes no other flags"),
        (["--workdir=x", "--mode", "benchmark"], "--mode needs its value in the same word"),
        (["--workdir", "x"], "--workdir needs its value in the same word"),
        (["--workdir=x", "-mode=benchmark"], "unexpected argument '-mode=benchmark'"),
        (["--mode=train", "--config=c.py"], "--workdir=FOLDER is missing"),
    ],
)
def test_slurm_refuses(args, message):
    status, out, err = call("slurm.sbatch", *args)
    assert (status, out) == (2, "")
    assert message in err


def test_slurm_queues_again_what_is_unfinished_and_did_not_fail(fake, tmp_path):
    args = (f"--workdir={tmp_path}/run", "--config=c.py")
    slurm = {"path": fake.path, "SLURM_JOB_ID": "77", "HOME": str(tmp_path)}
    fake("scontrol")
    for step in (20, 40):  # each start saves a checkpoint
        fake("srun", f"mkdir -p {tmp_path}/run/checkpoints/{step}")
        assert call("slurm.sbatch", *args, **slurm)[0] == 0
        assert fake.calls()[-1] == "scontrol requeue 77"
    fake("srun", f"mkdir {tmp_path}/run/checkpoints/60; exit 1")
    assert call("slurm.sbatch", *args, **slurm)[0] == 1
    assert fake.calls()[-1].startswith("srun ")
    fake("srun", f"mkdir {tmp_path}/run/checkpoints/80; touch {tmp_path}/run/result.json")
    assert call("slurm.sbatch", "--workdir=~/run", **slurm)[0] == 0
    assert fake.calls()[-1].startswith("srun ")


def test_slurm_does_not_queue_again_what_would_never_end(fake, tmp_path):
    """Other modes write no result.json; a start that trains no step neither."""
    slurm = {"path": fake.path, "SLURM_JOB_ID": "77"}
    fake("scontrol")
    fake("srun", f"mkdir -p {tmp_path}/run/checkpoints/20")
    for flags in (
        [f"--workdir={tmp_path}/run", "--mode=benchmark"],
        ["--mode=report", f"--workdir={tmp_path}/run,{tmp_path}/other"],
        ["--mode=benchmark", "--config=c.py"],  # in the default folder
        ["--mode=report", "--workdir=gs://bucket/run"],
    ):
        assert call("slurm.sbatch", *flags, **slurm)[0] == 0
    (tmp_path / "commands").write_text(f"--workdir={tmp_path}/x --mode=layer_report\n")
    array = slurm | {"SLURM_ARRAY_TASK_ID": "1"}
    assert call("slurm.sbatch", f"--commands={tmp_path}/commands", **array)[0] == 0
    assert [line.split()[0] for line in fake.calls()] == ["srun"] * 5
    status, _, err = call("slurm.sbatch", f"--workdir={tmp_path}/run", "--flagfile=f", **slurm)
    assert status == 1
    assert f"no result.json and no new checkpoint in {tmp_path}/run: not queued again" in err
    assert [line.split()[0] for line in fake.calls()] == ["srun"] * 6


# -------------------------------------------------------------------------------------------- tpu

ZONE = "--zone=us-central2-b"
TYPE = ["--type=v4-32", "--version=tpu-ubuntu2204-base"]
RUN = ["--", "--config=c.py", MASK, "--workdir=gs://bucket/run"]
GCLOUD = ["gcloud", "compute", "tpus", "tpu-vm"]


def pod(*args):
    status, out, err = (
        call("tpu_pod.sh", *args, "--dry-run")
        if "--" not in args
        else call("tpu_pod.sh", *args[: args.index("--")], "--dry-run", *args[args.index("--") :])
    )
    assert status == 0, err
    return commands(out)


def test_tpu_create_and_delete():
    made = ["create", "pod1", "--accelerator-type=v4-32", "--version=tpu-ubuntu2204-base"]
    assert pod("create", "pod1", ZONE, *TYPE) == [[*GCLOUD, *made, ZONE]]
    assert pod("create", "pod1", "--project=p", ZONE, *TYPE, "--spot") == [
        [*GCLOUD, *made, "--spot", "--project=p", ZONE]
    ]
    assert pod("delete", "pod1", ZONE) == [[*GCLOUD, "delete", "pod1", "--quiet", ZONE]]


def on_worker(command):
    """Returns the words of the command that the workers get."""
    (line,) = [word for word in command if word.startswith("--command=")]
    return shlex.split(line.removeprefix("--command="))


def test_tpu_setup_reaches_all_workers():
    archive, copy, unpack, install = pod("setup", "pod1", ZONE)
    assert archive[:2] == ["git", "archive"]
    assert archive[2].removeprefix("--output=") in copy
    assert on_worker(unpack) == ["tar", "-xzf", "layermatch.tar.gz"]
    assert on_worker(install) == ["layermatch/launch/tpu_worker.sh", "setup"]
    for command in (copy, unpack, install):
        assert command[:4] == GCLOUD
        assert "--worker=all" in command


def test_tpu_run_passes_flags_on_unchanged():
    (start,) = pod("run", "pod1", ZONE, *RUN)
    assert start[:6] == [*GCLOUD, "ssh", "pod1"]
    assert "--worker=all" in start
    worker, *words = on_worker(start)
    assert (worker, words) == ("layermatch/launch/tpu_worker.sh", ["start", *RUN[1:]])
    status, out, _ = call("tpu_worker.sh", "--dry-run", *words)
    assert status == 0
    assert commands(out) == [[".venv/bin/python", "-m", "layermatch_jax.main", *RUN[1:]]]


def test_tpu_logs_status_stop():
    (logs,) = pod("logs", "pod1", ZONE)
    assert ("--worker=0" in logs, on_worker(logs)[1:]) == (True, ["logs"])
    state, run = pod("status", "pod1", ZONE)
    assert state == [*GCLOUD, "describe", "pod1", "--format=value(state)", ZONE]
    assert ("--worker=all" in run, on_worker(run)[1:]) == (True, ["status"])
    (stop,) = pod("stop", "pod1", ZONE)
    assert ("--worker=all" in stop, on_worker(stop)[1:]) == (True, ["stop"])


def test_tpu_keep_prints_all_of_it():
    printed = pod("keep", "pod1", ZONE, *TYPE, "--spot", *RUN)
    assert [command[4] if command[0] == "gcloud" else command[1] for command in printed] == [
        "create", "archive", "scp", "ssh", "ssh", "ssh", "describe", "ssh", "delete",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["create", "Pod_1", ZONE, *TYPE], "NAME 'Pod_1'"),
        (["create", "pod1", *TYPE], "--zone=ZONE is missing"),
        (["create", "pod1", ZONE, TYPE[1]], "create needs --type=TYPE"),
        (["create", "pod1", ZONE, TYPE[0]], "create needs --version=VERSION"),
        (["create", "pod1", ZONE, *TYPE, "--cheap"], "unknown option '--cheap'"),
        (["run", "pod1", ZONE, "--", "--config=c.py"], "run needs -- --workdir=gs://"),
        (["run", "pod1", ZONE, "--", "--workdir=runs/x"], "run needs -- --workdir=gs://"),
        (["logs", "pod1", ZONE, *RUN], "logs takes no FLAGS"),
    ],
)
def test_tpu_refuses(args, message):
    status, out, err = call("tpu_pod.sh", *args)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[0]


def test_tpu_keep_makes_a_preempted_slice_again(fake, tmp_path):
    """gcloud reports a spot slice: absent, created, preempted, created again, finished."""
    states = [
        "NOT_FOUND",
        "CREATING",
        "READY",
        "UNAVAILABLE",
        "READY",
        "PREEMPTED",
        "NOT_FOUND",
        "READY",
        "READY",
    ]
    outcomes = ["none", "running", "none", "finished"]
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    (tmp_path / "outcomes").write_text("\n".join(outcomes) + "\n")
    fake("sleep")
    fake(
        "gcloud",
        f"""
next() {{ head -n 1 "$1"; sed -i 1d "$1"; }}
case "$*" in
  *describe*)
    state="$(next {tmp_path}/states)"
    echo 'WARNING: a new version is there' >&2
    case "$state" in NOT_FOUND | UNAVAILABLE) echo "ERROR: $state" >&2; exit 1 ;; esac
    echo "$state" ;;
  *status*) next {tmp_path}/outcomes ;;
esac""",
    )
    status, _, err = call("tpu_pod.sh", "keep", "pod1", ZONE, *TYPE, "--spot", *RUN, path=fake.path)
    assert status == 0, err
    verbs = [
        "start" if "'start'" in line else line.split()[4]
        for line in fake.calls()
        if line.startswith("gcloud")
        and ("'start'" in line or " create " in line or " delete " in line)
    ]
    assert verbs == ["create", "start", "delete", "create", "start", "delete"]
    assert not (tmp_path / "states").read_text()


@pytest.fixture
def worker(tmp_path):
    """Calls tpu_worker.sh in a checkout whose Python is a script, set by worker.program(text)."""
    checkout = tmp_path / "layermatch"
    shutil.copytree(LAUNCH, checkout / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)

    def call(*args):
        done = subprocess.run(
            [checkout / "launch" / "tpu_worker.sh", *args],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    def ended():
        while (state := call("status")) == "running":
            pass
        return state

    def program(body):
        python.write_text(f"#!/usr/bin/env bash\n{body}\n")
        python.chmod(0o755)

    call.ended, call.program, call.checkout = ended, program, checkout
    return call


def test_tpu_worker_keeps_one_run_and_its_outcome(worker, tmp_path):
    assert worker("status") == "none"
    worker.program(f"until [ -e {tmp_path}/go ]; do sleep 0.1; done")
    assert worker("start", "--config=c.py") == ""
    assert worker("status") == "running"
    assert worker("start", "--config=c.py") == "runs already"
    (tmp_path / "go").touch()
    assert worker.ended() == "finished"
    worker.program("echo 'Stopped: by SIGTERM' >&2")
    worker("start", "--config=c.py")
    assert worker.ended() == "stopped"
    worker.program("exit 1")
    worker("start", "--config=c.py")
    assert worker.ended() == "failed 1"


def test_tpu_worker_stops_its_own_run_and_no_other(worker, tmp_path):
    """It stops no process with the same name, or with the process id of an ended run."""
    assert worker("stop") == "nothing runs"
    other = subprocess.Popen(["bash", "-c", "exec -a layermatch_jax.main sleep 60"])
    try:
        worker.program(
            f"trap 'echo saved >>{tmp_path}/saved; echo \"Stopped: by SIGTERM\"; exit 0' TERM\n"
            f"touch {tmp_path}/ready; for i in $(seq 600); do sleep 0.1; done"
        )
        worker("start", "--config=c.py")
        while not (tmp_path / "ready").exists():
            assert worker("status") == "running"
        worker("stop")
        assert worker.ended() == "stopped"
        assert (tmp_path / "saved").read_text() == "saved\n"
        assert worker("stop") == "nothing runs"
        (worker.checkout / "run.pid").write_text(f"{other.pid}\n")
        assert (worker("status"), worker("stop")) == ("stopped", "nothing runs")
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
