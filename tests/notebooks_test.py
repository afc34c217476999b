"""The notebooks are saved after a whole run, and run from top to bottom."""

import pathlib
import re

import nbclient
import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
# Outputs that show that the saved run was not a shortened one.
WHOLE = {"quickstart": "1000 steps", "gradient_masks": "layermatch, 500 steps"}
KILOBYTES = 400


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook):
    """Counts the pictures of each cell."""
    return [
        sum("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in code_cells(notebook)
    ]


def text(notebook):
    """Returns all text that the cells have printed or shown."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    shown = [output.get("data", {}).get("text/markdown", "") for output in outputs]
    return "\n".join([*shown, *(output.get("text", "") for output in outputs)])


def test_all_are_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(WHOLE)


@pytest.mark.parametrize("name", WHOLE)
def test_saved_after_a_whole_run(name):
    notebook = read(name)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert "error" not in {output.output_type for output in outputs}
    assert "stderr" not in {output.get("name") for output in outputs}
    assert sum(pictures(notebook)) >= 3
    assert WHOLE[name] in text(notebook)
    # No paths of the machine that it ran on.
    assert not re.search(r"(^|[\s'\"=])(/|~/|[A-Z]:\\)\w", text(notebook))
    size = (FOLDER / f"{name}.ipynb").stat().st_size
    hint = "save its pictures with fewer colors, Image.quantize(256, Image.Quantize.MAXCOVERAGE)"
    assert size < KILOBYTES * 1000, hint


def again_with_own_images(notebook):
    """Returns the cells as a user changes them for a folder and new images of unknown classes."""
    folder, _, _, predictions, pictures_of_them = code_cells(notebook)[1:]
    own = folder.source
    for line, changed in (
        ("root = None", "root = pathlib.Path(str(root))"),
        ("new_files = []", "new_files = [str(file) for file in new_files[:3]]"),
    ):
        assert line in own
        own = own.replace(line, changed)
    forget = (
        "del data, seen, path, n, number, c, new_classes"  # variables that only the digits need
    )
    cells = (forget, own, predictions.source, pictures_of_them.source, "assert len(classes) == 3")
    return [nbformat.v4.new_code_cell(source) for source in cells]


@pytest.mark.parametrize(
    "name", ["quickstart", pytest.param("gradient_masks", marks=pytest.mark.slow)]
)
def test_runs(name, monkeypatch, tmp_path):
    monkeypatch.setenv("LAYERMATCH_SHORT", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as a user has it
    notebook = read(name)
    saved = pictures(notebook)
    notebook.cells += again_with_own_images(notebook) if name == "quickstart" else []
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()  # raises what a cell raises
    assert pictures(notebook)[: len(saved)] == saved
    assert WHOLE[name] not in text(notebook)
