"""The HTML report of runs: --mode=report.

The report of one run shows everything; that of several shows curves and results by method. If a
part cannot be drawn, for example because the data set is missing, a note says so.
"""

from collections.abc import Callable, Sequence
from typing import Any

from absl import logging
from etils import epath

from layermatch_jax import setup
from layermatch_jax.after import drawing, predict, runs, trained
from layermatch_jax.after.layer_report import picture as layer_picture
from layermatch_jax.after.layer_report import record
from layermatch_jax.after.model import Outputs
from layermatch_jax.after.report import curves, logs, model, pages, tables
from layermatch_jax.after.report.logs import Log
from layermatch_jax.after.report.pages import Note, Picture, Section, as_picture
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import files

FILE = "report.html"


def write(workdirs: str, data_dir: str = "") -> epath.Path:
    """Writes the report of one or several runs, finished or not; changes no other file.

    Args:
      workdirs: folders of runs, comma-separated; see `logs.folders`. Copies of a run count once:
        see `logs.distinct`.
      data_dir: present location of the data set; '' = the location in the run's config.

    Returns:
      Path of the file: report.html in the run's folder, or in the innermost common folder.

    Raises:
      InputError: a folder has no run, the runs have different images, the file cannot be written,
        or matplotlib or Jinja2 is missing.
    """
    drawing.figure(1, 1), pages.template()  # raise now if a library is missing
    read = [logs.read(folder, data_dir) for folder in logs.folders(workdirs)]
    read, left_out = logs.distinct(read)
    logs.check_same_images(read)
    for sentence in left_out:
        logging.warning(sentence)
    notes = [Note(sentence) for sentence in left_out]
    if len(read) == 1:
        (log,) = read
        folder = log.folder
        title = tables.title(log)
        sections = _of_one(log, notes)
    else:
        folder = _shared([log.folder for log in read])
        groups = logs.by_method(read)
        title = f"{len(read)} runs on {read[0].config.dataset.name}"
        sections = _of_several(groups, notes)
    try:
        return files.write_text(folder / FILE, pages.page(title, sections))
    except PermissionError:
        raise InputError(
            f"--workdir: {folder / FILE} cannot be written. Change the permissions of the folder"
        ) from None


def _of_one(log: Log, notes: list[Note]) -> list[Section]:
    missing = list(notes) if log.lines else [*notes, Note("The run has not logged anything yet.")]

    def tried(said: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except (InputError, ImportError) as error:
            logging.warning("%s %s", said, error)
            missing.append(Note(f"{said} {error}"))

    step, numbers = 0, [str(k) for k in range(len(log.split.get("class_counts", ())))]
    names = (
        tried("The class names are not known.", lambda: runs.read_class_names(log.folder))
        or numbers
    )
    images, predictions, features = [], [], []
    data = tried(
        "The run's images cannot be shown.", lambda: runs.read_data(log.folder, log.config)
    )
    if data:
        names = data.partition.class_names
        seen = tried("There are no predictions.", lambda: _predicted(log, data))
        if seen:
            run, answer = seen
            step = max(run.step - 1, 0)
            predictions = model.predictions(run, data, answer)
            features = model.features(run, data, answer)
        views = tried(
            "The views cannot be shown.", lambda: model.draw_views(log.config, data, step)
        )
        images = [views] if views else []
    return [
        Section("Result", [*tables.accuracies(log), tables.provenance(log), *missing]),
        Section("Training", curves.of_one(log)),
        Section("Pseudo-labels by class", curves.of_classes(log, names)),
        Section("Images and their views", images),
        Section("Predictions", predictions),
        Section("Features", features),
        Section("Layers", _layers(record.read(log.folder))),
        Section("Settings", [tables.settings(log)]),
    ]


def _predicted(log: Log, data: setup.Data) -> tuple[runs.Run, Outputs]:
    if log.evaluated_on in ("cross_validation", "none"):
        raise InputError("The run has no test images")
    run = runs.read(str(log.folder), data_dir=log.config.dataset.data_dir)
    return run, predict.predict(trained.of_run(run), data.partition.evaluation)


def _layers(reports: list[dict[str, Any]]) -> list[Picture]:
    """Draws the layer reports that --mode=layer_report or training wrote."""
    if not reports:
        return []
    last = reports[-1]
    cosines = [
        f"{layer} {told['cosine_true'][0]:.2f}"
        for layer, told in last["layers"].items()
        if told["cosine_true"][0] is not None
    ]
    return [
        as_picture(
            layer_picture.draw(reports),
            f"Gradients layer by layer. Cosines at step {last['step']} between the gradients of "
            "pseudo-labels and of true labels: "
            + (", ".join(cosines) or "not known for any layer"),
            "How pseudo-labels train each layer. Their gradient (g_u) is compared with the "
            "gradient of the true labels of the same images (g_true) and with that of the labeled "
            "images (g_s). The last map shows the share of wrong pseudo-labels in the squared "
            "gradients. A cosine of 1 means that pseudo-labels and true labels change a layer in "
            "the same direction, 0 that the directions are unrelated, below 0 that they conflict.",
        )
    ]


def _of_several(groups: dict[str, list[Log]], notes: list[Note]) -> list[Section]:
    unfinished = [
        f"{log.folder} ({tables.how_far(log)})"
        for of_method in groups.values()
        for log in of_method
        if not log.result
    ]
    if unfinished:
        listed = Note(f"Not finished, so not in the table by method: {', '.join(unfinished)}")
        notes = [listed, *notes]
    return [
        Section("Results", [*tables.results(groups), *notes]),
        Section("Training", curves.of_several(groups)),
        Section("Settings", [*tables.differences(groups), tables.origins(groups)]),
    ]


def _shared(folders: Sequence[epath.Path]) -> epath.Path:
    """Returns the innermost folder that contains all folders."""
    parts = [f.parts if "://" in str(f) else f.absolute().parts for f in folders]
    same = 0
    while len({p[: same + 1] for p in parts}) == 1 and same + 1 < min(map(len, parts)):
        same += 1
    return epath.Path(*parts[0][:same])
