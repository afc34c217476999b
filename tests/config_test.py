import re

import ml_collections
import pytest

from layermatch_jax import automatic, config_file, presets, rules
from layermatch_jax import config as config_lib
from layermatch_jax.errors import InputError, unknown

MASK = (("classifier/.*", 0.0),)


def configured(method="layermatch", **fields):
    """`fields`: dotted names with '__' for the dot."""
    config = presets.apply_method(config_lib.base(), method)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return automatic.resolve(config)


def shipped(name, arg=""):
    return config_file.load(f"{config_file.FOLDER / name}:{arg}")


def refused(config, num_devices=1):
    with pytest.raises(InputError) as caught:
        rules.validate(config, num_devices)
    return str(caught.value)


# ---- The tree ----


def test_tree_is_locked():
    config = config_lib.base()
    for tree, field in ((config, "learning_rate"), (config.optimizer, "lr")):
        with pytest.raises((AttributeError, KeyError), match=field):
            setattr(tree, field, 1.0)


def test_fields_are_dotted_names_of_plain_values():
    tree = ml_collections.ConfigDict({"a": 1, "b": {"c": (("x", 0.0),), "d": {"e": None}}})
    assert config_lib.fields(tree) == {"a": 1, "b.c": (("x", 0.0),), "b.d.e": None}


def test_names_that_stand_elsewhere_are_fields():
    # A field that is renamed only in base() would silently have no effect here.
    known = config_lib.fields(config_lib.base())
    assert set(config_lib.RESULT_NEUTRAL) <= known.keys()
    for choices in presets.METHODS.values():
        assert choices.keys() <= known.keys()


# ---- Methods ----


@pytest.mark.parametrize(
    ("method", "mask", "centers", "weight", "ratio"),
    [
        ("supervised", (), "none", 0.0, 7),
        ("fixmatch", (), "none", 1.0, 7),
        ("grad_relu", MASK, "none", 1.0, 7),
        ("avg_clustering", (), "classifier", 1.0, 7),
        ("layermatch", MASK, "classifier", 1.0, 7),
    ],
)
def test_what_a_method_chooses(method, mask, centers, weight, ratio):
    config = presets.apply_method(config_lib.base(), method)
    assert config.method == config.applied_method == method
    assert config.layerwise.gradient_mask == mask
    assert config.avg_clustering.centers == centers
    assert (config.unsupervised_weight, config.unlabeled_ratio) == (weight, ratio)
    rules.validate(config)


@pytest.mark.parametrize("method", ["fixmatch", "uda", "mean_teacher", "freematch"])
def test_layerwise_adds_both_parts_and_changes_nothing_else(method):
    plain = config_lib.fields(presets.apply_method(config_lib.base(), method))
    both = config_lib.fields(presets.apply_method(config_lib.base(), f"{method}+layerwise"))
    assert {name: both[name] for name in both if both[name] != plain[name]} == {
        "method": f"{method}+layerwise",
        "applied_method": f"{method}+layerwise",
        "layerwise.gradient_mask": MASK,
        "avg_clustering.centers": "classifier",
    }


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("supervised+layerwise", "no unsupervised gradient that [+]layerwise could change"),
        ("freemach+layerwise", "unknown method 'freemach'. Did you mean 'freematch'?"),
        ("supervised+grad_relu", "no unsupervised gradient that [+]grad_relu could change"),
        ("freematch+adamatch", "only [+]layerwise, [+]grad_relu, [+]avg_clustering can be added"),
        ("freematch+", "only [+]layerwise, "),
        ("fixmatch+mask=from_stage3", "A gradient mask is set by :mask=NAME"),
    ],
)
def test_what_layerwise_cannot_be_added_to(method, message):
    with pytest.raises(InputError, match=message):
        presets.apply_method(config_lib.base(), method)


@pytest.mark.parametrize("written", ["fixmach", "FixMatch", "fix_match"])
def test_unknown_method_names_the_nearest(written):
    with pytest.raises(InputError, match=f"unknown method '{written}'. Did you mean 'fixmatch'"):
        presets.apply_method(config_lib.base(), written)


# ---- The argument after the colon ----


@pytest.mark.parametrize("file", sorted(path.name for path in config_file.FOLDER.glob("*.py")))
def test_shipped_configs_take_labels_and_method(file):
    config = shipped(file)
    assert config.method == "layermatch"
    rules.validate(config)
    for method in presets.METHODS:
        config = shipped(file, f"labels=100,method={method}")
        assert (config.dataset.num_labels, config.dataset.label_fraction) == (100, 0.0)
        if method in ("probe", "self_training") and not config.model.pretrained:
            assert "needs a backbone with pretrained weights" in refused(config)
            config.model.pretrained = "imagenet"
        if method == "vat" and config.model.name == "efficientnet_lite0":
            assert "needs the forward-mode derivative" in refused(config)
            continue
        rules.validate(config)
        if method not in ("supervised", "probe", "self_training"):
            config = shipped(file, f"method={method},layerwise=True")
            assert (config.method, config.layerwise.gradient_mask) == (f"{method}+layerwise", MASK)
            rules.validate(config)


