"""Several processes for a test file that runs as a program: forked, they need not import everything again."""

import os
import socket
import sys
from collections.abc import Callable

import torch
from torch import distributed, multiprocessing


def run(function: Callable, processes: int, *arguments) -> None:
    """Call `function(*arguments)` in so many processes, several with what a launcher sets. An error of one ends all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    method = "fork" if sys.platform == "linux" else "spawn"
    multiprocessing.start_processes(
        _call, (processes, port, function, arguments), nprocs=processes, start_method=method
    )


def _call(rank: int, processes: int, port: int, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        os.environ.pop(name, None)
        if processes > 1:
            os.environ[name] = str(value)
    function(*arguments)
    if distributed.is_initialized():
        distributed.destroy_process_group()
