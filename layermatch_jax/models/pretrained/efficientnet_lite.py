"""Names of the weights of EfficientNet-Lite0 in EfficientNet-PyTorch and in timm."""

import itertools

from layermatch_jax.models import efficientnet_lite
from layermatch_jax.models.pretrained.tables import Family, conv, dense, norm
from layermatch_jax.models.pretrained.weights import SYMMETRIC

_BLOCKS = efficientnet_lite.block_names()
_LAST = f"block{len(_BLOCKS) - 1}"
# timm numbers the blocks within each row of table 1 of the paper.
_BEFORE = [0, *itertools.accumulate(group.blocks for group in efficientnet_lite.LITE0)]


def _timm(part: str):
    return lambda match: f"block{_BEFORE[int(match[1])] + int(match[2])}/{part}"


_EFFICIENTNET_PYTORCH = (
    *conv("_conv_stem", "stem/conv"),
    *norm("_bn0", "stem/norm"),
    *conv(r"_blocks\.(\d+)\._expand_conv", r"block\1/conv1"),
    *norm(r"_blocks\.(\d+)\._bn0", r"block\1/norm1"),
    *conv(r"_blocks\.(\d+)\._depthwise_conv", r"block\1/conv2"),
    *norm(r"_blocks\.(\d+)\._bn1", r"block\1/norm2"),
    *conv(r"_blocks\.(\d+)\._project_conv", r"block\1/conv3"),
    *norm(r"_blocks\.(\d+)\._bn2", r"block\1/norm3"),
    *conv("_conv_head", f"{_LAST}/conv"),
    *norm("_bn1", f"{_LAST}/norm"),
    *dense("_fc", "classifier"),
)
_TIMM = (
    *conv("conv_stem", "stem/conv"),
    *norm("bn1", "stem/norm"),
    # The first block has no expansion, so its layers have other numbers.
    *conv(r"blocks\.(0)\.(0)\.conv_dw", _timm("conv2")),
    *norm(r"blocks\.(0)\.(0)\.bn1", _timm("norm2")),
    *conv(r"blocks\.(0)\.(0)\.conv_pw", _timm("conv3")),
    *norm(r"blocks\.(0)\.(0)\.bn2", _timm("norm3")),
    *conv(r"blocks\.([1-6])\.(\d+)\.conv_pw", _timm("conv1")),
    *norm(r"blocks\.([1-6])\.(\d+)\.bn1", _timm("norm1")),
    *conv(r"blocks\.([1-6])\.(\d+)\.conv_dw", _timm("conv2")),
    *norm(r"blocks\.([1-6])\.(\d+)\.bn2", _timm("norm2")),
    *conv(r"blocks\.([1-6])\.(\d+)\.conv_pwl", _timm("conv3")),
    *norm(r"blocks\.([1-6])\.(\d+)\.bn3", _timm("norm3")),
    *conv("conv_head", f"{_LAST}/conv"),
    *norm("bn2", f"{_LAST}/norm"),
    *dense("classifier", "classifier"),
)


def _describe(arrays) -> str | None:
    last = arrays.get(f"{_BLOCKS[-1]}/conv/kernel")
    if last is None or last.ndim != 4:
        return None
    known = last.shape == (1, 1, 320, 1280)
    return "efficientnet_lite0" if known else "an EfficientNet of another size than Lite0"


FAMILY = Family(
    rows=_EFFICIENTNET_PYTORCH + _TIMM,
    blocks=tuple(_BLOCKS),
    dropped=r".*\.num_batches_tracked",
    classifier=r"(_fc|classifier)\..*",
    bn_epsilon=1e-3,
    normalization=lambda arrays: SYMMETRIC,
    describe=_describe,
)
