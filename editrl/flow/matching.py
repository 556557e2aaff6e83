"""Losses of the forward process: clean samples, given or the policy's own, noised afresh and predicted again.

x_σ = (1-σ)·clean + σ·noise at any σ, whatever steps a sampler took: rollouts may use any solver (`solvers`), need no
noise and no log-probabilities, and only their last latent is kept. A loss sees the velocity predicted at x_σ, never
x_σ itself.
"""

import math

from torch import Tensor

from .objectives import PolicyLoss, grpo_loss, mean_per_sample, one_per_sample


def flow_matching_loss(
    velocity: Tensor, clean: Tensor, noise: Tensor, *, mask: Tensor | None = None, mask_weight: float = 1.0
) -> Tensor:
    """Rectified flow (arXiv 2209.03003): mean over D of (1 + mask_weight·mask)·(velocity - (noise - clean))².

    Not divided by the weights' sum: a clip with a larger edit weighs more, and without a mask it is the plain loss.

    Args:
        velocity: [B,C,F,H,W] predicted at (1-σ)·clean + σ·noise, with gradient. Any [B, ...] where there is no mask.
        clean, noise: same shape.
        mask: [B,1,F,H,W] edit region on the latent grid, in [0, 1], any dtype; zeros for a sample without one.
        mask_weight: extra weight inside the mask, at least 0.

    Returns:
        float32 [B].

    Raises:
        ValueError: shapes do not fit, or mask_weight is negative.
    """
    _check_shapes(velocity=velocity, clean=clean, noise=noise)
    if mask_weight < 0:
        raise ValueError(f"mask_weight must be at least 0, got {mask_weight!r}")
    error = (velocity.float() - _target(clean, noise)).square()
    if mask is not None:
        one_channel = (velocity.shape[0], 1, *velocity.shape[2:])
        if mask.shape != one_channel:
            raise ValueError(f"mask must be on the latent grid, {list(one_channel)}, got {list(mask.shape)}")
        error = error * (1 + mask_weight * mask.float())
    return mean_per_sample(error)


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    clean: Tensor,
    noise: Tensor,
    sigma: float | Tensor,
    advantages: Tensor,
    *,
    beta: float = 1.0,
    advantage_range: float = 5.0,
) -> Tensor:
    """DiffusionNFT (arXiv 2509.16117): good samples pull the velocity towards them, bad ones push it away.

    r = (1 + clip(A / advantage_range, -1, 1)) / 2, v⁺ = β·v + (1-β)·v_old, v⁻ = (1+β)·v_old - β·v; L± = mean over D of
    (x̂0 - clean)², x̂0 = x_σ - σ·v±, divided by the detached mean of |x̂0 - clean| (at least 1e-5);
    loss = advantage_range·(r·L⁺ + (1-r)·L⁻) / β.

    The factor advantage_range is not in the paper, but in the authors' code, and makes a step's size independent of
    the range: at velocity = old_velocity the gradient is that of clip(A)·L, with L the L± of v_old; β cancels too.
    Further on, β says how far to go: the smaller, the further (without the division by the error, the optimum lies
    2/β·E[r·(noise - clean - v_old)] from v_old). Any β > 0 is sound: v⁺ is a mean of the two for β <= 1 and goes past
    v for β > 1. A sample of advantage 0 pulls back to v_old.

    Args:
        velocity: [B, ...] predicted at x_σ = (1-σ)·clean + σ·noise, with gradient.
        old_velocity: same shape, of the policy that made `clean` (or a slow average of it) at the same x_σ; its
            gradient is ignored.
        clean: same shape, the policy's own samples.
        noise: same shape, drawn afresh.
        sigma: noise level in [0, 1] (not checked, which would wait for the GPU); float, 0-d or [B].
        advantages: [B], from `group_advantages`.
        beta: above 0; 1 or 0.1 in the authors' recipes.
        advantage_range: advantages beyond ±advantage_range count as that; above 0.

    Returns:
        float32 [B].

    Raises:
        ValueError: shapes do not fit, or beta or advantage_range is not a finite number above 0.
    """
    _check_shapes(velocity=velocity, old_velocity=old_velocity, clean=clean, noise=noise)
    _check_per_sample(velocity, advantages=advantages)
    _check_positive(beta=beta, advantage_range=advantage_range)
    share = (1 + (advantages.detach().float() / advantage_range).clamp(-1, 1)) / 2
    old = old_velocity.detach().float()
    change = beta * (velocity.float() - old)
    target, sigma = _target(clean, noise), one_per_sample("sigma", sigma, velocity)
    positive, negative = _clean_error(old + change, target, sigma), _clean_error(old - change, target, sigma)
    return advantage_range / beta * (share * positive + (1 - share) * negative)


