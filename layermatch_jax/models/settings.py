"""The settings of the backbones, with their defaults and bounds: config.model."""

from layermatch_jax.setting import Setting, decay

SETTINGS: dict[str, Setting] = {
    "model.name": Setting(
        "wide_resnet",
        "Backbone: wide_resnet, resnet50, efficientnet_lite0, vit_s14, vit_s16, vit_b14, vit_b16 "
        "(transformers with patches of 14 or 16 pixels), conv4 or linear.",
    ),
    "model.pretrained": Setting(
        "",
        "Weights that the backbone starts from: the path of a file, the folder of another run, or "
        "a name (imagenet: weights of EfficientNet-Lite0 from a package). '': random weights.",
    ),
    "model.head_init": Setting(
        None,
        "Classifier that the run starts with. random; zeros; weights: that of the pretrained "
        "weights if it has all classes of the run, by name, else probe; probe: logistic regression "
        "on the features of the labeled images; self_training: the same, also on the unlabeled "
        "images with their pseudo-labels. Automatic: weights with model.pretrained, else random.",
        choices=("random", "zeros", "weights", "probe", "self_training"),
        kind=str,
    ),
    "model.freeze": Setting(
        "",
        "Regular expression on whole parameter paths: these parameters are not trained, neither by "
        "labels nor by pseudo-labels, and their BatchNorm keeps its running statistics. '': none; "
        "backbone/.*: all but the classifier; backbone/(stem|stage[1-3]).*: up to stage 3.",
    ),
    "model.batch_stats": Setting(
        "batch",
        "Statistics by which BatchNorm normalizes in training. batch: those of the batch, which "
        "also update the running ones; kept: the running ones of the pretrained weights, which do "
        "not change.",
        choices=("batch", "kept"),
    ),
    "model.drop_path": Setting(
        0.0,
        "For vit: probability that a branch of the last block is dropped for an image in training "
        "(Huang 2016, arXiv 1603.09382). It grows linearly from 0 in the first block.",
        low=0,
        below=1,
    ),
    "model.depth": Setting(28, "For wide_resnet: depth, 10, 16, 22, 28, …"),
    "model.widen_factor": Setting(
        2, "For wide_resnet: the stages have 16, 32, 64, … channels times this.", low=1
    ),
    "model.stages": Setting(
        3, "For wide_resnet: number of stages; 4 in the config stl10.", low=1, high=4
    ),
    "model.first_stride": Setting(
        1, "For wide_resnet: stride of the first stage; 2 in the config stl10.", low=1
    ),
    "model.width": Setting(
        32, "For conv4: channels of the first convolution. For linear: number of features.", low=1
    ),
    "model.registers": Setting(
        0, "For vit: number of register tokens; DINOv2 with registers has 4.", low=0
    ),
    "model.layer_scale": Setting(
        False,
        "For vit: whether each block has LayerScale, learned factors per feature, as DINOv2 has.",
    ),
    "model.pool": Setting(
        "token",
        "For vit: source of the features. token: the class token; average: the mean over the "
        "patches, without a class token.",
        choices=("token", "average"),
    ),
    "model.dtype": Setting(
        "float32",
        "Type in which the backbone computes; the parameters stay float32.",
        choices=("float32", "bfloat16"),
    ),
    "model.bn_decay": decay("BatchNorm's running statistics"),
    "model.bn_epsilon": Setting(
        None,
        "Number that BatchNorm adds to variances. Automatic: 0.001; 0.00001 for a resnet50 that "
        "starts from pretrained weights, because they were trained with it.",
        above=0,
        kind=float,
    ),
    "model.remat": Setting(
        False, "Whether the backward pass computes blocks again: less memory, more time."
    ),
}
