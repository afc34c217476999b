"""Names of the weights of vision transformers in timm, DINOv2, Hugging Face and big_vision."""

import re

import numpy as np

from layermatch_jax.models import vit
from layermatch_jax.models.pretrained.tables import Family, Row, conv, dense, norm
from layermatch_jax.models.pretrained.weights import IMAGENET, SYMMETRIC

DEPTH = 12  # of ViT-S and ViT-B
_NAMES = {(384, 14): "vit_s14", (384, 16): "vit_s16", (768, 14): "vit_b14", (768, 16): "vit_b16"}
_QKV = tuple(rf"block\1/attention/{name}" for name in ("query", "key", "value"))
_HF = r"(?:vit\.|dinov2\.|dinov2_with_registers\.)?"
_HF_BLOCK = _HF + r"encoder\.layer\.(\d+)\."
_BV = r"(?:params/|opt/target/)?"
_BV_BLOCK = _BV + r"Transformer/encoderblock_(\d+)/"

# The names of timm, and those of DINOv2's own code where they differ.
_TIMM = (
    Row("cls_token", "stem/class_token"),
    Row("pos_embed", "stem/positions"),
    Row("reg_token|register_tokens", "stem/registers"),
    *conv(r"patch_embed\.proj", "stem/patches"),
    *norm(r"blocks\.(\d+)\.norm(\d)", r"block\1/norm\2"),
    Row(
        r"blocks\.(\d+)\.attn\.qkv\.weight",
        tuple(f"{path}/kernel" for path in _QKV),
        lambda x: x.reshape(3, -1, x.shape[1]).transpose(0, 2, 1),
    ),
    Row(
        r"blocks\.(\d+)\.attn\.qkv\.bias",
        tuple(f"{path}/bias" for path in _QKV),
        lambda x: x.reshape(3, -1),
    ),
    *dense(r"blocks\.(\d+)\.attn\.proj", r"block\1/attention/out"),
    *dense(r"blocks\.(\d+)\.mlp\.fc(\d)", r"block\1/dense\2"),
    Row(r"blocks\.(\d+)\.ls(\d)\.gamma", r"block\1/scale\2/scale"),
    *norm("norm", "final_norm"),
    *dense("head", "classifier"),
)
_HUGGING_FACE = (
    Row(_HF + r"embeddings\.cls_token", "stem/class_token"),
    Row(_HF + r"embeddings\.position_embeddings", "stem/positions"),
    Row(_HF + r"embeddings\.register_tokens", "stem/registers"),
    *conv(_HF + r"embeddings\.patch_embeddings\.projection", "stem/patches"),
    *norm(_HF_BLOCK + r"layernorm_before", r"block\1/norm1"),
    *norm(_HF_BLOCK + r"layernorm_after", r"block\1/norm2"),
    *norm(_HF_BLOCK + r"norm(\d)", r"block\1/norm\2"),
    *dense(_HF_BLOCK + r"attention\.attention\.(query|key|value)", r"block\1/attention/\2"),
    *dense(_HF_BLOCK + r"attention\.output\.dense", r"block\1/attention/out"),
    *dense(_HF_BLOCK + r"intermediate\.dense", r"block\1/dense1"),
    *dense(_HF_BLOCK + r"output\.dense", r"block\1/dense2"),
    *dense(_HF_BLOCK + r"mlp\.fc(\d)", r"block\1/dense\2"),
    Row(_HF_BLOCK + r"layer_scale(\d)\.lambda1", r"block\1/scale\2/scale"),
    *norm(_HF + r"layernorm", "final_norm"),
    *dense("classifier", "classifier"),
)
_ATTENTION = _BV_BLOCK + r"MultiHeadDotProductAttention_\d/"
# The module numbers in big_vision and in vision_transformer (augreg) differ.
_BIG_VISION = (
    Row(_BV + "cls", "stem/class_token"),
    Row(_BV + "(?:pos_embedding|Transformer/posembed_input/pos_embedding)", "stem/positions"),
    Row(_BV + "embedding/(kernel|bias)", r"stem/patches/\1"),
    Row(_BV_BLOCK + "LayerNorm_0/(scale|bias)", r"block\1/norm1/\2"),
    Row(_BV_BLOCK + "LayerNorm_[12]/(scale|bias)", r"block\1/norm2/\2"),
    Row(
        _ATTENTION + "(query|key|value)/kernel",  # [D, heads, features of a head]
        r"block\1/attention/\2/kernel",
        lambda x: x.reshape(len(x), -1),
    ),
    Row(_ATTENTION + "(query|key|value)/bias", r"block\1/attention/\2/bias", np.ravel),
    Row(
        _ATTENTION + "out/kernel",
        r"block\1/attention/out/kernel",
        lambda x: x.reshape(-1, x.shape[-1]),
    ),
    Row(_ATTENTION + "out/bias", r"block\1/attention/out/bias"),
    Row(_BV_BLOCK + r"MlpBlock_\d/Dense_0/(kernel|bias)", r"block\1/dense1/\2"),
    Row(_BV_BLOCK + r"MlpBlock_\d/Dense_1/(kernel|bias)", r"block\1/dense2/\2"),
    Row(_BV + "Transformer/encoder_norm/(scale|bias)", r"final_norm/\1"),
    Row(_BV + "head/(kernel|bias)", r"classifier/\1"),
)


def _own_position(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds the class token's position embedding to it: the network only uses their sum."""
    positions, token = arrays.get("stem/positions"), arrays.get("stem/class_token")
    if positions is None or token is None:
        return arrays
    count = positions.shape[1]
    if round(count**0.5) ** 2 == count:  # only patches have positions
        return arrays
    return arrays | {
        "stem/class_token": token + positions[:, :1],
        "stem/positions": positions[:, 1:],
    }


def _describe(arrays) -> str | None:
    kernel = arrays.get("stem/patches/kernel")
    if kernel is None or kernel.ndim != 4:
        return None
    patch, width = kernel.shape[0], kernel.shape[-1]
    blocks = {path.split("/")[0] for path in arrays if re.match(r"(stage\d_)?block\d", path)}
    name = _NAMES.get((width, patch)) if len(blocks) == DEPTH else None
    if name is None:
        return f"a transformer of {len(blocks)} blocks, {width} features and patches of {patch} px"
    registers = arrays.get("stem/registers", np.zeros((1, 0, width))).shape[1]
    scaled = any("/scale1/" in path for path in arrays)
    pool = "token" if "stem/class_token" in arrays else "average"
    return f"{name}, with layer_scale={scaled}, registers={registers}, pool={pool}"


FAMILY = Family(
    rows=_TIMM + _HUGGING_FACE + _BIG_VISION,
    blocks=tuple(vit.block_names(DEPTH)),
    # Used only in DINOv2's training, or only by the file's own classifier.
    dropped=rf"mask_token|{_HF}embeddings\.mask_token|{_HF}pooler\.dense\..*|{_BV}pre_logits/.*",
    classifier=rf"(head|classifier)\..*|{_BV}head/.*",
    bn_epsilon=None,
    # DINOv2, the models with LayerScale, was trained with IMAGENET; augreg with SYMMETRIC.
    normalization=lambda arrays: IMAGENET if any("/scale1/" in p for p in arrays) else SYMMETRIC,
    describe=_describe,
    finish=_own_position,
)
