"""Tests masks and centers separately by hand-computed numbers; steps_centers_test.py, in steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layermatch_jax import automatic, models, presets
from layermatch_jax import config as config_lib
from layermatch_jax.errors import InputError
from layermatch_jax.method import avg_clustering, layerwise, linear_head

PARAMS = {
    "backbone": {"stem": {"kernel": 0.0, "bias": 0.0}, "block1": {"kernel": 0.0}},
    "classifier": {"kernel": 0.0, "bias": 0.0},
}


def multipliers(stem, stem_bias, block, kernel, bias):
    return {
        "backbone": {"stem": {"kernel": stem, "bias": stem_bias}, "block1": {"kernel": block}},
        "classifier": {"kernel": kernel, "bias": bias},
    }


# ---------------------------------------------------------------------------------------------
# Masks.


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ((), multipliers(1, 1, 1, 1, 1)),
        (presets.GRAD_RELU, multipliers(1, 1, 1, 0, 0)),
        # The first match counts; later matches have no effect.
        ((("backbone/stem/bias", 0.5), ("backbone/.*", 0.25)), multipliers(0.25, 0.5, 0.25, 1, 1)),
        ((("backbone/.*", 0.25), ("backbone/stem/bias", 0.5)), multipliers(0.25, 0.25, 0.25, 1, 1)),
        ((("classifier/bias", 0), (".*/bias", 0.5)), multipliers(1, 0.5, 1, 1, 0)),
        # An expression must match the whole path, not a prefix.
        ((("backbone/stem/kernel|backbone/block1", 0.5),), multipliers(0.5, 1, 1, 1, 1)),
        (((r".*/(stem|block\d)/kernel", 0.125),), multipliers(0.125, 1, 0.125, 1, 1)),
    ],
)
def test_multipliers(mask, expected):
    actual = layerwise.mask_multipliers(mask, PARAMS)
    assert actual == expected
    assert all(isinstance(leaf, float) for leaf in jax.tree.leaves(actual))


@pytest.mark.parametrize(
    "pattern",
    ["classifier", "kernel", "/stem/", "ackbone/.*", "backbone/.*/kerne", "Classifier/.*"],
)
def test_an_expression_must_match_a_whole_path(pattern):
    with pytest.raises(InputError) as error:
        layerwise.mask_multipliers(((".*", 1.0), (pattern, 0.0)), PARAMS)
    message = str(error.value)
    assert repr(pattern) in message
    for path in (
        "backbone/stem/kernel",
        "backbone/stem/bias",
        "backbone/block1/kernel",
        "classifier/kernel",
        "classifier/bias",
    ):
        assert f"\n  {path}" in message


def test_the_presets_masks():
    masks = {
        name: presets.apply_method(config_lib.base(), name).layerwise.gradient_mask
        for name in ("fixmatch", "grad_relu", "avg_clustering", "layermatch")
    }
    grad_relu = (("classifier/.*", 0.0),)
    assert masks == {
        "fixmatch": (),
        "grad_relu": grad_relu,
        "avg_clustering": (),
        "layermatch": grad_relu,
    }


STAGES = ("stem", "stage1", "stage2", "stage3", "stage4", "final_norm", "classifier")


@pytest.mark.parametrize(
    ("model", "stages"),
    [
        ({"name": "wide_resnet", "depth": 10}, 3),
        ({"name": "wide_resnet", "depth": 10, "stages": 4}, 4),
        ({"name": "resnet50"}, 4),
        ({"name": "conv4"}, 3),
    ],
)
def test_the_named_masks_on_every_backbone(model, stages):
    """Each mask must remove or keep every part of the network as a whole."""
    config = config_lib.base()
    config.model.update(model)
    config = automatic.resolve(config)
    backbone, images = models.create_model(config.model), jnp.zeros((1, 32, 32, 3))
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda: backbone.init(key, images, train=False))
    params = {"backbone": variables["params"], "classifier": PARAMS["classifier"]}

    def left(mask):
        left = {}
        for path, multiplier in jax.tree_util.tree_leaves_with_path(
            layerwise.mask_multipliers(presets.MASKS[mask], params)
        ):
            keys = [key.key for key in path]
            part = keys[0] if keys[0] == "classifier" else keys[1].split("_block")[0]
            left.setdefault(part, set()).add(multiplier)
        assert all(len(multipliers) == 1 for multipliers in left.values())
        return {part: multipliers.pop() for part, multipliers in left.items()}

    there = [part for part in STAGES if part in left("none")]
    assert len(left("none")) == len(there) == stages + 2 + (model["name"] == "wide_resnet")
    without = {
        "none": (),
        "classifier": ("classifier",),
        "from_stage4": ("stage4", "final_norm", "classifier"),
        "from_stage3": ("stage3", "stage4", "final_norm", "classifier"),
        "from_stage2": ("stage2", "stage3", "stage4", "final_norm", "classifier"),
        "everything": STAGES,
        "to_stage1": ("stem", "stage1"),
        "to_stage2": ("stem", "stage1", "stage2"),
        "backbone": STAGES[:-1],
    }
    for mask, masked in without.items():
        if mask == "from_stage4" and stages == 3:
            with pytest.raises(InputError, match=r"'backbone/stage4.\*' matches no parameter"):
                left(mask)
        else:
            assert left(mask) == {part: float(part not in masked) for part in there}
    halved = {part: 0.5 if part == "classifier" else 1.0 for part in there}
    assert left("half_classifier") == halved
    assert {*without, "half_classifier"} == {*presets.MASKS}


class PullBack:
    """Maps z to (3 z, 5 z, 7 z) for the three backbone parameters; counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, z):
        self.calls += 1
        return ({"stem": {"kernel": 3 * z, "bias": 5 * z}, "block1": {"kernel": 7 * z}},)


