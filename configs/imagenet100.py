"""ImageNet-100 at 224 pixels, ResNet-50: an image folder with a class list.

Command:   python -m layermatch_jax.main --config=imagenet100:labels=10% \
               --config.dataset.data_dir=/data/imagenet --config.dataset.class_list=classes.txt
Data:      data_dir/train/<class>/*.JPEG and data_dir/val/<class>/*.JPEG; the class list has
           one class folder on each line. Papers use several lists of 100 classes: report yours.
Labels:    1% or 10% (default) of each class.
Cost:      2^20 steps of 960 images, 4.09 GMAC each: about 25 EFLOP a run. Not measured here.
Published: LayerMatch reports results on ImageNet-100; its numbers were not available.
"""

import ml_collections

from layermatch_jax import config as config_lib
from layermatch_jax import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = config_lib.base()
    config.dataset.name = "folder"
    config.dataset.label_fraction = 0.1
    config.dataset.stored_size = 256
    config.dataset.image_size = 224
    config.dataset.padding = 0
    config.model.name = "resnet50"
    config.model.dtype = "bfloat16"
    config.optimizer.weight_decay = 3e-4
    return presets.apply_arg(config, arg)
