"""A rollout as it is cut for training: chunks of as many clips as one micro-batch has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from editrl.policy import Conditions
from editrl.rollout import Trajectory


@dataclass
class Chunk:
    """Clips that were sampled together and are trained together: a replay in the same batch is exact."""

    trajectory: Trajectory
    conditions: Conditions
    groups: list[int]  # [B], whose numbers are unique over the run
    members: list[int]  # [B], within their groups
    advantages: Tensor  # [B]


def select(chunks: Sequence[Chunk], rows: Sequence[int], size: int) -> list[Chunk]:
    """The clips `rows` (positions over all chunks) as chunks of `size`."""
    whole = Chunk(
        join([chunk.trajectory for chunk in chunks]),
        Conditions.concatenate(chunk.conditions for chunk in chunks),
        [group for chunk in chunks for group in chunk.groups],
        [member for chunk in chunks for member in chunk.members],
        torch.cat([chunk.advantages for chunk in chunks]),
    )
    parts = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    return [
        Chunk(
            take(whole.trajectory, part),
            whole.conditions[torch.tensor(part, device=whole.advantages.device)],
            [whole.groups[row] for row in part],
            [whole.members[row] for row in part],
            whole.advantages[part],
        )
        for part in parts
    ]


def join(trajectories: Sequence[Trajectory]) -> Trajectory:
    """One trajectory of all samples; their windows are the same."""

    def joined(name: str):
        values = [getattr(trajectory, name) for trajectory in trajectories]
        if name in ("steps", "collected"):
            return values[0]
        return torch.cat(values) if name == "clean" else [torch.cat(step) for step in zip(*values, strict=True)]

    return Trajectory(*(joined(field.name) for field in fields(Trajectory)))


def take(trajectory: Trajectory, rows: Sequence[int]) -> Trajectory:
    """The samples `rows` of a trajectory."""

    def taken(name: str):
        value = getattr(trajectory, name)
        if name in ("steps", "collected"):
            return value
        return value[rows] if name == "clean" else [step[rows] for step in value]

    return Trajectory(*(taken(field.name) for field in fields(Trajectory)))


def best_and_worst(advantages: Tensor, groups: Sequence[int], selected: int) -> list[int]:
    """Positions of each group's `selected` / 2 highest and as many lowest advantages (DanceGRPO's best of N)."""
    values, members = advantages.tolist(), {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    kept = []
    for positions in members.values():
        ranked = sorted(positions, key=lambda position: values[position])
        kept += ranked[: selected // 2] + ranked[len(ranked) - selected // 2 :]
    return sorted(kept)
