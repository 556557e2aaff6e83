"""The noise levels that a sampler visits."""

import math
from numbers import Real

import torch
from torch import Tensor


def sigma_schedule(num_steps: int, shift: float = 1.0) -> Tensor:
    """Noise levels from pure noise (1) to a clean sample (0), pushed towards noise by `shift`.

    σ_i = s·u_i / (1 + (s-1)·u_i) with u = linspace(1, 0, num_steps + 1) and s = shift, the static shift of SD3 and
    HunyuanVideo. Compute it once and hand the same tensor to the rollout and to training; a scheduler that shifts its
    sigmas itself would shift these a second time. A model's timestep is `sigma * 1000` in float32, cast afterwards.

    Args:
        num_steps: number of denoising steps T, at least 1.
        shift: s, above 0; 1 is a uniform grid. HunyuanVideo samples with 7, most RL recipes train with 5, image models
            use 1 to 3.

    Returns:
        float32 [T+1] on the CPU, strictly decreasing, first value exactly 1.0 and last exactly 0.0.

    Raises:
        ValueError: `num_steps` is not a whole number of at least 1, or `shift` is not a finite number above 0.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be a whole number of at least 1, got {num_steps!r}")
    if isinstance(shift, bool) or not isinstance(shift, Real) or not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift must be a finite number above 0, got {shift!r}")
    u = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * u / (1 + (shift - 1) * u)).float()  # rounded once, so that the first value is 1 for every shift
