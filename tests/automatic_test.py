"""Automatic settings, and the canonical names of methods."""

import hashlib

import pytest

from layermatch_jax import automatic, config_file, presets, rules
from layermatch_jax import config as config_lib
from layermatch_jax.errors import InputError

DIGITS = str(config_file.FOLDER / "digits.py")
DECAYS = ("ema_decay", "model.bn_decay", "policy.momentum")
GRAD_RELU = (("classifier/.*", 0.0),)


def resolved(arg="method=fixmatch", **fields):
    """`fields`: dotted names with '__' for the dot."""
    config = presets.apply_arg(config_lib.base(), arg)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return automatic.resolve(config)


# ---- Numbers ----


@pytest.mark.parametrize(
    ("train_steps", "decay"),
    [
        (2**20, 0.999),
        (10_000, 0.999),
        (5000, 0.998),
        (1000, 0.99),
        (200, 0.95),
        (10, 0.0),
        (3, 0.0),
    ],
)
def test_averages_remember_at_most_a_tenth_of_the_run(train_steps, decay):
    values = config_lib.fields(resolved("method=freematch,layerwise=True", train_steps=train_steps))
    for name in (*DECAYS, "avg_clustering.momentum"):
        assert values[name] == decay  # exactly: README's numbers were made with these


def test_what_the_user_says_counts():
    values = config_lib.fields(
        resolved("method=uda", train_steps=200, ema_decay=0.5, policy__temperature=0.1)
    )
    assert [values[name] for name in DECAYS] == [0.5, 0.95, None]  # UDA has no averages
    assert values["policy.temperature"] == 0.1


@pytest.mark.parametrize(
    ("method", "temperature"), [("uda", 0.4), ("dash", 0.5), ("freematch+layerwise", None)]
)
def test_temperature_of_each_paper(method, temperature):
    assert resolved(f"method={method}").policy.temperature == temperature


@pytest.mark.parametrize(
    ("centers", "train_steps", "momentum"),
    [
        ("none", 200, None),
        ("features", 2**20, 0.99),
        ("features", 200, 0.95),
        ("outputs", 2**20, 0.6),
        ("outputs", 200, 0.6),
    ],
)
def test_momentum_of_other_centers(centers, train_steps, momentum):
    config = resolved(train_steps=train_steps, avg_clustering__centers=centers)
    assert config.avg_clustering.momentum == momentum


def test_the_demo_has_the_numbers_that_it_always_had():
    values = config_lib.fields(automatic.resolve(config_file.load(f"{DIGITS}:method=freematch")))
    assert [values[name] for name in DECAYS] == [0.99] * 3
    values = config_lib.fields(automatic.resolve(config_file.load(f"{DIGITS}:method=dash")))
    assert values["policy.warm_up"] * values["train_steps"] == 20


def test_to_resolve_twice_changes_nothing_and_the_argument_stays():
    config = presets.apply_arg(config_lib.base(), "method=uda,layerwise=True,mask=from_stage3")
    before = config_lib.fields(config)
    once = automatic.resolve(config)
    assert config_lib.fields(config) == before
    assert config_lib.fields(automatic.resolve(once)) == config_lib.fields(once)
    rules.validate(once)


def test_none_is_for_automatic_settings_alone():
    for name, default in (("train_steps", "1048576"), ("method", "'fixmatch'")):
        with pytest.raises(InputError) as caught:
            resolved(**{name: None})
        assert str(caught.value) == (
            f"--config.{name}=None: this setting is never automatic. Its default is {default}"
        )


def test_what_was_lowered_is_told():
    def told(arg, **fields):
        return automatic.explained(resolved(arg, **fields))

    said = "Averages remember a tenth of the run: "
    two, classic = "ema_decay=0.95, model.bn_decay=0.95", " (classic: 0.999)"
    assert told("method=fixmatch", train_steps=200) == [said + two + classic]
    assert told("method=softmatch,layerwise=True", train_steps=200) == [
        f"{said}avg_clustering.momentum=0.95, {two}, policy.momentum=0.95{classic}"
    ]
    assert told("method=fixmatch", train_steps=200, ema_decay=0.9) == [
        f"{said}model.bn_decay=0.95{classic}"
    ]
    assert told("method=fixmatch") == []
    assert told("method=fixmatch", train_steps=200, ema_decay=0.9, model__bn_decay=0.999) == []


