"""What tests of several rooms need."""

import collections
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    """Files with slow tests come first: a file stays in one process, and at the end one would run alone."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def run_program():
    """(file, folder, seconds, *words): run a test file as a program, `python FILE FOLDER WORD...`, for tests of several
    processes.

    Fails with the end of the program's output where it fails or takes longer.
    """

    def run(file: str, folder: Path, seconds: float, *words: str) -> None:
        with open(folder / "log", "w") as log:
            # A session of its own, so that all of it can be killed.
            program = subprocess.Popen(
                [sys.executable, file, str(folder), *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                program.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(program.pid, signal.SIGKILL)
                program.wait()
        if program.returncode != 0:
            pytest.fail(f"the processes ended with {program.returncode}:\n{(folder / 'log').read_text()[-4000:]}")

    return run


@pytest.fixture
def quick_compiler(monkeypatch):
    """`torch.compile` traces, decomposes and partitions as for Inductor and generates no code, which takes minutes."""
    import torch

    quick = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", quick)
