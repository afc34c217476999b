"""Printing to an encoding that lacks some characters."""

import io
import os
import pathlib
import subprocess
import sys

import pytest

from layermatch_jax.runtime import terminal

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("ascii", b"55.0 +/- 7.1, -2, lambda_u ||g||^2, \\xc4pfel, caf\xe9"),
        ("latin-1", b"55.0 \xb1 7.1, -2, lambda_u ||g||\xb2, \xc4pfel, caf\xe9"),
        ("utf-8", "55.0 ± 7.1, −2, λ_u ‖g‖², Äpfel, caf".encode() + b"\xe9"),
    ],
)
def test_what_an_encoding_lacks_is_spelt_in_ascii(encoding, written, monkeypatch):
    """The last word is a file name whose é is a Latin-1 byte."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding))
    terminal.allow_any_text()
    for stream in (sys.stdout, sys.stderr):
        print("55.0 ± 7.1, −2, λ_u ‖g‖², Äpfel,", os.fsdecode(b"caf\xe9"), end="", file=stream)
        stream.flush()
        assert stream.buffer.getvalue() == written


def test_streams_of_other_kinds_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    terminal.allow_any_text()
    print("±")
    assert sys.stdout.getvalue() == "±\n"


@pytest.mark.parametrize(
    ("command", "status", "printed"),
    [
        (["launch/sweep.py", "--help"], 0, "mean +/- standard deviation"),
        (["-m", "layermatch_jax.main", "--mode=±"], 2, "unknown --mode '+/-'."),
    ],
)
def test_the_commands_print_in_ascii(command, status, printed):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == status
    assert printed in " ".join((done.stdout + done.stderr).split())