@pytest.mark.parametrize(
    ("labels", "number", "fraction"),
    [("10", 10, 0.0), ("10%", 40, 0.1), ("0.5%", 40, 0.005), ("100%", 40, 1.0), ("-5", -5, 0.0)],
)
def test_labels_as_a_number_or_a_percentage(labels, number, fraction):
    dataset = shipped("digits.py", f"labels={labels}").dataset
    assert dataset.num_labels == number  # splits.partition checks the limit
    assert dataset.label_fraction == pytest.approx(fraction)


def test_number_replaces_a_fraction():
    config = config_lib.base()
    config.dataset.label_fraction = 0.1
    presets.apply_arg(config, "labels=20")
    assert (config.dataset.num_labels, config.dataset.label_fraction) == (20, 0.0)


@pytest.mark.parametrize("labels", ["", "ten", "2.5", "%", "x%", "0%", "-1%", "101%", "nan%"])
def test_labels_that_are_none(labels):
    # Above all 0%, because a fraction of 0 would silently mean the default number.
    with pytest.raises(InputError, match=r"give a whole number .*\(labels=250\).*\(labels=10%\)"):
        shipped("digits.py", f"labels={labels}")


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("label=10", "unknown config argument 'label'. Did you mean 'labels'?"),
        ("methd=x", "unknown config argument 'methd'. Did you mean 'method'?"),
        ("methd=x", "There are: labels, method, layerwise"),
        ("method=fixmach", "unknown method 'fixmach'. Did you mean 'fixmatch'?"),
        ("250", "'250': write key=value, keys: labels, method, layerwise, mask"),
        ("mask=clasifier", "unknown gradient mask 'clasifier'. Did you mean 'classifier'?"),
        ("labels=10,labels=20", "'labels' is given twice: '10', '20'"),
        ("layerwise=yes", "layerwise=yes: give True or False"),
    ],
)
def test_argument_that_cannot_be_read(arg, message):
    with pytest.raises(InputError) as caught:
        shipped("digits.py", arg)
    assert message in str(caught.value)


def test_parse_arg():
    assert presets.parse_arg("a=1,b=x=y", ("a", "b", "c")) == {"a": "1", "b": "x=y"}
    assert presets.parse_arg("", ("a",)) == {}


# ---- Names ----


@pytest.mark.parametrize(
    ("field", "nearest"),
    [
        ("metod", "'method'"),
        ("gradient_mask", "'layerwise.gradient_mask'"),
        ("centers", "'avg_clustering.centers'"),
        ("learning_rate", "'optimizer.learning_rate'"),
        ("optimizer.nestorov", "'optimizer.nesterov'"),
        ("model.momentum", "'avg_clustering.momentum', 'optimizer.momentum' or 'policy.momentum'"),
        ("dataset", "'dataset.name'"),  # a group is not a field
    ],
)
def test_unknown_field_names_the_nearest(field, nearest):
    with pytest.raises(InputError) as caught:
        config_lib.check_field(field)
    assert str(caught.value) == f"unknown config field {field!r}. Did you mean {nearest}?"


def test_unknown_field_like_no_other_lists_all():
    with pytest.raises(InputError, match=r"'xyzzy'\. There are: .*batch_size.*train_steps"):
        config_lib.check_field("xyzzy")
    config_lib.check_field("layerwise.gradient_mask")


def test_few_names_are_all_listed():
    message = str(unknown("fruit", "aple", ["apple", "fig"]))
    assert message == "unknown fruit 'aple'. Did you mean 'apple'? There are: apple, fig"
    assert str(unknown("fruit", 5, ["apple", "fig"])) == "unknown fruit '5'. There are: apple, fig"


