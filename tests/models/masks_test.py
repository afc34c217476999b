"""Tests that named gradient masks select the same stages in all pretrained networks."""

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util

from layermatch_jax import automatic, config, presets
from layermatch_jax.method import layerwise
from layermatch_jax.models import create_model

# Number of blocks in each stage.
NETWORKS = {
    "resnet50": (3, 4, 6, 3),
    "efficientnet_lite0": (3, 2, 6, 6),
    "vit_s16": (3, 3, 3, 3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_masks_by_stage(name):
    c = config.base()
    c.model.name = name
    module = create_model(automatic.resolve(c).model)
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    params = {"backbone": shapes["params"], "classifier": {"kernel": 0.0, "bias": 0.0}}
    for stage, blocks in enumerate(NETWORKS[name], 1):
        found = {
            path.split("_")[1] for path in shapes["params"] if path.startswith(f"stage{stage}")
        }
        assert found == {f"block{i}" for i in range(blocks)}

    def untrained(mask):
        """Returns the parts of the network in which all parameters have the multiplier 0."""
        multipliers = layerwise.mask_multipliers(presets.MASKS[mask], params)
        by_part = {}
        for path, x in traverse_util.flatten_dict(multipliers, sep="/").items():
            part = path.removeprefix("backbone/").split("/")[0].split("_block")[0]
            by_part.setdefault(part, set()).add(x)
        return {part for part, values in by_part.items() if values == {0.0}}

    last = {"classifier"} | {"final_norm"} & shapes["params"].keys()
    assert untrained("from_stage4") == {"stage4"} | last
    assert untrained("to_stage2") == {"stem", "stage1", "stage2"}
    assert untrained("backbone") == {"stem", "stage1", "stage2", "stage3", "stage4"} | (
        last - {"classifier"}
    )