def awm_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    clean: Tensor,
    noise: Tensor,
    advantages: Tensor,
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """Advantage Weighted Matching (arXiv 2509.25050): PPO's surrogate with the flow-matching loss as log-probability.

    log_prob = -w·mean_D((v - (noise - clean))²), old_log_prob the same with v_old, then `grpo_loss`. At
    velocity = old_velocity the ratio is exactly 1 and the gradient that of mean_B of A·w·flow_matching_loss.

    The log-ratio is w times a difference of squared errors, so epsilon is in units of w. (Flow-Factory clips at 1e-4
    with w = 1; the authors' recipes at 1, which is hardly ever, and hold the policy with a penalty instead.) As in
    `grpo_loss` on video the ratio sinks when the velocity moves at all, by w·mean_D((v - v_old)²).

    Args:
        velocity: [B, ...] predicted at (1-σ)·clean + σ·noise, with gradient.
        old_velocity: same shape, of the policy that made `clean`, at the same input; its gradient is ignored.
        clean: same shape, the policy's own samples.
        noise: same shape, drawn afresh.
        advantages: [B], from `group_advantages`.
        epsilon, epsilon_high: clip range, as in `grpo_loss`.
        weights: w, [B], at least 0 (not checked, which would wait for the GPU), a function of σ; ones when None. Not
            the `weights` of `grpo_loss`: these are inside the log-probability and change the ratio.

    Raises:
        ValueError: shapes do not fit, or a clip range is out of range.
    """
    _check_shapes(velocity=velocity, old_velocity=old_velocity, clean=clean, noise=noise)
    _check_per_sample(velocity, advantages=advantages, weights=weights)
    scale = 1 if weights is None else weights.float()
    log_prob = -scale * flow_matching_loss(velocity, clean, noise)
    old_log_prob = -scale * flow_matching_loss(old_velocity.detach(), clean, noise)
    return grpo_loss(log_prob, old_log_prob, advantages, epsilon=epsilon, epsilon_high=epsilon_high)


def rwr_loss(
    velocity: Tensor,
    clean: Tensor,
    noise: Tensor,
    advantages: Tensor,
    *,
    temperature: float = 1.0,
    compared: Tensor | None = None,
) -> Tensor:
    """Reward-weighted regression (AWR, arXiv 1910.00177; for flows arXiv 2501.13918): SFT on own samples.

    exp(A/temperature)·`flow_matching_loss`, the weights divided by their mean over `compared`. The baseline that VIVA
    argues against: no weight is negative, so a bad sample is imitated less, but the policy never pushed away from it.

    Args:
        velocity: [B, ...] predicted at (1-σ)·clean + σ·noise, with gradient.
        clean, noise: same shape.
        advantages: [B], from `group_advantages`; its gradient is ignored.
        temperature: above 0; the smaller, the more the best samples count.
        compared: [N], the advantages of all samples that the weights are relative to: of the whole rollout, where a
            call sees a micro-batch of it. Those of this call when None, so that in a batch of one no advantage counts.

    Returns:
        float32 [B].

    Raises:
        ValueError: shapes do not fit, or temperature is not a finite number above 0.
    """
    _check_per_sample(velocity, advantages=advantages)
    _check_positive(temperature=temperature)
    compared = (advantages if compared is None else compared).detach().float()
    best = compared.max()  # relative to it, no exponential overflows

    def exponential(values: Tensor) -> Tensor:
        return ((values.detach().float() - best) / temperature).exp()

    weights = exponential(advantages) / exponential(compared).mean()
    return weights * flow_matching_loss(velocity, clean, noise)


def velocity_kl(velocity: Tensor, ref_velocity: Tensor) -> Tensor:
    """What stands for the KL to the reference where there is no transition: mean over D of (v - v_ref)².

    As in DiffusionNFT's code. The KL of a denoising step (`gaussian_kl`) is this times g²/2, g the kernel's
    `gradient_scale`, so a beta does not carry over from there.

    Args:
        velocity: [B, ...] with gradient; run the forward that made it outside `torch.no_grad`.
        ref_velocity: same shape, of the reference, whose forward alone belongs under `torch.no_grad`.

    Returns:
        float32 [B], at least 0.

    Raises:
        ValueError: shapes differ.
    """
    _check_shapes(velocity=velocity, ref_velocity=ref_velocity)
    return mean_per_sample((velocity.float() - ref_velocity.float()).square())


def _target(clean: Tensor, noise: Tensor) -> Tensor:
    return noise.float() - clean.float()


def _clean_error(velocity: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
    """Squared error of the clean prediction over its own size, [B].

    (x_σ - σ·v) - clean = σ·(noise - clean - v), so neither x_σ nor the prediction is needed.
    """
    error = target - velocity
    size = sigma * mean_per_sample(error.detach().abs())
    return sigma.square() * mean_per_sample(error.square()) / size.clamp(min=1e-5)


def _check_shapes(**tensors: Tensor) -> None:
    shapes = [list(tensor.shape) for tensor in tensors.values()]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"{', '.join(tensors)} have different shapes: {shapes}")


def _check_per_sample(velocity: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != velocity.shape[:1]:
            raise ValueError(f"{name} must be [B], {list(velocity.shape[:1])}, got {list(tensor.shape)}")


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