# ---- Names ----


@pytest.mark.parametrize(
    ("arg", "name"),
    [
        *((f"method={method}", method) for method in presets.METHODS),
        ("method=fixmatch,layerwise=True", "layermatch"),
        ("method=fixmatch+layerwise", "layermatch"),
        ("method=grad_relu+layerwise", "layermatch"),
        ("method=layermatch+layerwise", "layermatch"),
        ("method=avg_clustering+grad_relu", "layermatch"),
        ("method=avg_clustering,mask=classifier", "layermatch"),
        ("method=fixmatch,mask=classifier", "grad_relu"),
        ("method=fixmatch+grad_relu", "grad_relu"),
        ("method=fixmatch+avg_clustering", "avg_clustering"),
        ("method=layermatch,mask=none", "avg_clustering"),
        ("method=grad_relu,mask=none", "fixmatch"),
        ("method=fixmatch,mask=from_stage3", "fixmatch+mask=from_stage3"),
        ("mask=from_stage3", "fixmatch+mask=from_stage3+avg_clustering"),
        ("method=freematch,mask=classifier", "freematch+grad_relu"),
        ("method=freematch,layerwise=True", "freematch+layerwise"),
        ("method=freematch+layerwise,mask=none", "freematch+avg_clustering"),
    ],
)
def test_one_name_of_a_method(arg, name):
    frozen = {"model__pretrained": "imagenet"} if name in ("probe", "self_training") else {}
    config = resolved(arg, **frozen)
    assert config.method == config.applied_method == name
    rules.validate(config)


@pytest.mark.parametrize(
    ("mask", "centers", "name"),
    [
        (GRAD_RELU, "classifier", "layermatch"),
        ((["classifier/.*", 0],), "none", "grad_relu"),
        ((), "outputs", "fixmatch+centers=outputs"),
        (GRAD_RELU, "features", "fixmatch+grad_relu+centers=features"),
        ((("classifier/.*", 0.5),), "none", "fixmatch+mask=half_classifier"),
    ],
)
def test_masks_and_centers_of_flags_count(mask, centers, name):
    config = resolved(layerwise__gradient_mask=mask, avg_clustering__centers=centers)
    assert config.method == name


def test_mask_without_a_name_has_a_short_stable_one():
    digits = hashlib.sha256(b'[["backbone/stem/.*", 0.0], ["classifier/.*", 0.25]]').hexdigest()
    name = f"fixmatch+mask=custom-{digits[:6]}"
    for zero in (0, 0.0):
        mask = (("backbone/stem/.*", zero), ("classifier/.*", 0.25))
        assert resolved(layerwise__gradient_mask=mask).method == name


def test_names_are_safe_in_paths():
    for method in presets.METHODS:
        for mask in (*presets.MASKS.values(), (("a[b]/*,?", 0.0),)):
            for centers in ("none", "classifier", "features", "outputs"):
                name = presets.method_name(method, mask, centers)
                assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_+=-"), name


def test_method_changed_without_its_settings_is_refused():
    config = presets.apply_method(config_lib.base(), "layermatch")
    config.method = "fixmatch"  # as --config.method=fixmatch does
    with pytest.raises(InputError) as caught:
        automatic.resolve(config)
    assert "--config.method=fixmatch alone" in str(caught.value)
    assert "keep the settings of 'layermatch'" in str(caught.value)
    assert "--config=FILE:method=fixmatch" in str(caught.value)


def test_method_may_be_changed_once_more_after_it_was_resolved():
    config = resolved("method=fixmatch,mask=classifier")
    config.layerwise.gradient_mask = ()
    assert automatic.resolve(config).method == "fixmatch"


def test_methods_that_fit_only_the_classifier_train_no_step():
    config = resolved("method=probe", train_steps=600, model__pretrained="imagenet")
    assert (config.train_steps, config.model.head_init) == (0, "probe")
    unresolved = presets.apply_arg(config_lib.base(), "method=probe")
    assert automatic.ignored(unresolved) == []
    unresolved.train_steps = 600
    assert "Not read: train_steps=600, because the method probe" in automatic.ignored(unresolved)[0]
    assert resolved("method=fixmatch").model.head_init == "random"
    assert resolved("method=fixmatch", model__pretrained="imagenet").model.head_init == "weights"
