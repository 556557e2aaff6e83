"""Transition kernels: how one denoising step draws the next latent, and how likely a stored one was.

Every kernel is a Gaussian N(mean, std²) whose mean is linear in the latent and in the velocity. A kernel therefore is
three numbers a step (`coefficients`); drawing, scoring and checking are the same functions for all of them.

Conventions: x_σ = (1-σ)·clean + σ·noise, velocity v = noise - clean, σ runs from 1 to 0, |dt| = σ - σ_next, and `std`
always includes sqrt|dt|.
"""

import difflib
import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Transition(NamedTuple):
    """One step σ → σ_next of a batch.

    next_sample: [B, ...] in the dtype of the sample; what must be stored, and what `log_prob` scores.
    mean: float32 [B, ...]; carries the gradient of the velocity.
    std: float32, 0-d or [B, 1, ...]; includes sqrt|dt|.
    log_prob: float32 [B]; mean (not sum) over a sample's elements of the log-density of `next_sample`. Zeros where a
        drawn step has std 0, because a point mass has no density.
    """

    next_sample: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor


def _step(
    kernel: "Kernel",
    sample: Tensor,
    velocity: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    noise: Tensor | None = None,
    next_sample: Tensor | None = None,
) -> Transition:
    """Draw the next latent from `noise`, or score a stored `next_sample`; both run the same arithmetic.

    Replaying a drawn `next_sample` with the same inputs returns the same `log_prob` bit for bit, in batches of any
    size. The maths is float32 whatever the inputs are; the next latent is rounded to the dtype of `sample` before it
    is scored, because the rounded one is what the rollout stores.

    Args:
        sample: latents at `sigma`, [B, ...], any floating dtype.
        velocity: the model's noise - clean, same shape, any floating dtype; its gradient comes through the mean.
        sigma, sigma_next: noise levels in [0, 1], float, 0-d or [B]; sigma_next < sigma. Keep tensors on the CPU: the
            checks read their values, which for a GPU tensor waits for the GPU.
        noise: standard normal, same shape; draws `mean + std * noise`.
        next_sample: the stored next latent, same shape. A stochastic kernel takes exactly one of `noise` and
            `next_sample`; `ode` needs neither.

    Returns:
        Transition(next_sample, mean, std, log_prob).

    Raises:
        ValueError: shapes differ, sigmas are out of order or range, not exactly one of `noise` and `next_sample`, or
            `next_sample` is to be scored at a step whose std is 0.
    """
    for name, tensor in (("velocity", velocity), ("noise", noise), ("next_sample", next_sample)):
        if tensor is not None and tensor.shape != sample.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but sample has {list(sample.shape)}")
    if noise is not None and next_sample is not None:
        raise ValueError(f"{kernel.name}: give noise (to draw) or next_sample (to score), not both")
    if noise is None and next_sample is None and kernel.stochastic:
        raise ValueError(f"{kernel.name} is stochastic: give noise (to draw) or next_sample (to score)")

    levels = check_levels(sigma, sigma_next)
    sample_weight, velocity_weight, std = kernel.coefficients(*levels)
    if next_sample is not None and (std == 0).any():
        raise ValueError(
            f"{kernel.name} has std 0 at the step {_show(levels[0])} -> {_show(levels[1])}, so a stored next_sample "
            "has no log-probability there: leave this step out of training, or use another kernel"
        )
    sample_weight, velocity_weight, std = (_per_sample(c, sample) for c in (sample_weight, velocity_weight, std))
    mean = sample_weight * sample.float() + velocity_weight * velocity.float()
    if next_sample is None:
        next_sample = mean if noise is None else mean + std * noise.float()
    next_sample = next_sample.to(sample.dtype)
    return Transition(next_sample, mean, std, _log_prob(next_sample, mean, std))


