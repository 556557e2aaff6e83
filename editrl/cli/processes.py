"""`editrl grpo --num_processes N ...`: the same command in N processes, started, watched and ended together."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from pathlib import Path

from editrl.cli.parser import CommandParser, number
from editrl.errors import EditrlError

COMMANDS = ("grpo", "sft", "doctor", "precompute", "edit", "score")
"""The commands that several processes can share."""

OPTIONS = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
"""Of `accelerate launch`, with its meaning: `num_processes` are those of all machines together."""

REPORTS = "EDITRL_REPORTS"
"""Set in the processes that are started here: the folder where each says how it ended, so that it is printed once."""


def wanted(argv: list[str]) -> bool:
    """Whether this command line asks for processes of its own."""
    flags = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv[1:] if word.startswith("--")}
    return argv[0] in COMMANDS and not flags.isdisjoint(OPTIONS) and flags.isdisjoint({"help"})


def launch(argv: list[str], debug: bool = False) -> int:
    """Run `editrl *argv` in as many processes as it says. Returns its exit code; 1 after a bug, 128 + a signal."""
    options, words = _read(argv)
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    here = _processes_here(options)
    alone = options.num_machines == 1
    config = LaunchConfig(
        min_nodes=options.num_machines,
        max_nodes=options.num_machines,
        nproc_per_node=here,
        run_id=uuid.uuid4().hex if alone else "editrl",
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint="127.0.0.1:0" if alone else f"{options.main_process_ip}:{options.main_process_port}",
        rdzv_configs={} if alone else {"rank": options.machine_rank, "timeout": 900},
        local_addr="127.0.0.1" if alone else None,
        max_restarts=0,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(),
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it says of a failure, we say
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // here, 1)))
    # As this process sees the working directory or not, so do its children: an `editrl` folder there is another.
    flags = [] if {"", str(Path.cwd())} & set(sys.path) else ["-P"]
    with tempfile.TemporaryDirectory(prefix="editrl-processes-") as folder:
        os.environ[REPORTS] = folder
        try:
            elastic_launch(config, sys.executable)(*flags, "-m", "editrl", *words, *(["--debug"] if debug else []))
        except ChildFailedError as error:
            return _explain(_reports(folder), *error.get_first_failure())
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from error
            return 128 + error.sigval
        finally:
            del os.environ[REPORTS]
        return max((report["code"] for report in _reports(folder)), default=0)


def report(code: int, message: str = "") -> int:
    """The exit code of a process that `launch` started; how it ended is left for `launch` to tell.

    A result that is not 0 is no failure: torch would end the other processes for it, in the middle of their work.
    """
    text = json.dumps({"time": time.time(), "code": code, "message": message})
    Path(os.environ[REPORTS], f"{os.environ['RANK']}.json").write_text(text)
    return code if message else 0


def _reports(folder: str) -> list[dict]:
    """Of all processes of this machine, in the order in which they ended."""
    read = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    return sorted(read, key=lambda report: report["time"])


def _read(argv: list[str]):
    """The launcher's options, and the words that are the command's."""
    if "LOCAL_RANK" in os.environ or "RANK" in os.environ:
        raise EditrlError(
            f"`editrl {argv[0]}` runs under a launcher (RANK or LOCAL_RANK is set) and would start more processes in "
            "each of its own; drop --num_processes, or the launcher"
        )
    parser = CommandParser(f"editrl {argv[0]}", add_help=False)
    at_least = {"least": 1}
    for name, kind, default in (
        ("num_processes", _count, None),
        ("num_machines", number(int, **at_least), 1),
        ("machine_rank", number(int, least=0), 0),
        ("main_process_ip", str, None),
        ("main_process_port", number(int, **at_least), 29500),
    ):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", type=kind, default=default)
    options, words = parser.parse_known_args(argv)
    if options.num_processes is None:
        parser.error("give --num_processes as well: how many processes all machines have together, or auto")
    if options.num_machines > 1 and options.main_process_ip is None:
        parser.error("several machines need --main_process_ip, the address of the machine of rank 0")
    if options.machine_rank >= options.num_machines:
        parser.error(f"--machine_rank {options.machine_rank} must be below --num_machines {options.num_machines}")
    return options, words


def _count(text: str) -> int | str:
    return text if text == "auto" else number(int, least=1)(text)


_count.__name__ = "number of processes"


def _processes_here(options) -> int:
    """How many of the processes this machine has."""
    if options.num_processes == "auto":
        import torch

        if torch.cuda.device_count() == 0:
            raise EditrlError("--num_processes auto is the number of GPUs, and there is none here; give a number")
        return torch.cuda.device_count()
    if options.num_processes % options.num_machines:
        raise EditrlError(
            f"--num_processes {options.num_processes}, the processes of all machines together, must be a multiple of "
            f"--num_machines {options.num_machines}"
        )
    return options.num_processes // options.num_machines


def _explain(reports: list[dict], rank: int, failure) -> int:
    """Print why the first process failed, and return its exit code."""
    told = [report for report in reports if report["message"]]
    if told:
        print("editrl:", told[0]["message"], file=sys.stderr)
        return told[0]["code"]
    how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    print(f"editrl: process {rank} ended by {how}, and the others with it; what it printed says more", file=sys.stderr)
    return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
