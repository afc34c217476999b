"""Times all networks in both precisions and with all inputs, and puts them into one table.

    python launch/benchmark.py --workdir=runs/benchmark --torch=/envs/torch/bin/python

On made-up images of each data set's size, so that nothing has to be downloaded. Each row is a
process of its own, `layermatch_jax.main --mode=benchmark`; with --torch, an interpreter that has
PyTorch, launch/torch_step.py times the same FixMatch step there, right after it. Flags not the
runner's own (--config.FIELD=VALUE) go to every run of ours. The table is also written to table.md.
"""

import argparse
import itertools
import json
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The config that a network is in, and what it lacks when the images are made up.
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
    """Returns 0; 1 if a run failed (the others are finished first)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="for all results")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="comma-separated")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="comma-separated")
    parser.add_argument("--inputs", default=",".join(INPUTS), help="comma-separated")
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter that has PyTorch")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    options, extra = parser.parse_known_args(argv)
    networks, dtypes, inputs = (
        x.split(",") for x in (options.networks, options.dtypes, options.inputs)
    )
    for chosen, known in ((networks, NETWORKS), (dtypes, DTYPES), (inputs, INPUTS)):
        if unknown := set(chosen) - set(known):
            parser.error(f"unknown: {', '.join(unknown)}; there are: {', '.join(known)}")

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
    """Runs a command, or prints it; whether it worked."""
    print(shlex.join(command), flush=True)
    return dry or subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def torch_step(python: str, config: dict, out: pathlib.Path) -> float | None:
    """Steps a second of PyTorch with the settings of a run of ours; None if it has no such net."""
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
    """Markdown, a line for each row: (network, dtype, input, benchmark.json, PyTorch's rate)."""
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
        # Times of the two, whichever of them the config is of.
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
        f"{report['config']['unlabeled_ratio']} unlabeled ones for each."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