def of_both(kernel, bias, features):
    return layerwise.HeadGradients({"classifier": {"kernel": kernel, "bias": bias}}, features)


def put_together(mask, unsupervised_kernel=10.0):
    pull_back = PullBack()
    gradients = layerwise.masked_gradients(
        pull_back,
        of_both(1.0, 2.0, features=100.0),
        of_both(unsupervised_kernel, 20.0, features=1000.0),
        layerwise.mask_multipliers(mask, PARAMS),
    )
    return gradients, pull_back.calls


@pytest.mark.parametrize(
    ("mask", "expected", "pull_backs"),
    [
        ((), multipliers(3300, 5500, 7700, 11, 22), 1),
        (presets.GRAD_RELU, multipliers(3300, 5500, 7700, 1, 2), 1),
        ((("classifier/bias", 0.5),), multipliers(3300, 5500, 7700, 11, 12), 1),
        ((("backbone/.*", 0.5),), multipliers(1800, 3000, 4200, 11, 22), 1),
        ((("backbone/.*", 0.0),), multipliers(300, 500, 700, 11, 22), 1),
        ((("backbone/stem/.*", 0.5),), multipliers(1800, 3000, 7700, 11, 22), 2),
        ((("backbone/block1/.*", 0.0), (".*", 0.5)), multipliers(1800, 3000, 700, 6, 12), 2),
    ],
)
def test_gradients_are_mixed_by_layer_with_as_few_pull_backs_as_can_be(mask, expected, pull_backs):
    gradients, calls = put_together(mask)
    assert gradients == expected
    assert calls == pull_backs


def test_a_multiplier_of_zero_is_an_exact_zero_even_of_infinity():
    gradients, _ = put_together(presets.GRAD_RELU, unsupervised_kernel=float("inf"))
    assert gradients["classifier"] == {"kernel": 1.0, "bias": 2.0}


def test_linear():
    classifier = {"kernel": jnp.array([[1.0, 2.0, 0.0], [0.0, -1.0, 4.0]]), "bias": jnp.arange(3.0)}
    features = jnp.array([[1.0, 0.0], [2.0, -0.5]])
    np.testing.assert_array_equal(
        linear_head.linear(classifier, features), [[1, 3, 2], [2, 5.5, 0]]
    )


# ---------------------------------------------------------------------------------------------
# Centers.


def reading(centers, train_steps=2**20, momentum=None, target_head="classifier", warm_up=10.0):
    config = config_lib.base()
    assert config.avg_clustering.warm_up == 10.0
    config.avg_clustering.warm_up = warm_up
    config.train_steps = train_steps
    config.avg_clustering.centers = centers
    config.avg_clustering.momentum = momentum
    config.avg_clustering.target_head = target_head
    return avg_clustering.create_centers(automatic.resolve(config))


CLASSIFIER = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]]), "bias": jnp.ones(2)}
AVERAGED = {"kernel": jnp.array([[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]]), "bias": jnp.zeros(2)}
FEATURES = jnp.array([[1.0, 2.0, 3.0]])
BY_CLASSIFIER, BY_AVERAGE = [[3.0, 8.0]], [[8.0, 7.0]]


