"""Runs a grid of methods and label seeds, and puts the results into one table.

    python launch/sweep.py configs/digits.py:labels=10 --methods=fixmatch,layermatch \
        --label-seeds=0,1,2 --workdir=runs/digits10 --jobs=2 --config.policy.threshold=0.6

Each run has seed = label seed, so that methods are compared on the same labels, order and draws.
Finished runs are skipped, unfinished ones go on. Flags it does not know go to every run.
"""

import argparse
import concurrent.futures
import json
import pathlib
import statistics
import subprocess
import sys


def main() -> int:
    """Returns 0, or 1 if a run failed (the others are finished first)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="as for layermatch_jax.main, without method=")
    parser.add_argument("--methods", required=True, help="comma-separated")
    parser.add_argument("--label-seeds", required=True, help="comma-separated")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--baseline", default="fixmatch", help="what the others are compared to")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args, extra = parser.parse_known_args()

    methods, seeds = args.methods.split(","), [int(s) for s in args.label_seeds.split(",")]
    grid = [(method, seed) for seed in seeds for method in methods]
    failed = []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = {
            pool.submit(run, args, method, seed, extra): (method, seed) for method, seed in grid
        }
        for done, future in enumerate(concurrent.futures.as_completed(runs), 1):
            method, seed = runs[future]
            status = future.result()
            if status:
                failed.append(f"{method}, label seed {seed}: exit status {status}")
            print(f"{done}/{len(grid)}  {method}  label seed {seed}  exit {status}", flush=True)
    table = markdown(args.workdir, methods, seeds, args.baseline)
    (args.workdir / "table.md").write_text(table)
    print(table)
    print("\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


def folder(workdir: pathlib.Path, method: str, seed: int) -> pathlib.Path:
    """Where a run of the grid is kept."""
    return workdir / f"{method}-l{seed}"


def run(args: argparse.Namespace, method: str, seed: int, extra: list[str]) -> int:
    """Runs one cell in a process of its own; what it prints goes to log.txt. Its exit status."""
    workdir = folder(args.workdir, method, seed)
    if (workdir / "result.json").exists():
        return 0
    workdir.mkdir(parents=True, exist_ok=True)
    separator = "," if ":" in args.config else ":"
    command = [sys.executable, "-m", "layermatch_jax.main"]
    command += [f"--config={args.config}{separator}method={method}", f"--workdir={workdir}"]
    command += [f"--config.seed={seed}", f"--config.dataset.label_seed={seed}", *extra]
    with (workdir / "log.txt").open("w") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode


def measured(workdir: pathlib.Path) -> dict[str, float | None] | None:
    """The numbers of one run's row: accuracies in %, of the EMA parameters; None if unfinished."""
    if not (workdir / "result.json").exists():
        return None
    result = json.loads((workdir / "result.json").read_text())
    split = "test" if "test_accuracy" in result else "validation"
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    curve = {line["step"]: 100 * line["accuracy_ema"] for line in lines if line["split"] == split}
    tenth = min(curve, key=lambda step: abs(step - result["train_steps"] / 10))
    percent = lambda name: None if result[name] is None else 100 * result[name]  # noqa: E731
    return {
        "median20": 100 * result[f"{split}_accuracy"]["ema"]["median20"],
        "last": 100 * result[f"{split}_accuracy"]["ema"]["last"],
        "best": 100 * result[f"{split}_accuracy"]["ema"]["best"],
        "at a tenth": curve[tenth],
        "used": percent("mask_rate"),
        "right of used": percent("pseudo_label_accuracy"),
        "right of all": percent("pseudo_label_accuracy_all"),
        "seconds": result["wall_seconds"],
    }


def markdown(workdir: pathlib.Path, methods: list[str], seeds: list[int], baseline: str) -> str:
    """Mean ± standard deviation by method; paired difference to the baseline ± standard error."""
    runs = {m: {s: r for s in seeds if (r := measured(folder(workdir, m, s)))} for m in methods}
    columns = ("median20", "at a tenth", "last", "best", "used", "right of used", "right of all")
    columns += ("seconds",)
    paired = ("median20", "at a tenth", "right of all")
    header = ["method", "n", *columns, *(f"{name} − {baseline}" for name in paired)]
    rows = [header, ["---"] * len(header)]
    for method, by_seed in runs.items():
        row = [method, str(len(by_seed))]
        for name in columns:
            row.append(spread([r[name] for r in by_seed.values()], "sd"))
        for name in paired:
            both = [s for s in by_seed if s in runs.get(baseline, {})]
            pairs = [(by_seed[s][name], runs[baseline][s][name]) for s in both]
            differences = [a - b for a, b in pairs if a is not None and b is not None]
            row.append("" if method == baseline else spread(differences, "se", sign="+"))
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def spread(values: list[float | None], kind: str, sign: str = "") -> str:
    """'mean ± standard deviation' (kind 'sd') or '± standard error of the mean' ('se')."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):{sign}.1f}"
    if len(values) == 1:
        return mean
    deviation = statistics.stdev(values) / (len(values) ** 0.5 if kind == "se" else 1)
    return f"{mean} ± {deviation:.1f}"


if __name__ == "__main__":
    sys.exit(main())
