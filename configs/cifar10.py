"""CIFAR-10, WRN-28-2: the field's classic setting.

Command:   python -m layermatch_jax.main --config=cifar10:labels=40,method=layermatch
Labels:    40, 250 (default) or 4000.
Cost:      2^20 steps of 960 images, 214 MMAC each: about 1.3 EFLOP a run. Published: 0.21 s a step,
           63 h, on one GPU (ShrinkMatch's logs). Not measured here on a GPU or TPU.
Published: error %, best on test, 3 seeds: FixMatch 7.47 / 4.86 / 4.21, FlexMatch 4.97 / 4.98 / 4.19
           (TorchSSL), FreeMatch 4.90 / 4.88 / 4.10. LayerMatch's own table was not available.
"""

import ml_collections

from layermatch_jax import config as config_lib
from layermatch_jax import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = config_lib.base()
    config.dataset.name = "cifar10"
    config.dataset.num_labels = 250
    config.optimizer.weight_decay = 5e-4
    return presets.apply_arg(config, arg)
