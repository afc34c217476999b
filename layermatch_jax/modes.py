"""What the command line can be asked for, --mode=…: (config, workdir, given) -> what is printed.

`given` names the fields that the command line sets by --config.FIELD=VALUE. A mode that looks at a
saved run needs it: any other field of `config` is a default, and the run's own value counts.

JAX and what else takes seconds to import is imported when a mode is entered, not for a wrong flag.
"""

from collections.abc import Collection

from ml_collections import ConfigDict

from layermatch_jax.errors import EarlyEnd, InputError


def run_train(config: ConfigDict, folder: str, given: Collection[str]) -> str | None:
    """Trains, or goes on; a summary of the result."""
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
    except InputError:  # the folder may be another run's
        raise
    except EarlyEnd:
        draw_reports()
        raise
    draw_reports()
    return result_lib.as_text(result, folder) if result else None


def run_benchmark(config: ConfigDict, folder: str, given: Collection[str]) -> str | None:
    """Times the parts of a run; a table."""
    from layermatch_jax.benchmark import measure, summary

    report = measure.run_benchmark(config, folder)
    return summary.as_table(report, folder) if report else None


def run_layer_report(config: ConfigDict, folder: str, given: Collection[str]) -> str:
    """Compares the gradients of the run in a folder, layer by layer; a table.

    Over as many batches as --config.layer_report.batches says, or else as the run's config says.
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
    """Draws the runs in folders, comma-separated; where the pictures are."""
    from layermatch_jax.after import report

    _alone("report")
    # Each run has its own config; where its data are may have changed since.
    return f"report: {report.write(folders, config.dataset.data_dir)}"


def _alone(mode: str) -> None:
    import jax

    if jax.process_count() > 1:
        raise InputError(f"--mode={mode} is for one process, not {jax.process_count()}")


# By name. None is printed by all processes but the first.
MODES = {
    "train": run_train,
    "benchmark": run_benchmark,
    "layer_report": run_layer_report,
    "report": run_report,
}
