"""What a backbone starts from."""

from typing import Any, NamedTuple


class Normalization(NamedTuple):
    """What weights expect of images."""

    mean: tuple[float, ...]  # of red, green and blue, where white is 1
    std: tuple[float, ...]
    resize: str  # the filter that images were resized by: bicubic, bilinear, …


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic")
# From -1 to 1, as TensorFlow's and big_vision's models are trained.
SYMMETRIC = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")


class Weights(NamedTuple):
    """A backbone's weights, by the paths of this package, and where they come from."""

    params: dict[str, Any]  # {"stem/conv/kernel": float32 NumPy array, …}
    batch_stats: dict[str, Any]  # {"stem/norm/mean": …}; {} without BatchNorm
    classifier: dict[str, Any] | None  # {"kernel": [D, K], "bias": [K]}
    class_names: tuple[str, ...] | None  # of the classifier's outputs, where they are known
    bn_epsilon: float | None  # that BatchNorm needs with them; None without BatchNorm
    normalization: Normalization
    looks_like: str  # what network has such weights, in words
    source: str  # the file, the package and its version, or the run
    sha256: str  # of the file
    license: str
    notes: tuple[str, ...] = ()  # what the user should know of what was dropped or assumed

    def record(self) -> dict[str, Any]:
        """What a run keeps of it, for JSON."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "license": self.license,
            "mean": list(self.normalization.mean),
            "std": list(self.normalization.std),
            "resize": self.normalization.resize,
            "notes": list(self.notes),
        }
