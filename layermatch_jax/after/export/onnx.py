"""A model as ONNX, by jax2onnx: a file that onnxruntime can run without jax and this package.

The metadata have one entry, `layermatch`: JSON of `function.told`.
"""

import json
import logging

import jax
import numpy as np

from layermatch_jax.after.export import function, writing
from layermatch_jax.after.model import Model
from layermatch_jax.errors import InputError


def write(model: Model, path: str) -> None:
    """Exports a model for any number of images.

    Raises:
      InputError: as of `writing.write`; or jax2onnx or onnxruntime is not installed.
    """
    writing.write(model, path, "onnx", _content)


def _content(model: Model) -> bytes:
    try:
        import jax2onnx
        import onnxruntime  # noqa: F401  (the check needs it)
    except ImportError as error:
        raise InputError(
            f"--format=onnx needs more packages ({error}). Install this package in a new "
            "environment, and then: pip install 'jax2onnx>=0.17' onnxruntime. That installs an "
            "older Orbax, so do not train with several processes in that environment"
        ) from error
    size = model.image_size
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # warns of shapes that it leaves out
    graph = jax2onnx.to_onnx(
        function.of_images(model),
        [jax.ShapeDtypeStruct(("n", size, size, 3), np.uint8)],
        model_name=function.ENTRY,
        input_names=[function.INPUT],
        output_names=[function.OUTPUT],
    )
    # Shapes of inner arrays are optional. jax2onnx 0.17 moves transpositions and leaves the shapes
    # of before, which onnxruntime refuses.
    del graph.graph.value_info[:]
    told = graph.metadata_props.add()
    told.key, told.value = function.ENTRY, json.dumps(function.told(model), sort_keys=True)
    return graph.SerializeToString(deterministic=True)
