"""Backbones: networks from images to features, without the linear classifier.

All backbones have the same call: `module.apply({"params": …, "batch_stats": …}, images, train,
mutable=["batch_stats"])` maps float images [n, H, W, 3] to float32 features [n, D]. All but
`linear` can also run in two parts: `until=LAYER` gives the output of a layer, and `after=LAYER`
goes on from it.

Gradient masks are regular expressions on parameter paths, so all backbones name them alike:

    stem/…                       the first convolution, in most backbones with its BatchNorm
    stage{1…}_block{0…}/…        conv1, norm1, conv2, norm2, …, shortcut (conv4: conv, norm)
    final_norm/…                 the last BatchNorm of a WideResNet or LayerNorm of a transformer

with leaves `kernel` (convolutions, dense layers), `scale` and `bias` (normalization layers; in
transformers, dense layers and patches also have a bias). Backbones for which pretrained
weights exist have four stages, so a mask by stages means a similar depth in all of them:

    resnet50            the stages of the paper
    efficientnet_lite0  stages of 3, 2, 6 and 6 blocks, which reduce the side of the image to 1/4,
                        1/8, 1/16 and 1/32. The last block is the 1x1 convolution that makes the
                        features; in all other blocks, conv2 is the depthwise convolution
    vit_…               stages of 3 blocks, a quarter of the network. A block has
                        norm1, attention/{query, key, value, out}, scale1, norm2, dense1, dense2
                        and scale2; stem/ has patches, positions, class_token and registers
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from layermatch_jax.errors import InputError, unknown
from layermatch_jax.models.efficientnet_lite import EfficientNetLite
from layermatch_jax.models.layers import Layers
from layermatch_jax.models.resnet import ResNet
from layermatch_jax.models.small import Conv4, Linear
from layermatch_jax.models.vit import VisionTransformer
from layermatch_jax.models.wide_resnet import WideResNet


def create_model(config_model: Any, axis_name: str | None = None) -> nn.Module:
    """Makes the backbone that the config names.

    Args:
      config_model: `config.model`: `name`, `dtype` and the fields that the backbone reads.
      axis_name: the device axis over which BatchNorm averages its statistics; None if the program
        sees the global batch (one device, or jit over a mesh).

    Raises:
      InputError: the name or the dtype is unknown, or the depth is not allowed.
    """
    return _lookup(_MODELS, config_model, "name")(config_model, axis_name)


def _wide_resnet(c: Any, axis_name: str | None) -> nn.Module:
    if c.depth < 10 or (c.depth - 4) % 6:
        raise InputError(
            f"--config.model.depth={c.depth} is not allowed. A WideResNet's depth must be "
            "6·b + 4 for a whole number b ≥ 1, for example 10, 16, 22 or 28"
        )
    return WideResNet(
        depth=c.depth,
        widen_factor=c.widen_factor,
        stages=c.stages,
        first_stride=c.first_stride,
        layers=_layers(c, axis_name),
        remat=c.remat,
    )


def _resnet50(c: Any, axis_name: str | None) -> nn.Module:
    return ResNet(blocks=(3, 4, 6, 3), layers=_layers(c, axis_name), remat=c.remat)


def _efficientnet_lite0(c: Any, axis_name: str | None) -> nn.Module:
    return EfficientNetLite(layers=_layers(c, axis_name), remat=c.remat)


def _vit(width: int, patch: int) -> Callable[[Any, str | None], nn.Module]:
    def create(c: Any, axis_name: str | None) -> nn.Module:
        return VisionTransformer(
            width=width,
            patch=patch,
            dtype=_lookup(_DTYPES, c, "dtype"),
            layer_scale=c.layer_scale,
            registers=c.registers,
            pool=c.pool,
            drop_path=c.drop_path,
            axis_name=axis_name,
            remat=c.remat,
        )

    return create


def _conv4(c: Any, axis_name: str | None) -> nn.Module:
    return Conv4(width=c.width, layers=_layers(c, axis_name))


def _linear(c: Any, axis_name: str | None) -> nn.Module:
    del axis_name  # no layer depends on other images of the batch
    return Linear(width=c.width, dtype=_lookup(_DTYPES, c, "dtype"))


_MODELS = {
    "wide_resnet": _wide_resnet,
    "resnet50": _resnet50,
    "efficientnet_lite0": _efficientnet_lite0,
    "vit_s14": _vit(384, 14),
    "vit_s16": _vit(384, 16),
    "vit_b14": _vit(768, 14),
    "vit_b16": _vit(768, 16),
    "conv4": _conv4,
    "linear": _linear,
}
_DTYPES = {"float32": jnp.dtype(jnp.float32), "bfloat16": jnp.dtype(jnp.bfloat16)}


def _layers(c: Any, axis_name: str | None) -> Layers:
    kept = ".*" if c.batch_stats == "kept" else c.freeze
    return Layers(_lookup(_DTYPES, c, "dtype"), c.bn_decay, c.bn_epsilon, axis_name, kept)


def _lookup(table: dict[str, Any], c: Any, field: str) -> Any:
    name = getattr(c, field)
    if name not in table:
        raise unknown(f"--config.model.{field}", name, table)
    return table[name]
