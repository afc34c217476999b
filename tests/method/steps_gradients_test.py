"""Compares the gradient of each layer in a train step with the method's equations, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import (
    MU,
    THRESHOLD,
    B,
    gradients,
    logits_of,
    make_batch,
    make_classifier,
    make_method,
    make_params,
    views,
)
from objectives import (
    GRAD_RELU,
    assert_trees_close,
    cross_entropy,
    one_hot,
    pseudo_labels,
    supervised_loss,
    unsupervised_loss,
    weak_probabilities,
    without_labels,
)

pytestmark = pytest.mark.usefixtures("float64")


def test_fixmatch_is_the_gradient_of_one_loss():
    params, batch = make_params(), make_batch()

    def fixmatch(params):
        labeled, weak, strong = views(params["backbone"], batch)
        labeled, weak, strong = (
            logits_of(params["classifier"], x) for x in (labeled, weak, strong)
        )
        probabilities = jax.nn.softmax(jax.lax.stop_gradient(weak))
        accepted = jnp.max(probabilities, axis=1) >= THRESHOLD
        targets = one_hot(jnp.argmax(probabilities, axis=1))
        loss_u = jnp.sum(accepted * cross_entropy(strong, targets)) / (MU * B)
        return jnp.mean(cross_entropy(labeled, one_hot(batch.labels))) + 0.5 * loss_u

    pseudo_labels(weak_probabilities(params, batch))  # is informative
    method = make_method(params, "fixmatch", unsupervised_weight=0.5)
    assert_trees_close(gradients(method, params, batch), jax.grad(fixmatch)(params))


@pytest.mark.parametrize("name", ["grad_relu", "layermatch"])
def test_grad_relu_leaves_the_classifier_an_exact_zero_and_the_backbone_its_gradient(name):
    params, batch = make_params(), make_batch()
    pseudo_labels(weak_probabilities(params, batch))  # is informative
    gated = gradients(without_labels(make_method(params, name)), params, batch)
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(gated["classifier"][leaf], 0.0)
    for leaf in jax.tree.leaves(gated["backbone"]["block"]):
        assert np.abs(leaf).max() > 1e-3
    # Without the mask, there is a gradient to remove.
    free = gradients(without_labels(make_method(params, "fixmatch")), params, batch)
    for leaf in ("kernel", "bias"):
        assert np.abs(free["classifier"][leaf]).min() > 1e-4


def test_under_grad_relu_the_classifier_learns_from_labels_bit_for_bit():
    params, batch = make_params(), make_batch()
    gated = gradients(make_method(params, "grad_relu"), params, batch)
    without = make_method(params, "grad_relu")._replace(unsupervised_weight=0.0)
    alone = gradients(without, params, batch)
    jax.tree.map(np.testing.assert_array_equal, gated["classifier"], alone["classifier"])
    assert_trees_close(alone, jax.grad(supervised_loss)(params, batch))


def test_layermatch_is_one_loss_with_two_constants():
    params, batch, averaged = make_params(), make_batch(), make_classifier(7)
    targets, weights = pseudo_labels(weak_probabilities(params, batch))

    def layermatch(params):
        """The objective: centers are constant, and through them L_u reaches only the features."""
        head = functools.partial(logits_of, averaged)
        return supervised_loss(params, batch) + unsupervised_loss(
            params, batch, targets, weights, head
        )

    actual = gradients(make_method(params, "layermatch"), params, batch, averaged)
    assert_trees_close(actual, jax.grad(layermatch)(params))

    def grad_relu(params):
        constant = jax.lax.stop_gradient(params["classifier"])
        head = functools.partial(logits_of, constant)
        return supervised_loss(params, batch) + unsupervised_loss(
            params, batch, targets, weights, head
        )

    actual = gradients(make_method(params, "grad_relu"), params, batch)
    assert_trees_close(actual, jax.grad(grad_relu)(params))


@pytest.mark.parametrize(
    ("mask", "stem", "block", "kernel", "bias"),
    [
        ((), 1, 1, 1, 1),
        (GRAD_RELU, 1, 1, 0, 0),
        ((("backbone/.*", 0.5), ("classifier/bias", 0.25)), 0.5, 0.5, 1, 0.25),
        ((("backbone/stem/.*", 0.5), *GRAD_RELU), 0.5, 1, 0, 0),
        ((("backbone/stem/.*", 0.0), (".*", 0.75)), 0, 0.75, 0.75, 0.75),
    ],
)
@pytest.mark.parametrize("centers", ["none", "classifier"])
def test_one_step_equals_two_gradients_put_together(mask, stem, block, kernel, bias, centers):
    params, batch, averaged = make_params(1), make_batch(1), make_classifier(7)
    method = make_method(
        params,
        layerwise__gradient_mask=mask,
        avg_clustering__centers=centers,
        unsupervised_weight=2.0,
    )
    targets, weights = pseudo_labels(weak_probabilities(params, batch))
    of_labels = jax.grad(supervised_loss)(params, batch)
    through_classifier = jax.grad(unsupervised_loss)(params, batch, targets, weights)
    head = functools.partial(logits_of, averaged) if centers == "classifier" else None
    through_centers = jax.grad(unsupervised_loss)(params, batch, targets, weights, head)
    expected = jax.tree.map(
        lambda supervised, unsupervised, multiplier: supervised + 2.0 * multiplier * unsupervised,
        of_labels,
        {
            "backbone": through_centers["backbone"],
            "classifier": through_classifier["classifier"],
        },
        {
            "backbone": {"stem": {"kernel": stem, "bias": stem}, "block": {"kernel": block}},
            "classifier": {"kernel": kernel, "bias": bias},
        },
    )
    state_of_centers = averaged if centers == "classifier" else None
    assert_trees_close(gradients(method, params, batch, state_of_centers), expected)


def test_a_mask_inside_the_backbone_scales_what_it_names_and_nothing_else():
    params, batch = make_params(1), make_batch(1)
    pseudo_labels(weak_probabilities(params, batch))  # is informative
    mask = (("backbone/block/kernel", 0.25),)
    masked = gradients(
        without_labels(make_method(params, layerwise__gradient_mask=mask)), params, batch
    )
    plain = gradients(without_labels(make_method(params)), params, batch)
    assert np.abs(plain["backbone"]["block"]["kernel"]).min() > 1e-5
    plain["backbone"]["block"]["kernel"] *= 0.25
    assert_trees_close(masked, plain, rtol=1e-12)


def test_one_and_two_pull_backs_agree_where_both_apply():
    params, batch = make_params(1), make_batch(1)
    pseudo_labels(weak_probabilities(params, batch))  # is informative

    def backbone_gradients(*mask):
        method = make_method(params, layerwise__gradient_mask=mask)
        return gradients(method, params, batch)["backbone"]

    once = backbone_gradients(("backbone/.*", 0.5))
    stem_halved = backbone_gradients(("backbone/stem/.*", 0.5))
    block_halved = backbone_gradients(("backbone/block/.*", 0.5))
    assert_trees_close(stem_halved["stem"], once["stem"], rtol=1e-12)
    assert_trees_close(block_halved["block"], once["block"], rtol=1e-12)
