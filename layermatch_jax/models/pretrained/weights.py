"""Pretrained weights of a backbone, and the normalization of images that they need."""

from typing import Any, NamedTuple


class Normalization(NamedTuple):
    """How weights expect images to be normalized and resized."""

    mean: tuple[float, ...]  # of red, green and blue; white is 1
    std: tuple[float, ...]
    resize: str  # the filter for resizing images: bicubic, bilinear, …


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic")
# Maps [0, 1] to [-1, 1], as for models of TensorFlow and big_vision.
SYMMETRIC = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")


class Weights(NamedTuple):
    """A backbone's weights, by the paths of this package, and where they come from."""

    params: dict[str, Any]  # {"stem/conv/kernel": float32 NumPy array, …}
    batch_stats: dict[str, Any]  # {"stem/norm/mean": …}; {} without BatchNorm
    classifier: dict[str, Any] | None  # {"kernel": [D, K], "bias": [K]}
    class_names: tuple[str, ...] | None  # of the classifier's outputs, if known
    bn_epsilon: float | None  # the epsilon that BatchNorm needs; None without BatchNorm
    normalization: Normalization
    looks_like: str  # the network to which they belong, in words
    source: str  # the file, the package and its version, or the run
    sha256: str  # of the file
    license: str
    notes: tuple[str, ...] = ()  # for the user: what was dropped or assumed

    def record(self) -> dict[str, Any]:
        """Returns what a run stores about its weights, as JSON-compatible values."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "license": self.license,
            "mean": list(self.normalization.mean),
            "std": list(self.normalization.std),
            "resize": self.normalization.resize,
            "notes": list(self.notes),
        }
