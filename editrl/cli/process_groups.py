"""The processes of a launcher, divided into groups that share each clip."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from editrl.errors import EditrlError

UNLIMITED = timedelta(days=30)
"""Processes wait for each other at the end, and one of them may have the longest clips."""


@dataclass
class Processes:
    """This process among `world` of them, of which each `degree` neighbours share their clips."""

    rank: int = 0
    world: int = 1
    degree: int = 1
    sharers: distributed.ProcessGroup | None = None
    """Through which the processes of a group agree."""

    @classmethod
    def of_torchrun(cls, degree: int) -> Processes:
        """As the launcher says, or one; takes the process' GPU. EditrlError if they form no groups of `degree`."""
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if world % degree:
            raise EditrlError(
                f"--context_parallel {degree} needs a multiple of {degree} processes, here are {world}; start with "
                f"`editrl edit --num_processes {degree} ...`, or leave it out"
            )
        if world > 1 and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return cls(rank, world, degree)

    @property
    def groups(self) -> int:
        return self.world // self.degree

    @property
    def group(self) -> int:
        """The number of this process' group."""
        return self.rank // self.degree

    @property
    def leads(self) -> bool:
        """Whether this process writes and reports for its group."""
        return self.rank % self.degree == 0

    def connect(self, device: torch.device) -> None:
        """Initialise `torch.distributed`; all processes have to get here."""
        if self.world == 1:
            return
        backend = "gloo"
        if self.degree > 1 and device.type != "cpu":  # tokens are exchanged between GPUs, messages as before
            backend = f"cpu:gloo,{device.type}:{distributed.get_default_backend_for_device(device)}"
        distributed.init_process_group(backend, timeout=UNLIMITED)
        if self.degree > 1:
            self.sharers, _ = distributed.new_subgroups(self.degree, timeout=UNLIMITED, backend="gloo")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """An error that this block raises in one process of a group is raised in all: none goes on to another clip
        while the others are still at this one, and would take its tokens for theirs."""
        if self.sharers is None:
            yield
            return
        failure, reasons = None, [None] * self.degree
        try:
            yield
        except (EditrlError, OSError, RuntimeError) as error:
            failure = error
        distributed.all_gather_object(reasons, None if failure is None else str(failure), group=self.sharers)
        if failure is not None:
            raise failure
        if any(reason is not None for reason in reasons):
            raise EditrlError(next(reason for reason in reasons if reason is not None))
