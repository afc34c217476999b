"""A model as StableHLO, by jax.export: a zip file that jax can run without this package.

It holds `model.stablehlo` (of `jax.export.Exported.serialize`) and `layermatch.json`
(`function.told`), both uncompressed.
"""

import io
import json
import zipfile

import jax
import numpy as np
from jax import export

from layermatch_jax.after.export import function, writing
from layermatch_jax.after.model import Model

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, TOLD = "model.stablehlo", f"{function.ENTRY}.json"


def write(model: Model, path: str) -> None:
    """Exports a model for any number of images, on a CPU, GPU (CUDA) or TPU.

    Raises:
      InputError: as of `writing.write`.
    """
    writing.write(model, path, "stablehlo", _content)


def _content(model: Model) -> bytes:
    size = model.image_size
    images = jax.ShapeDtypeStruct(export.symbolic_shape(f"n, {size}, {size}, 3"), np.uint8)
    named = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)  # else it names the files of our code
    try:
        program = export.export(jax.jit(function.of_images(model)), platforms=PLATFORMS)(images)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", named)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:  # the same model makes the same bytes: no dates
        file.writestr(zipfile.ZipInfo(PROGRAM), bytes(program.serialize()))
        told = json.dumps(function.told(model), indent=2, sort_keys=True)
        file.writestr(zipfile.ZipInfo(TOLD), told)
    return content.getvalue()
