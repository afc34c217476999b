"""CIFAR-100, WRN-28-8.

Command:   python -m layermatch_jax.main --config=cifar100
           ...:labels=2500,method=fixmatch
Labels:    400 (default), 2500 or 10000.
Cost:      2^20 steps of 960 images, 3.36 GMAC each: about 20 EFLOP a run. Published: 0.5-1.0 s a
           step on one GPU (ShrinkMatch's logs), ten V100-days (USB). Not measured here on a GPU.
Published: error %, best on test, 3 seeds: FixMatch 46.42 / 28.03 / 22.20, FlexMatch 39.94 / 26.49 /
           21.90 (TorchSSL), FreeMatch 37.98 / 26.47 / 21.68, SoftMatch 37.10 (400). With WRN-28-2
           the published errors are 7 points higher: do not compare the two networks.
"""

import ml_collections

from layermatch_jax import config as config_lib
from layermatch_jax import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = config_lib.base()
    config.dataset.name = "cifar100"
    config.dataset.num_labels = 400
    config.model.widen_factor = 8
    config.optimizer.weight_decay = 1e-3
    return presets.apply_arg(config, arg)
