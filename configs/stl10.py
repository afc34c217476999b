"""STL-10 at 96 pixels, with its 100,000 unlabeled images: a WRN with four stages.

Command:   python -m layermatch_jax.main --config=stl10
Labels:    40, 250 or 1000 (default).
Cost:      2^20 steps of 960 images, 646 MMAC each: about 3.9 EFLOP a run; 3 GB of host memory for
           the images. Published: 0.55 s a step on one GPU (ShrinkMatch's logs). Not measured here.
Published: error %, best on test, 3 seeds: FixMatch 35.97 (40) / 6.25 (1000), FlexMatch 29.15 / 5.77
           (TorchSSL), FreeMatch 15.56 (40), SoftMatch 5.73 (1000). Best and last accuracy differ
           by up to 33 points here. A public report found duplicates of most test images among the
           unlabeled ones; see --config.dataset.drop_test_duplicates.
"""

import ml_collections

from layermatch_jax import config as config_lib
from layermatch_jax import presets


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = config_lib.base()
    config.dataset.name = "stl10"
    config.dataset.num_labels = 1000
    config.dataset.stored_size = config.dataset.image_size = 96
    config.dataset.padding = 12
    # The field's WRN-37-2 variant: 32, 64, 128, 256 channels. TorchSSL and USB start with stride 2
    # (646 MMAC an image); the FixMatch paper's own code with stride 1 (2.57 GMAC).
    config.model.stages = 4
    config.model.first_stride = 2
    config.optimizer.weight_decay = 5e-4
    return presets.apply_arg(config, arg)
