"""Runs an exported model with its runtime alone: a script that must not import this package.

    python -P alone.py FORM FOLDER SIZE…

For each size, it applies FOLDER/model to the images FOLDER/SIZE.npy, and writes the probabilities
to FOLDER/SIZE.out.npy.
"""

import importlib.abc
import sys
import zipfile

import numpy as np

# What the files have to do without; importing it fails here.
_OURS = ("layermatch_jax", "flax", "optax", "orbax", "ml_collections", "jax2onnx")


class _Blocked(importlib.abc.MetaPathFinder):
    def __init__(self, names):
        self.names = names

    def find_spec(self, fullname, path=None, target=None):
        """Finds no module, and ends the search for the blocked ones."""
        if fullname.split(".")[0] in self.names:
            raise ImportError(f"{fullname} is not there")


def _stablehlo(path):
    from jax import export

    with zipfile.ZipFile(path) as file:
        return export.deserialize(bytearray(file.read("model.stablehlo"))).call


def _onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["probabilities"], {"images": images})[0]


# By the form: what reads a file, giving a function of images, and what it must not import.
RUNTIMES = {"stablehlo": (_stablehlo, _OURS), "onnx": (_onnx, (*_OURS, "jax", "jaxlib"))}


def _main(form, folder, *sizes):
    read, blocked = RUNTIMES[form]
    sys.meta_path.insert(0, _Blocked(blocked))
    function = read(f"{folder}/model")
    for size in sizes:
        np.save(f"{folder}/{size}.out.npy", function(np.load(f"{folder}/{size}.npy")))


if __name__ == "__main__":
    _main(*sys.argv[1:])
