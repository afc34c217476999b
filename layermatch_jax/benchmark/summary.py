"""The content of benchmark.json, and its table for the terminal."""

import statistics
from collections.abc import Mapping
from typing import Any

import jax

from layermatch_jax import config as config_lib
from layermatch_jax.runtime import result as result_lib

FILE, PROFILE = "benchmark.json", "profile"

# Peak FLOP/s in dense bfloat16 (float16 if the device lacks it), from the makers' data sheets.
PEAK = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def make_report(config, data, program, parts: Mapping, seconds) -> dict[str, Any]:
    """Makes the content of benchmark.json.

    Returns:
      {'parts': {name: {'steps_per_second' (None for evaluation), 'images_per_second' (views),
      'relative_speed' (steps per second relative to the train step; None for evaluation),
      'seconds' (one repetition, for each round)}}, 'program': the analysis of the train program
      with 'peak_bytes_per_device' (None if the device does not report it), 'flops_per_second' and
      'peak_share' of all devices (None if the peak is not known), 'config': {dotted name: value},
      'images_per_step', and the device, versions and commit of `result.provenance`}.
    """
    rates = {}
    for name, part in parts.items():
        once = statistics.median(seconds[name])
        relative = [
            (a / parts["train step"].steps) / (b / part.steps)
            for a, b in zip(seconds["train step"], seconds[name], strict=True)
            if part.steps
        ]
        rates[name] = {
            "steps_per_second": part.steps / once if part.steps else None,
            "images_per_second": part.images / once,
            "relative_speed": statistics.median(relative) if relative else None,
            "seconds": seconds[name],
        }
    kind = jax.devices()[0].device_kind
    peak = next((peak for name, peak in PEAK.items() if kind.startswith(name)), None)
    speed = program["flops_per_step"] * rates["train step"]["steps_per_second"]
    program["flops_per_second"] = speed
    program["peak_share"] = speed / peak / jax.device_count() if peak else None
    return {
        "parts": rates,
        "program": program,
        "images_per_step": data.images_per_step,
        "config": config_lib.fields(config),
        **result_lib.provenance(),
    }


def as_table(report: dict[str, Any], workdir: str) -> str:
    """Formats a report for the terminal."""
    config, program, device = (report[name] for name in ("config", "program", "device"))
    lines = [
        f"{config['method']} on {config['dataset.name']}, {config['model.name']}, "
        f"{config['model.dtype']}, {config['parallelism']}, {report['images_per_step']} images a "
        f"step, input by {config['input.backend']}; {device['count']} x {device['kind']}",
        "",
        f"{'':24}{'ms a step':>12}{'steps/s':>10}{'images/s':>12}{'to the step':>13}",
    ]
    for name, part in report["parts"].items():
        if part["steps_per_second"]:
            steps = part["steps_per_second"]
            row = f"{1e3 / steps:12.2f}{steps:10.2f}{part['images_per_second']:12,.0f}"
            row += f"{part['relative_speed']:13.3f}"
        else:
            row = f"{'':22}{part['images_per_second']:12,.0f}"
        lines.append(f"{name:24}{row}")
    share = program["peak_share"]
    share = "peak of this device is not known" if share is None else f"{share:.1%} of the peak"
    peak = program["peak_bytes_per_device"]
    peak = "" if peak is None else f", at most {peak / 1e9:.2f} GB in use"
    lines += [
        "",
        f"a step: {program['flops_per_step'] / 1e9:,.1f} GFLOP (XLA's count), "
        f"{program['flops_per_second'] / 1e12:.3f} TFLOP/s, {share}",
        f"memory of a device: {program['program_bytes_per_device'] / 1e9:.2f} GB for the train "
        f"program{peak}",
        f"compiling it: {program['compile_seconds']:.1f} s",
        "",
        f"files: {workdir}/{FILE}" + (f", {workdir}/{PROFILE}/" if config["profile"] else ""),
    ]
    return "\n".join(lines)
