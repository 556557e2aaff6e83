"""Tensor maths of flow-matching RL: schedule, kernels, solvers, objectives, advantages. Imports torch only."""

from .advantages import group_advantages, reward_shares, zero_std_groups
from .kernels import CPS, ODE, DanceSDE, FlowSDE, Kernel, Transition, get_kernel
from .matching import awm_loss, flow_matching_loss, nft_loss, rwr_loss, velocity_kl
from .objectives import PolicyLoss, dppo_loss, gaussian_kl, grpo_guard_loss, grpo_loss, timestep_weights
from .schedule import sigma_schedule
from .solvers import CleanPrediction, dpm2_step

__all__ = [
    "CPS",
    "ODE",
    "CleanPrediction",
    "DanceSDE",
    "FlowSDE",
    "Kernel",
    "PolicyLoss",
    "Transition",
    "awm_loss",
    "dpm2_step",
    "dppo_loss",
    "flow_matching_loss",
    "gaussian_kl",
    "get_kernel",
    "group_advantages",
    "grpo_guard_loss",
    "grpo_loss",
    "nft_loss",
    "reward_shares",
    "rwr_loss",
    "sigma_schedule",
    "timestep_weights",
    "velocity_kl",
    "zero_std_groups",
]
