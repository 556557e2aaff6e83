"""The commands of the benchmarks, in this process: starting one takes longer than a tiny run."""

import importlib
import sys

import pytest


@pytest.fixture
def benchmark(monkeypatch):
    """(room, module, words...): what `python -m editrl.benchmarks.ROOM.MODULE WORD...` does."""

    def run(room: str, module: str, *words) -> None:
        command = importlib.import_module(f"editrl.benchmarks.{room}.{module}")
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", [module, *map(str, words)])
            command.main()

    return run
