"""Small timm networks with reproducible weights.

`python tests/models/networks_of_others.py` writes networks_of_others.npz: the names and shapes of
their weights, and their features of four images. The file was written with timm 1.0.31 and torch
2.13.0 on a CPU. Only writing it needs these libraries.
"""

import json
import pathlib
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from layermatch_jax.models import efficientnet_lite, pretrained
from layermatch_jax.models.layers import Layers
from layermatch_jax.models.pretrained.tables import Family
from layermatch_jax.models.resnet import ResNet
from layermatch_jax.models.vit import VisionTransformer, block_names

FILE = pathlib.Path(__file__).with_suffix(".npz")
FLOAT32 = jnp.dtype("float32")


class Case(NamedTuple):
    """A network of this package, and the same network in timm."""

    module: Any
    family: Family
    side: int
    theirs: Callable


def _timm_lite0():
    import timm

    return timm.create_model("tf_efficientnet_lite0", num_classes=0)


def _timm_resnet():
    from timm.models import resnet

    return resnet.ResNet(resnet.Bottleneck, (1, 2, 1, 1), num_classes=0)


def _timm_vit(**options):
    from timm.models import vision_transformer

    return vision_transformer.VisionTransformer(
        img_size=24, patch_size=8, embed_dim=128, depth=4, num_heads=2, num_classes=0, **options
    )


def _vit(**options):
    return VisionTransformer(width=128, patch=8, depth=4, dtype=FLOAT32, **options)


_RESNET = pretrained.FAMILIES["resnet50"]
_VIT = pretrained.FAMILIES["vit_s16"]._replace(blocks=tuple(block_names(4)))
CASES = {
    "efficientnet_lite0": Case(
        efficientnet_lite.EfficientNetLite(Layers(FLOAT32, 0.9, 1e-3)),
        pretrained.FAMILIES["efficientnet_lite0"],
        64,
        _timm_lite0,
    ),
    "resnet": Case(
        ResNet(blocks=(1, 2, 1, 1), layers=Layers(FLOAT32, 0.9, 1e-5)),
        *(_RESNET, 64, _timm_resnet),
    ),
    "augreg": Case(_vit(), _VIT, 24, _timm_vit),
    "average": Case(
        _vit(pool="average"),
        *(_VIT, 24, lambda: _timm_vit(class_token=False, global_pool="avg", fc_norm=False)),
    ),
    "dinov2": Case(_vit(layer_scale=True), _VIT, 24, lambda: _timm_vit(init_values=1e-5)),
    "dinov2_registers": Case(
        _vit(layer_scale=True, registers=4),
        *(_VIT, 24, lambda: _timm_vit(init_values=1e-5, reg_tokens=4, no_embed_class=True)),
    ),
}


def random_weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Makes weights with these names, none at its default; the same on every machine."""

    def draw(name, shape):
        # NumPy guarantees that the random numbers of RandomState never change.
        rng = np.random.RandomState(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            return np.zeros(shape, np.int64)
        if name.endswith("running_var"):
            return rng.uniform(0.5, 2, shape).astype(np.float32)
        normal = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            return 0.3 * normal + name.endswith(("weight", "gamma"))
        fan_in = 4 if len(shape) == 3 else np.prod(shape[1:])
        return (normal / np.sqrt(fan_in)).astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes.items()}


def images(side: int, count: int = 4) -> np.ndarray:
    """[count, side, side, 3] float32."""
    rng = np.random.RandomState(side)
    return rng.standard_normal((count, side, side, 3)).astype(np.float32)


def of_theirs(model) -> tuple[dict[str, np.ndarray], Callable]:
    """Sets the weights of a timm network; returns them and (images, train) -> features."""
    import torch

    shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
    weights = random_weights(shapes)
    model.load_state_dict({name: torch.tensor(x) for name, x in weights.items()})

    def apply(x, train):
        model.train(train)
        with torch.no_grad():
            return model(torch.tensor(x).permute(0, 3, 1, 2)).numpy()

    return weights, apply


def write() -> None:
    """Writes FILE."""
    stored = {}
    for name, case in CASES.items():
        weights, apply = of_theirs(case.theirs())
        shapes = json.dumps({key: x.shape for key, x in weights.items()}).encode()
        stored[f"{name}/shapes"] = np.frombuffer(shapes, np.uint8)
        for train in (False, True):  # in this order: training changes the statistics
            stored[f"{name}/{train}"] = apply(images(case.side), train)[:, :16]
    np.savez_compressed(FILE, **stored)


if __name__ == "__main__":
    write()