def _std(kernel: "Kernel", sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
    """Standard deviation of the step, sqrt|dt| included: float32, 0-d, or [B] where a sigma is [B]."""
    return kernel.coefficients(*check_levels(sigma, sigma_next))[2]


def _gradient_scale(kernel: "Kernel", sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
    """g(σ) = |∂mean/∂velocity| / std: how hard log_prob pulls on the velocity, per unit of drawn noise.

    At shift 5 and 16 steps `flow_sde` runs from 0.019 (first step) to 0.86 (step 14): without weights
    (`timestep_weights`) the early steps of a large-shift video model learn almost nothing.

    Returns:
        float32, 0-d, or [B] where a sigma is [B].

    Raises:
        ValueError: the step has std 0, so it cannot be trained.
    """
    sigma, sigma_next = check_levels(sigma, sigma_next)
    _, velocity_weight, std = kernel.coefficients(sigma, sigma_next)
    if (std == 0).any():
        raise ValueError(
            f"{kernel.name} has std 0 at the step {_show(sigma)} -> {_show(sigma_next)}: it has no gradient scale and "
            "cannot be trained; leave this step out of training, or use another kernel"
        )
    return velocity_weight.abs() / std


@dataclass(frozen=True)
class FlowSDE:
    """The SDE of Flow-GRPO (also VIVA, Fig. 3), whose noise grows with the noise level.

    s = noise_level·sqrt(σ / (1-σ)), std = s·sqrt|dt|; at σ = 1 the 1-σ under the root uses σ_next instead. Keeps the
    marginals of the ODE as steps get small.

    noise_level: above 0; 0.7 in Flow-GRPO.
    """

    noise_level: float = 0.7

    name: ClassVar[str] = "flow_sde"
    stochastic: ClassVar[bool] = True

    def __post_init__(self):
        _check_positive(self, "noise_level")

    def coefficients(self, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        clean_share = 1 - torch.where(sigma == 1, sigma_next, sigma)
        return _sde_coefficients(self.noise_level * (sigma / clean_share).sqrt(), sigma, sigma_next)

    step, std, gradient_scale = _step, _std, _gradient_scale


@dataclass(frozen=True)
class DanceSDE:
    """The SDE of DanceGRPO, with the same noise at every noise level: s = eta, std = eta·sqrt|dt|.

    Keeps the marginals of the ODE as steps get small.

    eta: above 0; 0.25 in DanceGRPO.
    """

    eta: float = 0.25

    name: ClassVar[str] = "dance_sde"
    stochastic: ClassVar[bool] = True

    def __post_init__(self):
        _check_positive(self, "eta")

    def coefficients(self, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _sde_coefficients(torch.full_like(sigma, self.eta), sigma, sigma_next)

    step, std, gradient_scale = _step, _std, _gradient_scale


@dataclass(frozen=True)
class CPS:
    """Coefficients-preserving sampling (FlowCPS): re-noises the predicted clean sample to exactly σ_next.

    With the predictions x̂0 = x - σ·v (clean) and x̂1 = x + (1-σ)·v (noise):
    std = σ_next·sin(noise_level·π/2), mean = (1-σ_next)·x̂0 + sqrt(σ_next² - std²)·x̂1.
    Keeps the noise level, (σ_next² - std²) + std² = σ_next², but not the marginals: a step's share of fresh noise does
    not shrink with its size. The step to σ_next = 0 has std 0 and cannot be trained. Scored with the true Gaussian
    density (the authors' code leaves out 1/(2·std²), so its "ratio" is not an importance ratio).

    noise_level: in (0, 1]; 0.8 in FlowCPS.
    """

    noise_level: float = 0.8

    name: ClassVar[str] = "cps"
    stochastic: ClassVar[bool] = True

    def __post_init__(self):
        _check_positive(self, "noise_level")
        if self.noise_level > 1:
            raise ValueError(f"cps: noise_level must be in (0, 1], got {self.noise_level!r}")

    def coefficients(self, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angle = self.noise_level * math.pi / 2
        std = sigma_next * math.sin(angle)
        kept_noise = sigma_next * math.cos(angle)  # sqrt(σ_next² - std²), without its rounding below zero
        clean = 1 - sigma_next
        return clean + kept_noise, (1 - sigma) * kept_noise - sigma * clean, std

    step, std, gradient_scale = _step, _std, _gradient_scale


@dataclass(frozen=True)
class ODE:
    """Euler's step of the probability-flow ODE, mean = x + v·dt and std 0. Draws without noise and cannot be scored.

    Noise may be given and has no effect, so that one loop serves every kernel.
    """

    name: ClassVar[str] = "ode"
    stochastic: ClassVar[bool] = False

    def coefficients(self, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ones_like(sigma), sigma_next - sigma, torch.zeros_like(sigma)

    step, std, gradient_scale = _step, _std, _gradient_scale


Kernel = FlowSDE | DanceSDE | CPS | ODE

_KERNELS = {kernel.name: kernel for kernel in (FlowSDE, DanceSDE, CPS, ODE)}


def get_kernel(name: str, **params: float) -> Kernel:
    """Build a transition kernel by name: `get_kernel("flow_sde", noise_level=0.7)`.

    Args:
        name: "flow_sde" (noise_level), "dance_sde" (eta), "cps" (noise_level) or "ode".
        params: the kernel's own parameters, numbers; what is left out takes the kernel's default.

    Raises:
        ValueError: an unknown name or parameter (with the nearest known one), or a value out of range.
    """
    if name not in _KERNELS:
        raise ValueError(f"unknown kernel {name!r}.{_nearest(name, _KERNELS)} Known: {', '.join(_KERNELS)}")
    known = [field.name for field in fields(_KERNELS[name])]
    for param in params:
        if param not in known:
            takes = f"It takes: {', '.join(known)}" if known else "It takes none"
            raise ValueError(f"kernel {name!r} has no parameter {param!r}.{_nearest(param, known)} {takes}")
    return _KERNELS[name](**params)


def _nearest(word: str, options) -> str:
    match = difflib.get_close_matches(str(word), list(options), n=1)
    return f" Did you mean {match[0]!r}?" if match else ""


def _check_positive(kernel: Kernel, param: str) -> None:
    value = getattr(kernel, param)
    if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"{kernel.name}: {param} must be a finite number above 0, got {value!r}; to sample without noise, use 'ode'"
        )


def _sde_coefficients(s: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The reverse SDE with diffusion s and the ODE's marginals, one Euler-Maruyama step (Flow-GRPO, DanceGRPO)."""
    dt = sigma_next - sigma
    drift = s.square() / (2 * sigma)
    return 1 + drift * dt, (1 + drift * (1 - sigma)) * dt, s * dt.abs().sqrt()


def check_levels(sigma: float | Tensor, sigma_next: float | Tensor) -> tuple[Tensor, Tensor]:
    """Both sigmas in float32 with one shape (0-d or [B]), after checking their order and range."""
    sigma = torch.as_tensor(sigma, dtype=torch.float32)
    sigma_next = torch.as_tensor(sigma_next, dtype=torch.float32, device=sigma.device)
    if sigma.ndim > 1 or sigma_next.ndim > 1:
        raise ValueError(f"sigmas must be 0-d or [B], got {list(sigma.shape)} and {list(sigma_next.shape)}")
    sigma, sigma_next = torch.broadcast_tensors(sigma, sigma_next)
    if not ((sigma_next >= 0) & (sigma_next < sigma) & (sigma <= 1)).all():
        raise ValueError(f"sigmas must obey 1 >= sigma > sigma_next >= 0, got {_show(sigma)} -> {_show(sigma_next)}")
    return sigma, sigma_next


def _show(sigma: Tensor) -> str:
    return f"{sigma.item():.6g}" if sigma.ndim == 0 else str([float(f"{value:.6g}") for value in sigma.tolist()])


def _per_sample(value: Tensor, sample: Tensor) -> Tensor:
    """[B] → [B, 1, ...] on the device of the sample; 0-d stays 0-d."""
    if value.ndim and len(value) != len(sample):
        raise ValueError(f"sigmas are given for {len(value)} samples, but there are {len(sample)}")
    # A blocking copy would wait for the model's forward on the GPU; from CPU memory a non-blocking one is safe.
    value = value.to(sample.device, non_blocking=value.device.type == "cpu")
    return value.reshape(-1, *[1] * (sample.ndim - 1)) if value.ndim else value


def _log_prob(next_sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    # The sum over up to a million elements is taken in float64 and rounded once, so that its order, which changes
    # with the batch size, does not show: a training micro-batch then replays a rollout batch exactly. MPS has none.
    wide = torch.float32 if mean.device.type == "mps" else torch.float64
    # Detached: a freshly drawn next_sample moves with the mean, and the score function must not follow it.
    error = (next_sample.detach().float() - mean).square().reshape(len(mean), -1).mean(dim=1, dtype=wide)
    std = std.reshape(-1).to(wide)
    has_density = std != 0
    std = torch.where(has_density, std, 1)  # not after the division: a gradient through 0/0 stays NaN behind a mask
    density = -error / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi)
    return (density * has_density).float()
