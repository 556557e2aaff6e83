"""Policy losses of the denoising steps that a rollout took, and the KL to a reference (own samples: `matching`).

A log-probability here is a mean over the D elements of a sample, not a sum (`kernels`), so ratios lie within about
1 ± 1e-3 and clip ranges are of the order 1e-4 (`grpo_loss`) or 2e-6 (`grpo_guard_loss`), not PPO's 0.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import Kernel


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss and what to log about it.

    loss: float32 [], mean over the B samples; the only field with a gradient.
    ratio: float32 [B], detached, before clipping. Exactly 1 before the first update; the sign and the size of
        `ratio - 1` against the clip range tell whether clipping can act at all.
    clipped_low: bool [B], the sample has no gradient because its ratio fell below 1 - epsilon and its advantage is < 0.
        In `dppo_loss`, which has no clip range: dropped, with an advantage < 0.
    clipped_high: bool [B], the sample has no gradient because its ratio rose above 1 + epsilon_high and its advantage
        is > 0. In `dppo_loss`: dropped, with an advantage > 0.
    """

    loss: Tensor
    ratio: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate on one denoising step, as in Flow-GRPO and DanceGRPO.

    r = exp(log_prob - old_log_prob), loss = mean_B of w·max(-A·r, -A·clip(r, 1 - epsilon, 1 + epsilon_high)).

    On video the clip is one-sided: at D = 806,000 elements and a standardised drift of 0.02 an element every ratio lies
    below 1 - 1e-4 whatever its advantage, so positive advantages are never limited. `grpo_guard_loss` is for that.

    Args:
        log_prob: [B] under the current weights, with gradient.
        old_log_prob: [B] under the weights of the rollout; its gradient is ignored.
        advantages: [B], from `group_advantages`.
        epsilon: lower clip range, in (0, 1); about 1e-4.
        epsilon_high: upper clip range, above 0; the same as `epsilon` when None.
        weights: [B] factors on each sample's loss (`timestep_weights`); ones when None.

    Raises:
        ValueError: shapes are not all [B], or a clip range is out of range.
    """
    _check_batch(log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages, weights=weights)
    ratio = (log_prob.float() - old_log_prob.detach().float()).exp()
    return _clipped_surrogate(ratio, advantages, epsilon, epsilon_high, weights)


def grpo_guard_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    mean: Tensor,
    old_mean: Tensor,
    std: Tensor,
    dt: float | Tensor,
    epsilon: float,
    epsilon_high: float | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """GRPO-Guard (arXiv 2510.22319): the clipped surrogate with a normalised ratio, divided by |dt|.

    b = mean_D((mean - old_mean)²) / (2·std²), r = exp((log_prob - old_log_prob + b)·std). The bias b is by how much a
    mean-reduced log-ratio sinks on average when the mean moves at all; with it added back, the exponent is the mean
    over D of noise·(mean - old_mean): centred on 0 and of the same width at every noise level, so that one clip range
    limits both signs at all steps. b keeps its gradient, as in the authors' code.

    Args:
        log_prob, old_log_prob, advantages, epsilon, epsilon_high, weights: as in `grpo_loss`; epsilon about 2e-6.
        mean: [B, ...] transition mean under the current weights, with gradient.
        old_mean: [B, ...] the one kept from the rollout; its gradient is ignored.
        std: of the transition, sqrt|dt| included; 0-d, [B] or [B, 1, ...].
        dt: σ_next - σ of the step (its sign does not matter); float, 0-d or [B], best kept on the CPU.

    Raises:
        ValueError: as `grpo_loss`; the shapes of the means differ; std or dt is not one value a sample; dt is 0.
    """
    _check_batch(log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages, weights=weights)
    bias = _moved_by(mean, old_mean, std, log_prob)
    if (torch.as_tensor(dt) == 0).any():
        raise ValueError("dt must not be 0: give sigma_next - sigma of the step")
    step_size = one_per_sample("dt", dt, mean).abs()
    difference = log_prob.float() - old_log_prob.detach().float()
    ratio = ((difference + bias) * one_per_sample("std", std, mean)).exp()
    weights = 1 / step_size if weights is None else weights.float() / step_size
    return _clipped_surrogate(ratio, advantages, epsilon, epsilon_high, weights)


def dppo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    mean: Tensor,
    old_mean: Tensor,
    std: Tensor,
    threshold: float = 1e-5,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """Flow-DPPO (arXiv 2606.11025): no clip; a term is dropped where the transition itself has moved too far.

    r = exp(log_prob - old_log_prob), loss = mean_B of -w·A·r·keep. A term is dropped (keep = 0, no gradient) where both
    hold: mean_D((mean - old_mean)²) / (2·std²) >= threshold, and the ratio has already moved the advantage's way
    (r > 1 and A > 0, or r < 1 and A < 0). A term that pulls the policy back always keeps its gradient. Dropped terms
    count in the mean over B, so that the others do not get heavier.

    The distance is exact where a ratio is one noisy draw, but the direction is still read off the mean-reduced ratio,
    which a drift blind to the noise pushes below 1 on video whatever its advantage (see `grpo_loss`): dropping is then
    as one-sided as clipping. Compare the two clip fractions.

    Args:
        log_prob, old_log_prob, advantages, weights: as in `grpo_loss`.
        mean: [B, ...] transition mean under the current weights; its gradient is ignored, log_prob carries it.
        old_mean: [B, ...] the one kept from the rollout.
        std: of the transition, sqrt|dt| included; 0-d, [B] or [B, 1, ...].
        threshold: above 0; 1e-5 is a mean that moved by 0.0045 std an element.

    Raises:
        ValueError: shapes are not all [B]; the shapes of the means differ; std is not one value a sample; threshold is
            not above 0.
    """
    _check_batch(log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages, weights=weights)
    if not threshold > 0:
        raise ValueError(f"threshold must be above 0, got {threshold!r}")
    advantages = advantages.float()
    ratio = (log_prob.float() - old_log_prob.detach().float()).exp()
    too_far = _moved_by(mean.detach(), old_mean, std, log_prob) >= threshold
    dropped_low = too_far & (ratio < 1) & (advantages < 0)
    dropped_high = too_far & (ratio > 1) & (advantages > 0)
    losses = (-advantages * ratio).masked_fill(dropped_low | dropped_high, 0)
    if weights is not None:
        losses = losses * weights
    return PolicyLoss(loss=losses.mean(), ratio=ratio.detach(), clipped_low=dropped_low, clipped_high=dropped_high)


def gaussian_kl(mean: Tensor, ref_mean: Tensor, std: Tensor) -> Tensor:
    """KL between two transitions of the same std, divided by the number of elements D.

    mean over D of (mean - ref_mean)² / (2·std²), std with sqrt|dt|: the true Gaussian KL per element. Other libraries
    leave out |dt|, or the variance, or measure against the rollout policy; their betas do not carry over.

    Args:
        mean: [B, ...] with gradient; run the forward that made it outside `torch.no_grad`.
        ref_mean: [B, ...] of the reference, whose forward alone belongs under `torch.no_grad`.
        std: 0-d, [B] or [B, 1, ...]; above 0 (not checked, which would wait for the GPU; `step` refuses to score a
            step of std 0).

    Returns:
        float32 [B], at least 0.

    Raises:
        ValueError: shapes differ, or std is not one value a sample.
    """
    if mean.shape != ref_mean.shape:
        raise ValueError(f"the means have different shapes: {list(mean.shape)} and {list(ref_mean.shape)}")
    variance = one_per_sample("std", std, mean).square()
    return mean_per_sample((mean.float() - ref_mean.float()).square()) / (2 * variance)


def timestep_weights(kernel: Kernel, sigmas: Tensor, steps: Sequence[int], mode: str = "none") -> Tensor:
    """Loss weights of the trained denoising steps.

    "uniform_gradient" weights each step by 1/g, g = `kernel.gradient_scale`, so that all steps pull equally hard on the
    velocity; over 16 steps of `flow_sde` g spans a factor of 82 at shift 5, of 218 at shift 17. Normalised to
    mean 1 over `steps`, so the learning rate keeps its meaning. Made for `grpo_loss`. `grpo_guard_loss` pulls equally
    hard at every step of `flow_sde` by itself (std in its exponent cancels the one in g, 1/|dt| does the rest), so the
    same weights on top of it favour early steps by the factor they were meant to remove.

    Args:
        kernel: from `get_kernel`.
        sigmas: [T+1], from `sigma_schedule`.
        steps: indices i of the trained steps sigmas[i] → sigmas[i+1], each in 0 ... T-1, at least one.
        mode: "none" (ones) or "uniform_gradient".

    Returns:
        float32 [len(steps)] on the device of `sigmas`, mean 1.

    Raises:
        ValueError: unknown mode, no steps or a step outside the schedule, or a step whose std is 0.
    """
    if mode not in ("none", "uniform_gradient"):
        raise ValueError(f"unknown timestep weighting {mode!r}: use 'none' or 'uniform_gradient'")
    num_steps = len(sigmas) - 1
    outside = [step for step in steps if not 0 <= step < num_steps]
    if outside or not len(steps):
        raise ValueError(f"steps must name at least one of the steps 0 ... {num_steps - 1}, got {list(steps)}")
    if mode == "none":
        return torch.ones(len(steps), device=sigmas.device)
    index = torch.as_tensor(steps, device=sigmas.device)
    weights = 1 / kernel.gradient_scale(sigmas[index], sigmas[index + 1])
    return weights / weights.mean()


def _clipped_surrogate(
    ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float | None, weights: Tensor | None
) -> PolicyLoss:
    if epsilon_high is None:
        epsilon_high = epsilon
    if not 0 < epsilon < 1 or not epsilon_high > 0:
        raise ValueError(f"epsilon must be in (0, 1) and epsilon_high above 0, got {epsilon!r} and {epsilon_high!r}")
    advantages = advantages.float()
    low, high = 1 - epsilon, 1 + epsilon_high
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    if weights is not None:
        losses = losses * weights
    ratio = ratio.detach()
    return PolicyLoss(
        loss=losses.mean(),
        ratio=ratio,
        clipped_low=(ratio < low) & (advantages < 0),
        clipped_high=(ratio > high) & (advantages > 0),
    )


def _moved_by(mean: Tensor, old_mean: Tensor, std: Tensor, log_prob: Tensor) -> Tensor:
    """How far the transition moved since the rollout: its KL to the old one divided by D, [B]."""
    kl = gaussian_kl(mean, old_mean.detach(), std)
    if kl.shape != log_prob.shape:
        raise ValueError(f"mean holds {len(kl)} samples, but log_prob has shape {list(log_prob.shape)}")
    return kl


def _check_batch(**tensors: Tensor | None) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(shapes["log_prob"]) != 1 or any(shape != shapes["log_prob"] for shape in shapes.values()):
        raise ValueError(f"all of these must have the same shape [B]: {shapes}")


def one_per_sample(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """`value` (float, 0-d, [B] or [B, 1, ...]) as float32, [1] or [B], on the device of `like` [B, ...]."""
    flat = torch.as_tensor(value).reshape(-1)
    flat = flat.to(like.device, torch.float32, non_blocking=flat.device.type == "cpu")  # does not wait for the GPU
    if len(flat) not in (1, len(like)):
        raise ValueError(f"{name} must be one value, or one for each of the {len(like)} samples, got {len(flat)}")
    return flat


def mean_per_sample(value: Tensor) -> Tensor:
    """Mean over all but the first dimension, [B, ...] → [B]."""
    return value.reshape(len(value), -1).mean(dim=1)