@pytest.mark.parametrize("centers", ["none", "classifier", "features", "outputs"])
def test_who_labels_and_through_what_features_see_the_loss(centers):
    r = reading(centers)
    state = AVERAGED if centers == "classifier" else r.init(CLASSIFIER, 4)
    np.testing.assert_array_equal(r.target_logits(state, CLASSIFIER, FEATURES), BY_CLASSIFIER)
    if centers != "features":
        expected = BY_AVERAGE if centers == "classifier" else BY_CLASSIFIER
        np.testing.assert_array_equal(r.head(state, CLASSIFIER, FEATURES), expected)


def test_the_averaged_classifier_can_label():
    r = reading("classifier", target_head="centers")
    np.testing.assert_array_equal(r.target_logits(AVERAGED, CLASSIFIER, FEATURES), BY_AVERAGE)


def test_without_averaging_there_is_no_state():
    r = reading("none")
    state = r.init(CLASSIFIER, 4)
    assert state == ()
    logits = jnp.ones((1, 2))
    assert r.observe(state, logits, jnp.array([0])) == (state, logits)
    assert r.update(state, CLASSIFIER, jnp.int32(0), None, None) == ()


@pytest.mark.parametrize(
    ("train_steps", "momentum", "step", "expected"),
    [
        (2**20, None, 0, 0.1),
        (2**20, None, 1, 2 / 11),
        (2**20, None, 8, 0.5),
        (2**20, None, 8990, 8991 / 9000),  # the last step of the warm-up
        (2**20, None, 8991, 0.999),
        (2**20, None, 10**6, 0.999),
        (10_000, None, 10**6, 0.999),
        (1000, None, 10**6, 0.99),
        (1000, None, 0, 0.1),
        (100, None, 99, 0.9),
        (5, None, 4, 0.0),
        (1000, 0.5, 10**6, 0.5),
        (1000, 0.0, 10**6, 0.0),
    ],
)
def test_memory_of_the_averaged_classifier(train_steps, momentum, step, expected):
    """Tests what remains of an old value 1 when the new value is 0."""
    old, new = ({"kernel": jnp.full((1, 2), x), "bias": jnp.full(2, x)} for x in (1.0, 0.0))
    updated = reading("classifier", train_steps, momentum).update(
        old, new, jnp.int32(step), None, None
    )
    jax.tree.map(
        lambda x: np.testing.assert_allclose(x, np.full(x.shape, expected), rtol=1e-6), updated
    )


@pytest.mark.parametrize(
    ("warm_up", "step", "expected"), [(1.0, 0, 0.9), (100.0, 0, 0.01), (100.0, 99, 0.5025126)]
)
def test_warm_up_of_the_averaged_classifier_and_of_mean_features(warm_up, step, expected):
    old, new = ({"kernel": jnp.full((1, 2), x), "bias": jnp.full(2, x)} for x in (1.0, 0.0))
    r = reading("classifier", momentum=0.9, warm_up=warm_up)
    kernel = r.update(old, new, jnp.int32(step), None, None)["kernel"]
    np.testing.assert_allclose(kernel, [[expected] * 2], rtol=1e-6)

    r = reading("features", momentum=0.9, warm_up=warm_up)
    state = {"centers": jnp.ones((1, 2)), "updates": jnp.array([step])}
    zeros = rows(features=[[[0.0, 0.0]]], targets=[[[1.0]]], weights=[[1.0]])
    centers = r.update(state, CLASSIFIER, jnp.int32(0), zeros, None)["centers"]
    np.testing.assert_allclose(centers, [[expected] * 2], rtol=1e-6)


def test_the_averaged_classifier_starts_as_a_copy():
    state = reading("classifier").init(CLASSIFIER, 4)
    for name, value in CLASSIFIER.items():
        np.testing.assert_array_equal(state[name], value)
        assert state[name] is not value  # a donated state must not hold a buffer twice
        assert state[name].unsafe_buffer_pointer() != value.unsafe_buffer_pointer()


def rows(features, targets, weights):
    return avg_clustering.Rows(*(jnp.array(x, jnp.float32) for x in (features, targets, weights)))


