"""A second-order solver of the probability-flow ODE, for sampling where no step is trained.

`get_kernel("ode")` is Euler's step. This one costs the same single forward and remembers the step before it.
"""

import math
from typing import NamedTuple

from torch import Tensor

from .kernels import check_levels


class CleanPrediction(NamedTuple):
    """What a multistep solver remembers of a step: hand it to the next one.

    clean: float32 [B, ...], x̂0 = x - σ·v.
    sigma: the noise level it was predicted at.
    """

    clean: Tensor
    sigma: float


def dpm2_step(
    sample: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    previous: CleanPrediction | None = None,
) -> tuple[Tensor, CleanPrediction]:
    """One step of DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), written for flow matching.

    With λ = log((1-σ)/σ), h = λ_next - λ and the clean prediction extrapolated from the last two,
    D = x̂0 + h/(2·h_previous)·(x̂0 - x̂0_previous): next = (σ_next/σ)·x + (1 - σ_next/σ)·D. With D = x̂0 this is Euler's
    step, which is what a step does that has no usable history (`previous` None, or from σ = 1, where λ is -∞ and the
    extrapolation vanishes) and the last one (σ_next = 0, where λ is +∞; as in diffusers, lower order at the end).

        previous = None
        for sigma, sigma_next in itertools.pairwise(sigmas):
            sample, previous = dpm2_step(sample, model(sample, sigma), sigma, sigma_next, previous)

    Args:
        sample: latents at `sigma`, [B, ...], any floating dtype.
        velocity: the model's noise - clean there, same shape.
        sigma, sigma_next: noise levels in [0, 1], one for the whole batch (float or 0-d, on the CPU);
            sigma_next < sigma.
        previous: returned by the step that ended at `sigma`; None for the first.

    Returns:
        The sample at `sigma_next`, in the dtype of `sample`, and what the following step takes as `previous`. The maths
        is float32.

    Raises:
        ValueError: shapes differ; sigmas are out of order or range or more than one; `previous` is not of an earlier,
            noisier step.
    """
    for name, tensor in (("velocity", velocity), ("previous.clean", previous and previous.clean)):
        if tensor is not None and tensor.shape != sample.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but sample has {list(sample.shape)}")
    levels = check_levels(sigma, sigma_next)
    if levels[0].ndim:
        raise ValueError(f"dpm2_step takes one sigma for the whole batch, got {list(levels[0].shape)}")
    sigma, sigma_next = (level.item() for level in levels)
    if previous is not None and not previous.sigma > sigma:
        raise ValueError(f"previous was predicted at sigma {previous.sigma:.6g}, not above {sigma:.6g}")

    velocity = velocity.float()
    clean = sample.float() - sigma * velocity
    next_sample = sample.float() + (sigma_next - sigma) * velocity
    if previous is not None and previous.sigma < 1 and sigma_next > 0:
        extrapolation = _step_size(sigma, sigma_next) / (2 * _step_size(previous.sigma, sigma))
        next_sample = next_sample + (1 - sigma_next / sigma) * extrapolation * (clean - previous.clean)
    return next_sample.to(sample.dtype), CleanPrediction(clean, sigma)


def _step_size(sigma: float, sigma_next: float) -> float:
    """h = λ_next - λ, λ = log((1-σ)/σ); both strictly between 0 and 1."""
    return math.log((1 - sigma_next) * sigma / (sigma_next * (1 - sigma)))
