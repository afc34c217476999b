"""--mode=predict: predicts any number of image files and writes a line for each."""

import functools
import os
import sys
import time
from collections.abc import Callable

import numpy as np

import layermatch_jax
from layermatch_jax.after import model as model_lib
from layermatch_jax.after import trained
from layermatch_jax.after.model import Model
from layermatch_jax.after.predict import apply, inputs, output, telling
from layermatch_jax.after.predict.lines import Row
from layermatch_jax.data import reading_ahead
from layermatch_jax.data.augment import crop
from layermatch_jax.data.sources import decoding, names
from layermatch_jax.errors import BrokenImagesError, InputError
from layermatch_jax.runtime import progress

_SYNC = 5.0  # seconds between synchronizations of the files with the disk


def of_files(
    workdir: str,
    images: str,
    out: str,
    top: int | None = None,
    features: str | None = None,
    batch_size: int | None = None,
    data_dir: str = "",
) -> str:
    """Predicts image files and writes a line for each; continues an interrupted call.

    Args:
      workdir: the folder of a run, or a bundle.
      images: see `inputs.find`.
      out: the table, .csv or .jsonl. The file OUT.about.json is written beside it.
      top: number of classes in a line, the most probable first; None = 1.
      features: .npy file for the features, float32 [images, D], NaN for an image that cannot be
        decoded; None = no file.
      batch_size: images in a batch over all local devices; None = the run's eval_batch_size.
      data_dir: see `trained.read`.

    Returns:
      A summary for people: the number of images of each class, speed and files.

    Raises:
      InputError: an argument cannot be used, or the files belong to another prediction.
      BrokenImagesError: some images cannot be decoded; all others are predicted.
    """
    out, features = (path and os.path.expanduser(path) for path in (out, features))
    output.check(out, features)
    asked = inputs.find(images or "")
    model = trained.read(workdir, data_dir)
    top = _checked_top(top, model)
    total, feature_dim = len(asked.paths), model.variables["classifier"]["kernel"].shape[0]
    print(*filter(None, (trained.introduced(model), asked.note)), sep="\n", file=sys.stderr)
    if features:
        size = 4 * total * feature_dim / 1e6
        print(f"{features}: float32 {[total, feature_dim]}, {size:,.1f} MB", file=sys.stderr)

    tally = telling.Tally()
    about = _about(model, workdir, asked, top, bool(features))
    with output.opened(out, features, feature_dim, about) as files:
        for row in files.earlier(asked):
            tally.add(row)
        if files.done:
            nothing = ": nothing to do" if files.done == total else ""
            said = f"{files.done:,} of {total:,} images are already in {out}{nothing}"
            print(said, file=sys.stderr)
        began, first = time.monotonic(), files.done
        try:
            read = functools.partial(_read, asked, model, tally)
            size = reading_ahead.batch_size(batch_size or model.batch_size, total)
            _predict(model, asked, read, files, tally, bool(features), size)
        except KeyboardInterrupt:
            said = f"{files.done:,} of {total:,} images are in {out}: the same command continues"
            print(said, file=sys.stderr)
            raise
        finally:
            files.to_disk()
    seconds = time.monotonic() - began
    speed = f" in {progress.about(seconds)} ({(total - first) / seconds:,.0f} images/s)"
    written = ", ".join(filter(None, (out, features, out + output.ABOUT)))
    summary = (
        f"{tally.predicted:,} of {total:,} images are predicted"
        f"{speed if first < total else ''}\n\n{tally.table(model.class_names)}\n\nfiles: {written}"
    )
    for remark, count in tally.remarks.items():
        print(f"{remark} in {count:,} of {total - first:,} images", file=sys.stderr)
    if tally.broken:
        print(summary)
        raise BrokenImagesError(
            f"{tally.broken:,} of {total:,} images cannot be decoded; all others are predicted:\n"
            f"{tally.listing()}\nIn {out} their lines have an error in place of a class"
        )
    return summary


def _predict(
    model: Model,
    asked: inputs.Inputs,
    read: Callable[[range], tuple[np.ndarray, list[str]]],
    files: output.Output,
    tally: telling.Tally,
    with_features: bool,
    size: int,
) -> None:
    """Predicts the images that are not yet in the files.

    Args:
      model: the model.
      asked: all images.
      read: positions -> (uint8 [n, S, S, 3], n texts: the reason if an image is broken, else '').
      files: the files to append to.
      tally: counts the rows.
      with_features: whether to write the features.
      size: rows of a batch.
    """
    total, names_of = len(asked.paths), [names.visible(name) for name in model.class_names]
    forward = apply.summarize(model, files.top, with_features)
    told, synced = telling.Progress(files.done, total), time.monotonic()
    for part, errors, seen in reading_ahead.in_batches(
        forward, read, range(files.done, total), size
    ):
        of_images = (x.tolist() for x in (seen.classes, seen.probabilities, seen.entropy))
        rows = [
            Row(asked.shown(n), error=error)
            if error
            else Row(asked.shown(n), [names_of[c] for c in classes], probabilities, entropy)
            for n, error, classes, probabilities, entropy in zip(
                part, errors, *of_images, strict=True
            )
        ]
        features = seen.features if with_features else None
        if with_features and any(errors):
            features = np.where(np.array(errors)[:, None] != "", np.nan, features)
        files.append(rows, features)
        for row in rows:
            tally.add(row)
        told.update(files.done)
        if time.monotonic() - synced > _SYNC:
            files.to_disk()
            synced = time.monotonic()


def _read(
    asked: inputs.Inputs, model: Model, tally: telling.Tally, part: range
) -> tuple[np.ndarray, list[str]]:
    """Reads center crops, uint8 [n, S, S, 3], black for broken images, and n reasons or ''."""
    pixels = np.zeros((len(part), *[model.stored_size] * 2, 3), np.uint8)
    paths, errors = map(asked.path, part), []
    decode = functools.partial(decoding.attempt, side=model.stored_size, alpha=model.alpha)
    for row, found in zip(pixels, decoding.pool().map(decode, paths), strict=True):
        errors.append(found if isinstance(found, str) else "")
        if not isinstance(found, str):
            row[:] = found.pixels
            tally.remarks.update(found.remarks)
    if any(errors) and asked.root and not os.path.isdir(asked.root):
        gone = f"--images: {asked.root} no longer exists"
        raise InputError(f"{gone}. Restore it; then the same command continues")
    return crop.center_crop(pixels, model.image_size), errors


def _checked_top(top: int | None, model: Model) -> int:
    count = len(model.class_names)
    if top is not None and not 1 <= top <= count:
        raise InputError(f"--top={top}: allowed are 1..{count}, the number of classes")
    return top or 1


def _about(model: Model, workdir: str, asked: inputs.Inputs, top: int, features: bool) -> dict:
    """Makes the content of OUT.about.json."""
    return {
        "images": len(asked.paths),
        "images_sha256": asked.sha256(),
        "model": workdir,
        "model_sha256": model_lib.fingerprint(model),
        "class_names": list(model.class_names),
        "step": model.about["step"],
        "top": top,
        "features": features,
        "layermatch_jax": layermatch_jax.__version__,
    }
