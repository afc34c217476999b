import json
import os

import pytest
from etils import epath

from layermatch_jax.errors import InputError
from layermatch_jax.runtime import files


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "a.json"


def test_text_and_json_come_back(path):
    assert files.write_text(path, "Äpfel\n") == path
    assert path.read_bytes() == b"\xc3\x84pfel\n"
    files.write_json(path, {"n": [1, 2]})
    assert json.loads(path.read_text()) == {"n": [1, 2]}
    assert files.read_json(path, "") == {"n": [1, 2]}
    assert os.listdir(path.parent) == ["a.json"]


def test_the_bytes_are_on_the_disk_before_the_file_has_its_name(path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def record_replace(before, after):
        done.append("renamed")
        replace(before, after)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    files.write_text(path, "x")
    assert done == ["a.json.part", "renamed", path.parent.name]


def test_a_failure_leaves_the_old_file(path, monkeypatch):
    files.write_text(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize("damaged", [b"", b'{"a": ', b"\x00\x00\x00", b"\xff{}"])
def test_a_damaged_file_is_named(path, damaged):
    path.write_bytes(damaged)
    with pytest.raises(InputError) as caught:
        files.read_json(path, "Bring it back.")
    assert str(caught.value).startswith(f"{path} is damaged: ")
    assert str(caught.value).endswith(" Bring it back.")
