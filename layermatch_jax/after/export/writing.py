"""Writes an exported model, once it computes the same by itself as here."""

import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from layermatch_jax.after.export import alone, function
from layermatch_jax.after.model import Model
from layermatch_jax.data import images as images_lib
from layermatch_jax.errors import InputError
from layermatch_jax.runtime import files

TOLERANCE = 1e-4  # of a probability
SIZES = (1, 3, 8)  # of the batches that are compared


def write(model: Model, path: str, form: str, content: Callable[[Model], bytes]) -> None:
    """Writes an exported model, whole or not at all.

    A file of the same content that is there already stays.

    Args:
      model: to be exported.
      path: of the file; its name ends with the form.
      form: a key of `alone.RUNTIMES`.
      content: makes the file's content. Whatever it raises becomes an InputError.

    Raises:
      InputError: the path cannot be such a file's, or holds something else; the model cannot be
        exported, or computes something else outside of this package. No file is written.
    """
    place, said = epath.Path(path).expanduser(), f"--out={path}"
    if place.suffix != f".{form}":
        raise InputError(f"{said}: the name of such a file ends with .{form}, as in flowers.{form}")
    files.check_place(str(place), said)
    try:
        new = content(model)
    except InputError:
        raise
    except Exception as error:  # converters raise whatever an operation that they lack leads to
        raise _refused(form, model, f"{type(error).__name__}: {error}") from error
    if place.exists():
        if place.read_bytes() == new:
            return
        raise InputError(f"{said} is there already, and is not this export. Take another name")
    difference = _difference(model, form, new)
    if not difference <= TOLERANCE:  # NaN is refused, too
        raise _refused(
            form, model, f"its probabilities differ by {difference:.1e}, more than {TOLERANCE:.0e}"
        )
    files.write_bytes(place, new)


def _refused(form: str, model: Model, why: str) -> InputError:
    name, dtype = model.backbone["name"], model.backbone.get("dtype", "float32")
    why = " ".join(why.split())[:500]
    return InputError(
        f"--format={form}: this model ({name}, {dtype}) cannot be exported so ({why}). No file is "
        "written. Take another --format"
    )


def _difference(model: Model, form: str, content: bytes) -> float:
    """The largest difference between the probabilities of a file, run by itself, and ours.

    Both are computed on the CPU, of the same made-up images, in batches of several sizes.
    """
    images = _images(model.image_size)
    ours = jax.jit(function.of_images(model))
    differences = []
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "model")
        file.write_bytes(content)
        for size in SIZES:
            np.save(f"{folder}/{size}.npy", images[:size])
        done = subprocess.run(
            # -P: the folder of the script is no place to import from.
            [sys.executable, "-P", alone.__file__, form, folder, *map(str, SIZES)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise _refused(form, model, reason)
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            for size in SIZES:
                expected, found = ours(images[:size]), np.load(f"{folder}/{size}.out.npy")
                if (found.shape, found.dtype) != (expected.shape, expected.dtype):
                    raise _refused(form, model, f"it gives {found.dtype} {found.shape}")
                differences.append(np.max(np.abs(found - expected)))
    return float(np.max(differences))


def _images(side: int) -> np.ndarray:
    """Uint8 [max(SIZES), side, side, 3]: noise and smooth colors in turn."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (max(SIZES), side, side, 3), dtype=np.uint8)
    colors = rng.integers(0, 256, (len(images[1::2]), 4, 4, 3), dtype=np.uint8)
    images[1::2] = images_lib.resize(colors, side)
    return images
