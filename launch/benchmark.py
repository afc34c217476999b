"""Times all networks with both precisions and all inputs, and makes a table of the results.

    python launch/benchmark.py --workdir=runs/benchmark --torch=/envs/torch/bin/python

The images are made up and have each data set's size, so nothing has to be downloaded. Each row runs
`layermatch_jax.main --mode=benchmark` in its own process. With --torch=PYTHON, launch/torch_step.py
then times FixMatch's step of the same network in PyTorch. Other flags (--config.FIELD=VALUE) are
passed to every run of layermatch_jax. The table is also written to table.md in the workdir.
"""

import argparse
import itertools
import json
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The config of each network, and the settings that it needs for made-up images.
NETWORKS = {
    "WRN-28-2": ["cifar10.py:labels=40"],
    "WRN-28-8": ["cifar100.py:labels=400", "--config.dataset.num_classes=100"],
    "STL-10's": ["stl10.py:labels=40"],
    "ResNet-50": ["imagenet100.py:labels=100%", "--config.dataset.num_classes=100"],
}
DTYPES = ("float32", "bfloat16")
INPUTS = {
    "device": ["--config.input.backend=device"],
    "device-8": ["--config.input.backend=device", "--config.input.steps_per_call=8"],
    "tf_data": ["--config.input.backend=tf_data"],
}


def main(argv: list[str]) -> int:
    """Runs the benchmarks; returns 0, or 1 if a run failed (after all others have run)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="folder of all results")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="networks, comma-separated")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="precisions, comma-separated")
    parser.add_argument("--inputs", default=",".join(INPUTS), help="inputs, comma-separated")
    parser.add_argument("--torch", metavar="PYTHON", help="Python interpreter with PyTorch")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    options, extra = parser.parse_known_args(argv)
    networks, dtypes, inputs = (
        x.split(",") for x in (options.networks, options.dtypes, options.inputs)
    )
    for chosen, known in ((networks, NETWORKS), (dtypes, DTYPES), (inputs, INPUTS)):
        if unknown := set(chosen) - set(known):
            parser.error(f"unknown: {', '.join(unknown)}; allowed are: {', '.join(known)}")

    rows, failed = [], False
    for network, dtype in itertools.product(networks, dtypes):
        config, *fields = NETWORKS[network]
        theirs = None
        for name in inputs:
            folder = (options.workdir / f"{network}-{dtype}-{name}").absolute()
            done = run(
                [
                    sys.executable, "-m", "layermatch_jax.main", "--mode=benchmark",
                    f"--config={ROOT / 'configs' / config}", "--config.dataset.name=fake",
                    f"--config.model.dtype={dtype}", f"--workdir={folder}", *INPUTS[name],
                    *fields, *extra,
                ],
                options.dry_run,
            )  # fmt: skip
            failed |= not done
            if done and not options.dry_run:
                report = json.loads((folder / "benchmark.json").read_text())
                if options.torch and theirs is None:
                    theirs = torch_step(options.torch, report["config"], folder / "torch.json")
                rows.append((network, dtype, name, report, theirs))
    if rows:
        text = table(rows)
        (options.workdir / "table.md").write_text(text, encoding="utf-8")
        print(text)
    return int(failed)


def run(command: list[str], dry: bool) -> bool:
    """Prints a command and, unless `dry`, runs it; returns whether it succeeded."""
    print(shlex.join(command), flush=True)
    return dry or subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def torch_step(python: str, config: dict, out: pathlib.Path) -> float | None:
    """Returns PyTorch's steps/s with a run's settings; None if torch_step.py lacks its network."""
    if config["model.name"] != "wide_resnet":
        return None
    flags = {
        "side": "dataset.image_size", "classes": "dataset.num_classes", "depth": "model.depth",
        "widen": "model.widen_factor", "stages": "model.stages", "stride": "model.first_stride",
        "dtype": "model.dtype", "batch_size": "batch_size", "unlabeled_ratio": "unlabeled_ratio",
    }  # fmt: skip
    command = [python, str(ROOT / "launch" / "torch_step.py"), f"--out={out}"]
    if not run(command + [f"--{flag}={config[name]}" for flag, name in flags.items()], False):
        return None
    return json.loads(out.read_text())["steps_per_second"]


def table(rows: list[tuple]) -> str:
    """Formats rows (network, dtype, input, benchmark.json, PyTorch's steps/s) as Markdown."""
    head = (
        "network", "precision", "input", "step alone, steps/s", "whole loop (to the step)",
        "images/s", "of the peak", "LayerMatch / FixMatch", "input alone, steps/s", "compiling, s",
        "PyTorch, steps/s", "ours / PyTorch",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for network, dtype, name, report, theirs in rows:
        parts, program = report["parts"], report["program"]
        step, loop, share = parts["train step"], parts["whole loop"], program["peak_share"]
        other = next(part for part in parts if part.endswith(("fixmatch", "layermatch")))
        # LayerMatch's time over FixMatch's; `other` is the one that the config does not train.
        ratio = parts[other]["relative_speed"]
        ratio = ratio if other.endswith("fixmatch") else 1 / ratio
        cells = [
            network, dtype, name, f"{step['steps_per_second']:.2f}",
            f"{loop['steps_per_second']:.2f} ({loop['relative_speed']:.2f})",
            f"{loop['images_per_second']:,.0f}", "" if share is None else f"{share:.1%}",
            f"{ratio:.3f}", f"{parts['input']['steps_per_second']:.1f}",
            f"{program['compile_seconds']:.0f}", f"{theirs:.2f}" if theirs else "",
            f"{step['steps_per_second'] / theirs:.2f}" if theirs else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    device, versions = report["device"], report["versions"]
    lines.append(
        f"\n{device['count']} x {device['kind']}, jax {versions['jax']}, commit "
        f"{report['git_commit']}. Steps of {report['config']['batch_size']} labeled images and "
        f"{report['config']['unlabeled_ratio']} unlabeled ones for each of them."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