# ---- Values ----


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("policy.threshold", (1.5, -0.1), (0.0, 1.0)),
        ("train_steps", (0, -1), (1,)),
        ("batch_size", (0,), (1,)),
        ("unlabeled_ratio", (-1,), (1,)),
        ("seed", (-1, 2**32), (0, 2**32 - 1)),
        ("dataset.stored_size", (0,), (32,)),
        ("dataset.padding", (-1, 32), (0, 31)),  # a reflected border is narrower than the image
        ("dataset.label_fraction", (-0.1, 1.1), (0.0, 1.0)),
        ("model.width", (0,), (1,)),
        ("eval_every", (0,), (1,)),
        ("avg_clustering.warm_up", (0.9,), (1.0, 100.0)),
        ("checkpoints_kept", (0,), (1,)),
    ],
)
def test_limits(name, bad, good):
    for value in good:
        rules.validate(configured(**{name: value}))
    for value in bad:
        message = refused(configured(**{name: value}))
        assert message.startswith(f"--config.{name}={value} must be ")
        assert re.match(r"(at least|at most|above|below) ", message.split(" must be ")[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("optimizer.weight_decay", "fixmatch"),
        ("unsupervised_weight", "fixmatch"),
        ("policy.ramp", "pseudo_label"),
        ("ema_decay", "fixmatch"),
        ("policy.temperature", "uda"),
    ],
)
def test_numbers_are_finite(name, method, value):
    message = refused(configured(method, **{name: value}))
    assert message == f"--config.{name}={value} must be a finite number"


def test_limits_are_told():
    assert refused(configured(policy__threshold=1.5)).startswith(
        "--config.policy.threshold=1.5 must be at least 0 and at most 1. Confidence that"
    )
    assert refused(configured(train_steps=0)) == (
        "--config.train_steps=0 must be at least 1. Train steps of the whole run."
    )


@pytest.mark.parametrize("value", [-0.1, 0.0])
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("model.bn_epsilon", "fixmatch"),
        ("optimizer.learning_rate", "fixmatch"),
        ("policy.temperature", "uda"),
        ("policy.temperature", "dash"),
    ],
)
def test_numbers_above_zero(name, method, value):
    message = refused(configured(method, **{name: value}))
    assert message.startswith(f"--config.{name}={value} must be above 0. ")
    for allowed in (0.01, 2.0):
        rules.validate(configured(method, **{name: allowed}))


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.001])
@pytest.mark.parametrize(
    "name",
    [
        "ema_decay",
        "model.bn_decay",
        "optimizer.momentum",
        "policy.momentum",
        "avg_clustering.momentum",
    ],
)
def test_decays_are_below_one(name, value):
    message = refused(configured("freematch", **{name: value}))
    assert message.startswith(f"--config.{name}={value} must be at least 0 and below 1. ")
    for allowed in (0.0, 0.9, 0.9999):
        rules.validate(configured("freematch", **{name: allowed}))


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("parallelism", "pjit", "jit"),
        ("dataset.evaluate_on", "valid", "validation"),
        ("model.dtype", "float16", "bfloat16"),
        ("avg_clustering.centers", "classifer", "classifier"),
        ("avg_clustering.target_head", "centre", "centers"),
        ("policy.name", "softmach", "softmatch"),
        ("policy.signal_annealing", "expo", "exp"),
    ],
)
def test_choices(name, value, nearest):
    method = "uda" if name == "policy.signal_annealing" else "fixmatch"
    message = refused(configured(method, **{name: value}))
    assert message.startswith(f"unknown --config.{name} {value!r}. Did you mean {nearest!r}?")


def test_settings_that_contradict_each_other():
    message = refused(configured(unlabeled_ratio=0))
    assert "--config.unlabeled_ratio to 1 or more" in message
    assert ":method=supervised" in message
    message = refused(configured("fixmatch", avg_clustering__target_head="centers"))
    assert "needs --config.avg_clustering.centers=classifier" in message
    rules.validate(configured("layermatch", avg_clustering__target_head="centers"))
    for method, weight in (("flexmatch", 0.0), ("layermatch", 0.0), ("supervised", 1.0)):
        message = refused(configured(method, unsupervised_weight=weight))
        assert f"--config.unsupervised_weight={weight} with method {method}" in message
    message = refused(configured("layermatch", policy__name="freematch"))
    assert "is not the policy of layermatch (fixed_threshold)" in message
    assert "Write --config=FILE:method=freematch" in message
    message = refused(configured("uda", policy__name="fixed_threshold"))
    assert "Write --config=FILE:method=fixmatch" in message
    for field in ({"avg_clustering__centers": "outputs"}, {"layerwise__gradient_mask": MASK}):
        assert "have no effect. Leave them out" in refused(configured("supervised", **field))
    for field in ({"centers": "outputs"}, {"centers": "classifier", "target_head": "centers"}):
        field = {f"avg_clustering__{name}": value for name, value in field.items()}
        assert "its targets from the EMA model" in refused(configured("mean_teacher", **field))
    rules.validate(configured("mean_teacher", avg_clustering__centers="features"))


