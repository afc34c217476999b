"""The modes of the command line (--mode=…): functions (config, workdir, given) -> printed text.

`given` names the fields that the command line sets by --config.FIELD=VALUE. A mode that looks at a
saved run uses only these fields of `config` and takes all others from the run. The flags that only
some modes read (FLAGS) follow as keyword arguments.

JAX and other slow modules are imported inside the modes: a wrong flag is refused at once.
"""

import sys
from collections.abc import Collection

from ml_collections import ConfigDict

from layermatch_jax.errors import EarlyEnd, InputError, unknown


def run_train(config: ConfigDict, folder: str, given: Collection[str]) -> str | None:
    """Trains, or resumes a run; returns a summary of the result."""
    from etils import epath

    from layermatch_jax import train
    from layermatch_jax.after.layer_report import picture
    from layermatch_jax.runtime import hosts
    from layermatch_jax.runtime import result as result_lib

    def draw_reports():
        if config.layer_report.at_steps and hosts.is_first():
            picture.write(epath.Path(folder))

    try:
        with hosts.signals() as told_to_stop:
            result = train.train_and_evaluate(config, folder, told_to_stop)
    except InputError:  # then the folder may belong to another run
        raise
    except EarlyEnd:
        draw_reports()
        raise
    draw_reports()
    return result_lib.as_text(result, folder) if result else None


def run_benchmark(config: ConfigDict, folder: str, given: Collection[str]) -> str | None:
    """Times the parts of a run; returns a table."""
    from layermatch_jax.benchmark import measure, summary

    report = measure.run_benchmark(config, folder)
    return summary.as_table(report, folder) if report else None


def run_layer_report(config: ConfigDict, folder: str, given: Collection[str]) -> str:
    """Compares the gradients of the run in a folder, layer by layer; returns a table.

    The number of batches is --config.layer_report.batches if given, else that of the run's config.
    """
    from etils import epath

    from layermatch_jax.after import runs
    from layermatch_jax.after.layer_report import measuring, picture, record
    from layermatch_jax.runtime import workdir

    _alone("layer_report")
    run = runs.read(folder, data_dir=config.dataset.data_dir)
    with workdir.lock(epath.Path(folder)):
        asked = "layer_report.batches" in given
        data = runs.read_data(epath.Path(folder), run.config)
        report = measuring.of_run(run, data, config.layer_report.batches if asked else None)
        record.add(epath.Path(folder), report)
        picture.write(epath.Path(folder))
    return f"{record.as_table(report)}\n\nfiles: {folder}/ ({', '.join(record.FILES)})"


def run_report(config: ConfigDict, folders: str, given: Collection[str]) -> str:
    """Draws a report of the runs in comma-separated folders; returns where it is."""
    from layermatch_jax.after import report

    _alone("report")
    # Each run has its own config, but its data may have moved since.
    return f"report: {report.write(folders, config.dataset.data_dir)}"


def run_predict(
    config: ConfigDict,
    workdir: str,
    given: Collection[str],
    *,
    images: str | None,
    out: str | None,
    top: int | None,
    features: str | None,
) -> str:
    """Predicts image files with the model of a run or bundle; returns a table of the classes."""
    from layermatch_jax.after import predict
    from layermatch_jax.runtime import parallel

    _alone("predict")
    _check_given("predict", given, {"eval_batch_size", "compilation_cache", "dataset.data_dir"})
    if "compilation_cache" in given and config.compilation_cache:
        parallel.keep_compiled(config.compilation_cache)
    size = config.eval_batch_size if "eval_batch_size" in given else None
    data_dir = config.dataset.data_dir
    return predict.of_files(workdir, images or "", out or "", top, features, size, data_dir)


def run_export(
    config: ConfigDict, workdir: str, given: Collection[str], *, format: str | None, out: str | None
) -> str:
    """Exports the model of a run or bundle to a file; returns where it is."""
    from layermatch_jax.after import bundle, trained
    from layermatch_jax.after.export import onnx, stablehlo

    # (model, path) -> None
    formats = {"bundle": bundle.write, "stablehlo": stablehlo.write, "onnx": onnx.write}
    _alone("export")
    _check_given("export", given, {"dataset.data_dir"})
    if not format:
        raise InputError(f"--format is needed: {' or '.join(formats)}")
    if format not in formats:
        raise unknown("--format", format, formats)
    if not out:
        example = bundle.ENDING if format == "bundle" else f".{format}"
        raise InputError(f"--out is needed: the file to write, for example model{example}")
    model = trained.read(workdir, config.dataset.data_dir)
    print(trained.introduced(model), file=sys.stderr)
    formats[format](model, out)
    return f"{format}: {out}"


def _check_given(mode: str, given: Collection[str], read: Collection[str]) -> None:
    if unread := [name for name in given if name not in read]:
        raise InputError(
            f"--mode={mode} takes its settings from the run: --config.{unread[0]} is not read. "
            f"Leave it out. Allowed are --config.{', --config.'.join(sorted(read))}"
        )


def _alone(mode: str) -> None:
    import jax

    if jax.process_count() > 1:
        raise InputError(
            f"--mode={mode} runs in one process, but {jax.process_count()} were started. Start one"
        )


# A mode returns None in all processes except the first; then nothing is printed.
MODES = {
    "train": run_train,
    "benchmark": run_benchmark,
    "layer_report": run_layer_report,
    "report": run_report,
    "predict": run_predict,
    "export": run_export,
}
# Modes whose command continues, after an interruption, where it was.
RESUMING = ("train", "predict")
# The flags that only these modes read. All modes read --config, --workdir and the flags of several
# processes.
FLAGS = {"predict": ("images", "out", "top", "features"), "export": ("format", "out")}


def own_flags(mode: str, given: Collection[str]) -> tuple[str, ...]:
    """Returns the names of the flags that this mode reads, but not all modes.

    Args:
      mode: a key of MODES.
      given: names of the flags on the command line.

    Raises:
      InputError: only other modes read one of the given flags.
    """
    own = FLAGS.get(mode, ())
    for name in given:
        readers = [other for other, flags in FLAGS.items() if name in flags]
        if readers and name not in own:
            raise InputError(
                f"--{name} is not read by --mode={mode}, but by --mode={' and '.join(readers)}. "
                "Leave it out, or change --mode"
            )
    return own