def test_feature_centers_by_hand():
    """Three classes, D = 2; two updates with one labeled image and two unlabeled ones each."""
    r = reading("features", momentum=0.15)
    state = r.init({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}, 4)
    np.testing.assert_array_equal(state["centers"], np.zeros((3, 2)))
    np.testing.assert_array_equal(state["updates"], [0, 0, 0])

    # Class 0: (2, 0) with weight 1 and (4, 8) with weight 0.5·0.5, so the mean is (2.4, 1.6). Class
    # 1: only (4, 8), with weight 0.25. Class 2: rows with weight 0 only.
    first = rows([[[2, 0], [4, 8], [9, 9]]], [[[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1]]], [[1, 0.5, 0]])
    state = r.update(state, CLASSIFIER, jnp.int32(0), first, None)
    np.testing.assert_allclose(
        state["centers"], [[2.16, 1.44], [3.6, 7.2], [0, 0]], rtol=1e-6
    )  # 0.9 of it: m = 1/10
    np.testing.assert_array_equal(state["updates"], [1, 1, 0])

    # The second update of class 0 (m = min(0.15, 2/11)), the first of class 2 (m = 1/10), none of
    # class 1.
    second = rows([[[4, 4], [1, 3], [7, 7]]], [[[1, 0, 0], [0, 0, 1], [0, 1, 0]]], [[1, 0.75, 0]])
    state = r.update(state, CLASSIFIER, jnp.int32(1), second, None)
    np.testing.assert_allclose(
        state["centers"],
        [[0.15 * 2.16 + 0.85 * 4, 0.15 * 1.44 + 0.85 * 4], [3.6, 7.2], [0.9, 2.7]],
        rtol=1e-6,
    )
    np.testing.assert_array_equal(state["updates"], [2, 1, 1])


def test_memory_of_feature_centers():
    """m = min(0.99, (1 + n) / (10 + n)), where n counts the updates of the class, not the steps."""
    state = {"centers": jnp.ones((3, 1)), "updates": jnp.array([1, 8, 5000])}
    every_class = rows([[[0], [0], [0]]], [np.eye(3)], [[1, 1, 1]])
    state = reading("features").update(state, CLASSIFIER, jnp.int32(77), every_class, None)
    np.testing.assert_allclose(state["centers"][:, 0], [2 / 11, 0.5, 0.99], rtol=1e-6)


def test_feature_centers_pull_by_the_cosine():
    r = reading("features")
    state = {
        "centers": jnp.array([[3.0, 0.0], [5.0, 5.0], [-0.5, 0.5]]),
        "updates": jnp.array([2, 0, 1]),
    }
    logits = r.head(state, CLASSIFIER, jnp.array([[2.0, 0.0], [0.0, 7.0], [-1.0, 1.0]]))
    s = 10 / 2**0.5
    expected = [[10, -s], [0, s], [-s, 10]]
    np.testing.assert_allclose(logits[:, jnp.array([0, 2])], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(jax.nn.softmax(logits)[:, 1], 0.0)  # this class has no center yet

    targets = jnp.array([[1.0, 0.0, 0.0], [0.3, 0.6, 0.1], [0.2, 0.3, 0.5]])
    targets, weights = r.pullable(state, targets, jnp.array([0.5, 0.5, 0.25]))
    np.testing.assert_allclose(targets[:, 1], 0.0)
    np.testing.assert_allclose(targets[:, 0], [1, 0.3, 0.2])
    np.testing.assert_allclose(weights, [0.5, 0, 0.25])  # the second row: class 1


def test_output_centers_by_hand():
    """Five samples, two classes, m = 0.6; sample 3 is twice in the first batch."""
    r = reading("outputs")
    state = r.init({"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(2)}, 5)
    logits = jnp.log(jnp.array([[0.5, 0.5], [0.2, 0.8], [0.75, 0.25]]))
    state, mean = r.observe(state, logits, jnp.array([3, 1, 3]))
    np.testing.assert_allclose(
        state["outputs"], [[0, 0], [0.08, 0.32], [0, 0], [0.3, 0.1], [0, 0]], rtol=1e-6
    )
    np.testing.assert_array_equal(state["visits"], [0, 1, 0, 1, 0])
    # After a first visit, the average is the prediction. The last of two rows counts for both.
    np.testing.assert_allclose(jnp.exp(mean), [[0.75, 0.25], [0.2, 0.8], [0.75, 0.25]], rtol=1e-5)

    logits = jnp.log(jnp.array([[0.25, 0.75], [0.9, 0.1], [0.5, 0.5]]))
    state, mean = r.observe(state, logits, jnp.array([3, 0, 4]))
    # 0.6·(0.3, 0.1) + 0.4·(0.25, 0.75) = (0.28, 0.36); 1 − 0.6² = 0.64.
    np.testing.assert_allclose(
        state["outputs"], [[0.36, 0.04], [0.08, 0.32], [0, 0], [0.28, 0.36], [0.2, 0.2]], rtol=1e-6
    )
    np.testing.assert_array_equal(state["visits"], [1, 1, 0, 2, 1])
    np.testing.assert_allclose(jnp.exp(mean), [[0.4375, 0.5625], [0.9, 0.1], [0.5, 0.5]], rtol=1e-5)
