"""Names of the weights of ResNet-50 in torchvision, timm (the same) and Hugging Face."""

import collections
import re

from layermatch_jax.models.pretrained.tables import Family, conv, dense, norm
from layermatch_jax.models.pretrained.weights import IMAGENET

_NAMES: dict[tuple[bool, tuple[int, ...]], str] = {
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "a ResNet-101",
    (True, (3, 8, 36, 3)): "a ResNet-152",
    (False, (2, 2, 2, 2)): "a ResNet-18",
    (False, (3, 4, 6, 3)): "a ResNet-34",
}
_HF = r"(?:resnet\.)?"
_HF_BLOCK = _HF + r"encoder\.stages\.(\d+)\.layers\.(\d+)"


def _hf(part: str):
    def path(match):
        number = str(int(match[3]) + 1) if match.re.groups == 3 else ""
        return f"stage{int(match[1]) + 1}_block{match[2]}/{part}{number}"

    return path


_TORCHVISION = (
    *conv("conv1", "stem/conv"),
    *norm("bn1", "stem/norm"),
    *conv(r"layer(\d)\.(\d+)\.conv(\d)", r"stage\1_block\2/conv\3"),
    *norm(r"layer(\d)\.(\d+)\.bn(\d)", r"stage\1_block\2/norm\3"),
    *conv(r"layer(\d)\.(\d+)\.downsample\.0", r"stage\1_block\2/shortcut"),
    *norm(r"layer(\d)\.(\d+)\.downsample\.1", r"stage\1_block\2/shortcut_norm"),
    *dense("fc", "classifier"),
)
_HUGGING_FACE = (
    *conv(_HF + r"embedder\.embedder\.convolution", "stem/conv"),
    *norm(_HF + r"embedder\.embedder\.normalization", "stem/norm"),
    *conv(_HF_BLOCK + r"\.layer\.(\d)\.convolution", _hf("conv")),
    *norm(_HF_BLOCK + r"\.layer\.(\d)\.normalization", _hf("norm")),
    *conv(_HF_BLOCK + r"\.shortcut\.convolution", _hf("shortcut")),
    *norm(_HF_BLOCK + r"\.shortcut\.normalization", _hf("shortcut_norm")),
    *dense(r"classifier\.1", "classifier"),
)


def _describe(arrays) -> str | None:
    matches = filter(None, (re.fullmatch(r"stage(\d)_(block\d+)/conv1/kernel", p) for p in arrays))
    blocks = collections.Counter(match[1] for match in matches)
    if "stem/conv/kernel" not in arrays or not blocks:
        return None
    counts = tuple(blocks[stage] for stage in sorted(blocks))
    bottleneck = "stage1_block0/conv3/kernel" in arrays
    return _NAMES.get((bottleneck, counts), f"a ResNet with {counts} blocks in its stages")


FAMILY = Family(
    rows=_TORCHVISION + _HUGGING_FACE,
    blocks=(),
    dropped=r".*\.num_batches_tracked",
    classifier=r"(fc|classifier\.1)\..*",
    bn_epsilon=1e-5,
    normalization=lambda arrays: IMAGENET,
    describe=_describe,
)