def test_vat_needs_forward_mode():
    message = refused(configured("vat", model__name="efficientnet_lite0"))
    assert "forward-mode derivative" in message
    assert "Use another network or method" in message
    rules.validate(configured("vat", model__name="resnet50"))
    rules.validate(configured("fixmatch", model__name="efficientnet_lite0"))
    # 32 pixels and 4 on each side are 40.
    assert "more than stored_size + 2 · padding = 40 " in refused(
        configured(dataset__image_size=41)
    )
    rules.validate(configured(dataset__image_size=40))


@pytest.mark.parametrize(
    ("batch", "evaluation", "devices", "told"),
    [
        (64, 512, 3, ["batch_size=64 (use 63 or 66)", "eval_batch_size=512 (use 510 or 513)"]),
        (66, 512, 3, ["eval_batch_size=512 (use 510 or 513)"]),
        (4, 512, 8, ["batch_size=4 (use 8)"]),  # a batch has at least one image
        (64, 512, 8, None),
        (1, 1, 1, None),
    ],
)
def test_batches_are_shared_by_devices(batch, evaluation, devices, told):
    config = configured(batch_size=batch, eval_batch_size=evaluation)
    if told is None:
        rules.validate(config, devices)
    else:
        listed = ", ".join(f"--config.{item}" for item in told)
        assert refused(config, devices) == f"not divisible by {devices} devices: {listed}"


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (("classifier",), "entry 'classifier': write (regular expression, multiplier), as in"),
        (
            ("classifier",),
            "or choose a named one by --config=FILE:mask=NAME: none, half_classifier,",
        ),
        # The value of --config.layerwise.gradient_mask="(('classifier/.*', 0.0))": a comma short.
        (("classifier/.*", 0.0), "gradient_mask=\"(('classifier/.*', 0.0),)\""),
        ((("classifier/.*", 0.0, 1.0),), "write (regular expression, multiplier)"),
        (((0.0, "classifier/.*"),), "write (regular expression, multiplier)"),
        ((("classifier/.*", 2),), "'classifier/.*': multiplier 2 is not in [0, 1]"),
        ((("classifier/.*", -0.5),), "multiplier -0.5 is not in [0, 1]"),
        ((("classifier/.*", float("nan")),), "multiplier nan is not in [0, 1]"),
        ((("classifier/.*", "0"),), "multiplier '0' is not in [0, 1]"),
        ((("ok", 0.0), ("classifier/(", 0.0)), "'classifier/(' is not a regular expression"),
    ],
)
def test_mask_that_is_none(mask, message):
    assert message in refused(configured(layerwise__gradient_mask=mask))


@pytest.mark.parametrize(
    ("arg", "mask"),
    [
        ("method=fixmatch,mask=classifier", (("classifier/.*", 0.0),)),
        ("mask=half_classifier,method=layermatch", (("classifier/.*", 0.5),)),
        ("method=freematch,layerwise=True,mask=none", ()),
    ],
)
def test_a_named_mask_takes_the_place_of_the_methods(arg, mask):
    config = presets.apply_arg(config_lib.base(), arg)
    assert config.layerwise.gradient_mask == mask
    rules.validate(config)
    method = presets.apply_method(config_lib.base(), config.method)
    assert config.avg_clustering == method.avg_clustering


def test_masks():
    for mask in ((), (("a", 0), ("b", 1), (r"c/.*\d", 0.25))):
        rules.validate(configured(layerwise__gradient_mask=mask))


# ---- Steps a call ----


def several(K, **periods):
    periods = {
        "train_steps": 48,
        "log_every": 8,
        "eval_every": 24,
        "checkpoint_every": 24,
    } | periods
    return configured(input__backend="device", input__steps_per_call=K, **periods)


@pytest.mark.parametrize("K", [1, 2, 4, 8])
def test_steps_of_a_call_divide_the_periods(K):
    rules.validate(several(K))


@pytest.mark.parametrize("K", [3, 16])
def test_steps_of_a_call_that_do_not(K):
    assert refused(several(K)) == (
        f"--config.input.steps_per_call={K} does not divide train_steps, log_every, eval_every, "
        "checkpoint_every = 48, 8, 24, 24. Use one of 1, 2, 4, 8, or change these settings"
    )
    rules.validate(several(3, log_every=3))
    for name in ("train_steps", "log_every", "eval_every", "checkpoint_every"):
        assert "Use one of 1, or" in refused(several(2, **{name: 25}))


def test_steps_of_a_call_are_the_device_backends():
    config = several(4)
    config.input.backend = "tf_data"
    assert "steps_per_call=4 needs --config.input.backend=device" in refused(config)
