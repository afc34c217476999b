"""Modules import only from lower parts, the method needs only JAX, and training does not plot."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "layermatch_jax"

# From the bottom up. A part imports its own modules and those of the parts below it.
FLOORS = (
    {"errors", "renamed", "arrays"},
    {"setting", "views", "batches"},
    {"models"},
    {"method"},
    {"config"},
    {"presets"},
    {"rules", "automatic", "config_file"},
    {"runtime"},
    {"data"},
    {"frozen"},
    {"initial_weights"},
    {"setup", "evaluate", "after", "train", "benchmark"},
    {"modes"},
    {"main"},
    {"console", "sweep"},
)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name for _, name in modules()}


def imported(path, inside_functions=True):
    """Returns the dotted names of the package's modules that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if inside_functions else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in NAMES)
        elif isinstance(node, ast.ImportFrom) and node.module in NAMES:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in NAMES else node.module


def room(name):
    return [*name.split("."), ""][1]


def test_every_room_has_a_floor():
    assert {room(name) for name in NAMES} - {""} == set.union(*FLOORS)


def test_imports_run_down_only():
    height = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    up = [
        f"{name} imports {other}"
        for path, name in modules()
        for other in imported(path)
        if room(name) and room(other) and room(name) != room(other)
        and height[room(other)] >= height[room(name)]
        and (room(name), room(other)) not in SAME_FLOOR
    ]  # fmt: skip
    assert not up


# On the floor of what runs, in this order: evaluate, setup, train; benchmark.
SAME_FLOOR = {
    ("setup", "after"),  # the layer report's program
    ("train", "setup"),
    ("train", "evaluate"),
    ("train", "after"),  # the layer report
    ("after", "setup"),
    ("benchmark", "setup"),
    ("benchmark", "evaluate"),
    ("benchmark", "train"),
    ("config", "presets"),  # apply_arg, for config files of earlier versions
}


def test_no_module_imports_itself_by_way_of_others():
    graph = {
        name: {x for x in imported(path, inside_functions=False) if x != name}
        for path, name in modules()
    }
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in graph[name]:
            visit(other)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def libraries(path):
    """Returns the top-level names of all modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_tensorflow_is_for_the_data_alone():
    users = {
        room(name)
        for path, name in modules()
        if {"tensorflow", "tensorflow_datasets"} & set(libraries(path))
    }
    assert users == {"data"}


def test_the_yardstick_of_the_input_is_for_the_benchmark_alone():
    users = [name for path, name in modules() if "per_image" in path.read_text(encoding="utf-8")]
    assert users == ["layermatch_jax.benchmark.measure"]


def test_the_method_needs_no_more_than_jax():
    below = {"errors", "arrays", "setting", "views", "batches", "models", "method"}
    # safetensors reads files of weights, inside a function.
    allowed = {
        "jax", "flax", "optax", "ml_collections", "numpy", "jaxtyping", "safetensors",
        "layermatch_jax",
    }  # fmt: skip
    others = {
        library
        for path, name in modules()
        if room(name) in below
        for library in libraries(path)
        if library not in allowed | set(sys.stdlib_module_names)
    }
    assert not others


@pytest.mark.parametrize(
    ("module", "blocked"),
    [
        # The method and the parts below it.
        (
            "layermatch_jax.method.program",
            "clu tensorflow tensorboard sklearn PIL matplotlib beartype",
        ),
        ("layermatch_jax.train", "tensorflow tensorflow_datasets matplotlib sklearn"),
        ("layermatch_jax.main", "tensorflow tensorflow_datasets matplotlib sklearn PIL orbax"),
    ],
)
def test_what_can_be_imported_without(module, blocked):
    code = (
        "import importlib.abc, sys\n"
        f"blocked = {blocked.split()!r}\n"
        "class Blocked(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if any(name == b or name.startswith(b + '.') for b in blocked):\n"
        "            raise ImportError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        f"import {module}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_long_files():
    long = [
        f"{path.relative_to(ROOT)}: {count} lines"
        for folder, limit in ((PACKAGE, 350), (ROOT / "tests", 500))
        for path in folder.rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > limit
    ]
    assert not long
