"""Tensor maths of flow-matching RL: schedule, transition kernels, objectives, advantages. Imports torch only."""

from .advantages import group_advantages, zero_std_groups
from .kernels import CPS, ODE, DanceSDE, FlowSDE, Kernel, Transition, get_kernel
from .objectives import (
    PolicyLoss,
    flow_matching_loss,
    gaussian_kl,
    grpo_guard_loss,
    grpo_loss,
    timestep_weights,
)
from .schedule import sigma_schedule

__all__ = [
    "CPS",
    "ODE",
    "DanceSDE",
    "FlowSDE",
    "Kernel",
    "PolicyLoss",
    "Transition",
    "flow_matching_loss",
    "gaussian_kl",
    "get_kernel",
    "group_advantages",
    "grpo_guard_loss",
    "grpo_loss",
    "sigma_schedule",
    "timestep_weights",
    "zero_std_groups",
]
