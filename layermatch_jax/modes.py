"""The modes of the command line (--mode=…): functions (config, workdir, given) -> printed text.

`given` names the fields that the command line sets by --config.FIELD=VALUE. A mode that looks at a
saved run needs it: any other field of `config` is a default, and the run's own value counts.

JAX and other slow modules are imported inside the modes: a wrong flag is refused at once.
"""

from collections.abc import Collection

from ml_collections import ConfigDict

from layermatch_jax.errors import EarlyEnd, InputError


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
    return result and result_lib.as_text(result, folder)


def run_benchmark(config: ConfigDict, folder: str, given: Collection[str]) -> str | None:
    """Times the parts of a run; returns a table."""
    from layermatch_jax.benchmark import measure, summary

    report = measure.run_benchmark(config, folder)
    return report and summary.as_table(report, folder)


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
        report = measuring.of_run(run, config.layer_report.batches if asked else None)
        record.add(epath.Path(folder), report)
        picture.write(epath.Path(folder))
    return f"{record.as_table(report)}\n\nfiles: {folder}/ ({', '.join(record.FILES)})"


def run_report(config: ConfigDict, folders: str, given: Collection[str]) -> str:
    """Draws a report of the runs in comma-separated folders; returns where it is."""
    from layermatch_jax.after import report

    _alone("report")
    # Each run has its own config, but its data may have moved since.
    return f"report: {report.write(folders, config.dataset.data_dir)}"


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
}
