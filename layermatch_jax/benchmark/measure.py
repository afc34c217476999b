"""Times the parts of a run: --mode=benchmark.

All parts take turns in one process, so that a temporary slowdown of the machine affects all of
them. A speed is the median over the rounds. Two parts are compared by the ratio of their speeds in
each round; the result is the median of these ratios.
"""

import collections
import contextlib
import functools
import io
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from layermatch_jax import automatic, evaluate, presets, rules, setup, train
from layermatch_jax.benchmark import summary
from layermatch_jax.data.images import take
from layermatch_jax.method import reductions, steps
from layermatch_jax.runtime import files, hosts, metrics, parallel
from layermatch_jax.views import Views

ROUNDS = 5
SECONDS = 2.0  # approximate time of each part in each round
_MOST = 1000  # repetitions of a part in a round
_WINDOWS = 4  # log windows of the whole loop; the first one, which has the start, is not counted


class Part(NamedTuple):
    """A part of a run to be timed."""

    run: Callable[[int], float]  # number of repetitions -> seconds for each, devices included
    steps: int  # train steps in one repetition; 0 = none
    images: int  # images in one repetition


def run_benchmark(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any] | None:
    """Times the train step, the input, the whole loop and the evaluation.

    The trained parameters are discarded. With config.profile, a trace of the whole loop
    (jax.profiler) is written to workdir/profile, for TensorBoard's profiler or ui.perfetto.dev.

    Args:
      config: the whole config.
      workdir: folder for benchmark.json; created if it is missing. If there are several processes,
        all of them call this function, and the first one writes.

    Returns:
      The content of benchmark.json (see `summary.make_report`); None in all processes except the
      first.

    Raises:
      InputError: the config or the data cannot be used.
    """
    config = automatic.resolve(config)
    rules.validate(config, jax.device_count())
    folder = epath.Path(workdir).expanduser()
    data = setup.load(config)
    main = setup.prepare(config, data)
    program = _analyze(main, config)
    parts = {"train step": _step(main, config)}
    parts["train step"].run(1)  # before other parts use memory
    memory = jax.local_devices()[0].memory_stats() or {}
    program["peak_bytes_per_device"] = memory.get("peak_bytes_in_use")
    for name, other in _others(config).items():
        # Both programs share the resident images if their sharding is the same.
        same = parallel.replicated(other.parallelism) == parallel.replicated(config.parallelism)
        resident = main.resident if same else None
        prepared = setup.prepare(other, setup.with_feed_of(other, data), resident)
        parts[name] = _step(prepared, other)
    parts["input"] = _input(main, config)
    usual = main.method.layout.mu > 0 and main.method.layout.views == Views()
    if config.input.backend == "tf_data" and usual:
        parts["input, image by image"] = _input_per_image(main, config)
    with tempfile.TemporaryDirectory() as scratch:
        parts["whole loop"] = _loop(main, config, scratch)
        parts["evaluation"] = _evaluation(main, config)
        seconds = _take_turns(parts)
        if config.profile:
            with jax.profiler.trace(str(folder / summary.PROFILE)):
                parts["whole loop"].run(1)
    if not hosts.is_first():
        return None
    report = summary.make_report(config, data, program, parts, seconds)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / summary.FILE, report)
    return report


def _others(config) -> dict[str, ml_collections.ConfigDict]:
    """Returns configs to compare the train step with: other parallelism, FixMatch or LayerMatch."""
    parallelism = "jit" if config.parallelism == "pmap" else "pmap"
    others = {f"train step, {parallelism}": config.copy_and_resolve_references()}
    others[f"train step, {parallelism}"].parallelism = parallelism
    if config.method != "supervised":
        method = "fixmatch" if config.method != "fixmatch" else "layermatch"
        others[f"train step, {method}"] = automatic.resolve(presets.exchange_method(config, method))
    return others


# ---------------------------------------------------------------------------------------------
# The parts.


def _step(prepared: setup.Prepared, config) -> Part:
    """The train program, on chunks that are already on the devices."""
    feed = prepared.data.feed
    K = config.input.steps_per_call
    chunks = [
        parallel.place_batch(chunk, config.parallelism)
        for _, chunk in itertools.islice(feed.chunks(range(4 * K)), 4)
    ]
    state = [parallel.replicate(prepared.initial, config.parallelism)]

    def run(count: int) -> float:
        start = time.perf_counter()
        for chunk in itertools.islice(itertools.cycle(chunks), count):
            state[0], _ = prepared.train_program(state[0], prepared.resident, chunk)
        jax.block_until_ready(state[0])
        return (time.perf_counter() - start) / count

    return Part(run, K, K * prepared.data.images_per_step)


