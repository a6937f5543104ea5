"""The command line in this process: importing torch takes longer than most commands."""

import sys
import warnings
from typing import NamedTuple

import pytest


class Done(NamedTuple):
    returncode: int
    stderr: str
    stdout: str


@pytest.fixture
def s2o(monkeypatch, capsys):
    """Run the command line: its status, and what it printed."""
    pytest.importorskip("typer")
    from s2o_compile.cli.loading import UnusedWeightsWarning
    from s2o_compile.cli.main import main

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # nothing is asked for on the net, five times over without one
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["s2o", *map(str, args)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", UnusedWeightsWarning)
            try:
                main()
                status = 0
            except SystemExit as error:
                status = error.code or 0
        printed = capsys.readouterr()
        return Done(status, printed.err, printed.out)

    return run