def _input(prepared: setup.Prepared, config) -> Part:
    """The input: makes batches and copies them to the devices, without training."""
    feed, K = prepared.data.feed, config.input.steps_per_call
    chunks = feed.chunks(range(2**31))

    def sum_of_pixels(state, resident, chunk, *, axis_name):  # or XLA would skip the images
        def one_step(total, rows):
            images = feed.batch(resident, rows).images
            return total + jnp.sum(images, dtype=jnp.int32), None

        by_step = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), chunk)
        total, _ = jax.lax.scan(one_step, jnp.int32(0), by_step)
        return reductions.total(total, axis_name)

    program = parallel.compile_step(
        sum_of_pixels, config.parallelism, resident=True, donate_state=False
    )
    state = parallel.replicate(jnp.int32(0), config.parallelism)

    def make(count: int) -> None:
        for _, chunk in itertools.islice(chunks, count):
            placed = parallel.place_batch(chunk, config.parallelism)
            jax.block_until_ready(program(state, prepared.resident, placed))

    def run(count: int) -> float:
        make(config.input.prefetch + 2)  # chunks that were made while other parts were timed
        return _seconds(lambda: make(count)) / count

    return Part(run, K, K * config.batch_size * prepared.method.layout.drawn.size)


def _input_per_image(prepared: setup.Prepared, config) -> Part:
    """The same views with tf.data as it is usually written: image by image."""
    from layermatch_jax.data import per_image  # TensorFlow

    partition, size = prepared.data.partition, config.batch_size * config.unlabeled_ratio
    sampler = setup.create_sampler(config, partition)
    batches = per_image.view_batches(partition.unlabeled, sampler, config.dataset.padding)

    def run(count: int) -> float:
        next(batches), next(batches), next(batches)  # were made while other parts were timed
        return _seconds(lambda: collections.deque(itertools.islice(batches, count), 0)) / count

    return Part(run, 1, 2 * size)


def _loop(prepared: setup.Prepared, config, scratch: str) -> Part:
    """train_and_evaluate, but it evaluates a single image and saves one checkpoint at the end."""
    K, data = config.input.steps_per_call, prepared.data
    few = take(data.partition.evaluation, np.arange(1))
    data = data._replace(partition=data.partition._replace(evaluation=few))
    prepared = prepared._replace(data=data)

    def run(count: int) -> float:
        window = -(-count // (_WINDOWS - 1))  # chunks
        short, folder = config.copy_and_resolve_references(), tempfile.mkdtemp(dir=scratch)
        short.log_every, short.layer_report.at_steps = window * K, ()
        short.train_steps = short.eval_every = short.checkpoint_every = _WINDOWS * window * K
        with contextlib.redirect_stderr(io.StringIO()):
            train.train_and_evaluate(short, folder, prepared=prepared)
        lines = [x for x in metrics.read(epath.Path(folder)) if x["split"] == "train"]
        seconds = sum(x["seconds"] for x in lines[1:])  # 0 in processes that write no log
        return float(hosts.from_first(np.float32(seconds))) / (window * (_WINDOWS - 1))

    return Part(run, K, K * data.images_per_step)


def _evaluation(prepared: setup.Prepared, config) -> Part:
    """The evaluation of the whole split, with the raw and the EMA parameters."""
    state = parallel.replicate(prepared.initial, config.parallelism)
    images = prepared.data.partition.evaluation

    def run(count: int) -> float:
        def all_of_it():
            for _ in range(count):
                evaluate.evaluate(prepared.eval_step, state, images, config)

        return _seconds(all_of_it) / count

    return Part(run, 0, len(images.labels))


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _take_turns(parts: dict[str, Part]) -> dict[str, list[float]]:
    """Times each part once in each round, in random order: {part: [seconds by round]}."""
    counts = {}
    for name, part in parts.items():
        print(f"{name}: compiling and warming up", file=sys.stderr)
        part.run(1)
        count = np.int32(np.clip(SECONDS / part.run(1), 1, _MOST))
        counts[name] = int(hosts.from_first(count))  # all processes must run the same programs
    seconds, rng = {name: [] for name in parts}, random.Random(0)
    for turn in range(1, ROUNDS + 1):
        print(f"round {turn} of {ROUNDS}", file=sys.stderr)
        for name in rng.sample(list(parts), len(parts)):
            seconds[name].append(parts[name].run(counts[name]))
    return seconds


# ---------------------------------------------------------------------------------------------
# The report.


def _analyze(prepared: setup.Prepared, config) -> dict[str, Any]:
    """Returns the compiler's analysis of the train program: time, FLOP and memory."""
    state = parallel.replicate(prepared.initial, config.parallelism)
    chunk = parallel.place_batch(prepared.data.feed.example, config.parallelism)
    lowered = prepared.train_program.lower(state, prepared.resident, chunk)
    start = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    seconds = time.perf_counter() - start
    return {
        "compile_seconds": seconds,
        "flops_per_step": _flops(prepared, state, config),
        "program_bytes_per_device": (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        ),
    }


def _flops(prepared: setup.Prepared, state, config) -> float:
    """Returns XLA's count of the FLOP of a train step on all devices, without the input."""
    feed = prepared.data.feed
    one_step = jax.tree.map(lambda x: x[:, 0], feed.example)
    batch = jax.eval_shape(feed.batch, prepared.resident, one_step)
    batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch)
    step = parallel.compile_step(
        functools.partial(steps.train_step, method=prepared.method), config.parallelism
    )
    lowered = step.lower(state, parallel.place_batch(batch, config.parallelism))
    # XLA counts a pmapped program for one device.
    return lowered.cost_analysis()["flops"] * (
        jax.device_count() if config.parallelism == "pmap" else 1
    )
