"""Sampling: policy + kernel + conditions -> `Trajectory`, with noise that depends on nothing but what it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from editrl.data import EditExample
from editrl.flow import dpm2_step, get_kernel, sigma_schedule
from editrl.policy import Conditions, FlowPolicy

INITIAL = 2**32 - 1
"""The denoising step under which a sample's initial noise is drawn (no real step has this number)."""


def counter_noise(shape: Sequence[int], *key: int) -> Tensor:
    """Standard normal float32 [*shape] on the CPU, a pure function of the integers in `key`.

    No generator is carried along: whoever asks for (seed, group, member, step) gets the same noise, on any rank, with
    any batch size, after a resume. `numpy.random.SeedSequence` mixes the key, so neighbouring keys are independent.
    """
    # With its length, because SeedSequence takes (3,) and (3, 0) for the same.
    seed = int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample_noise(shape: Sequence[int], seed: int, groups: Sequence[int], members: Sequence[int], step: int) -> Tensor:
    """`counter_noise` for B samples: float32 [B, *shape]."""
    keys = zip(groups, members, strict=True)
    return torch.stack([counter_noise(shape, seed, int(group), int(member), step) for group, member in keys])


def training_sigmas(normal: Tensor, sampling: str, shift: float) -> Tensor:
    """Noise levels at which clean latents are trained: standard normal draws [B] -> (0, 1), then shifted.

    `sampling`: "logit_normal" (Stable Diffusion 3) or "uniform".
    """
    uniform = torch.sigmoid(normal) if sampling == "logit_normal" else torch.special.ndtr(normal)
    return shift * uniform / (1 + (shift - 1) * uniform)


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) * clean + sigma * noise, for sigma [B] and latents [B,...]."""
    sigma = sigma.view(-1, *[1] * (clean.ndim - 1))
    return (1 - sigma) * clean + sigma * noise


@dataclass
class Trajectory:
    """What a rollout leaves: the clean latents, and for the W trained steps everything a replay needs.

    Only the window is kept, because whole trajectories of a video model are gigabytes.
    """

    clean: Tensor
    """Final latents [B,C,f,h,w]."""
    steps: list[int]
    """Indices into the schedule of the W window steps."""
    latents: list[Tensor]
    """Per window step, the state before it [B,C,f,h,w]."""
    next_latents: list[Tensor]
    """Per window step, the state after it [B,C,f,h,w]."""
    means: list[Tensor]
    """Per window step, the old policy's mean [B,C,f,h,w]."""
    log_probs: list[Tensor]
    """Per window step, the old policy's log-prob [B]."""
    collected: Callable | None = None
    """What `on_window` was."""


@torch.no_grad()
def rollout(
    policy: FlowPolicy,
    transformer: nn.Module,
    conditions: Conditions,
    *,
    sigmas: Tensor,
    kernel=None,
    window: Sequence[int] = (),
    initial_noise: Tensor,
    step_noise: Callable[[int], Tensor] | None = None,
    ode_solver: str = "euler",
    start: int = 0,
    stop: int | None = None,
    unconditional: Conditions | None = None,
    true_cfg_scale: float = 1.0,
    around_ode: Callable[[], AbstractContextManager] = nullcontext,
    around_window: Callable[[], AbstractContextManager] = nullcontext,
    on_window: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
) -> Trajectory:
    """Integrate sigma 1 -> 0 for B samples: the ODE outside the window, the stochastic kernel inside it.

    Args:
        policy, transformer: whose velocity; the transformer may be wrapped.
        conditions: of the B samples.
        sigmas: [T+1] from `sigma_schedule`, the same tensor that training uses.
        kernel: of the window, from `editrl.flow.get_kernel`.
        window: indices of the stochastic steps, a subset of range(T); empty for a plain ODE rollout.
        initial_noise: [B,C,f,h,w], the state at sigmas[start].
        step_noise: denoising step -> standard normal [B,C,f,h,w]; needed when the window is not empty.
        ode_solver: "euler", or "dpm2" (second order; its history starts anew after a stochastic step).
        start, stop: run the steps range(start, stop) only, by default all T. What several samples share before the
            window can so be computed once.
        unconditional, true_cfg_scale: conditions of the empty instruction u; with them the velocity is
            v_u + true_cfg_scale * (v - v_u).
        around_ode, around_window: make the context in which the forwards of deterministic and of stochastic steps run,
            such as one in which adapters are merged, or the one of training.
        on_window: called after each stochastic step with (step, latents, velocity, next latents); the velocity has its
            graph, if `around_window` makes one.

    The state is float32 throughout, so what is stored is exactly what was scored.
    """
    ode = get_kernel("ode")
    latents = initial_noise.to(policy.device, torch.float32)
    trajectory = Trajectory(latents, [], [], [], [], [])
    history = None
    for step in range(start, len(sigmas) - 1 if stop is None else stop):
        sigma, sigma_next = sigmas[step], sigmas[step + 1]  # on the CPU: the kernels read their values
        with around_window() if step in window else around_ode():
            velocity = policy.velocity(transformer, latents, sigma, conditions)
            if unconditional is not None:
                away = policy.velocity(transformer, latents, sigma, unconditional)
                velocity = away + true_cfg_scale * (velocity - away)
        if step in window:
            noise = step_noise(step).to(latents.device)
            transition = kernel.step(latents, velocity.detach(), sigma, sigma_next, noise=noise)
            if on_window is not None:
                on_window(step, latents, velocity, transition.next_sample)
            trajectory.steps.append(step)
            trajectory.latents.append(latents)
            trajectory.next_latents.append(transition.next_sample)
            trajectory.means.append(transition.mean)
            trajectory.log_probs.append(transition.log_prob)
            latents, history = transition.next_sample, None
            del velocity  # with its graph
        elif ode_solver == "dpm2":
            latents, history = dpm2_step(latents, velocity, sigma, sigma_next, history)
        else:
            latents = ode.step(latents, velocity, sigma, sigma_next).next_sample
    trajectory.clean, trajectory.collected = latents, on_window
    return trajectory


@torch.no_grad()
def edit_examples(
    policy: FlowPolicy,
    transformer: nn.Module,
    examples: Sequence[EditExample],
    *,
    num_inference_steps: int,
    shift: float,
    noise_keys: Sequence[tuple[int, ...]],
    batch_size: int = 8,
    ode_solver: str = "euler",
    true_cfg_scale: float = 1.0,
) -> list[Tensor]:
    """Edit examples by the plain ODE; clips [F,3,H,W] float32 in [0,1].

    Args:
        noise_keys: gives each example the key of its `counter_noise`: the same key, the same edit.
        ode_solver: "euler", or "dpm2".
        true_cfg_scale: classifier-free guidance (arXiv 2207.12598) towards the instruction, at the price of a second
            forward a step; 1 is none. Not the embedded guidance of a distilled model.
    """
    sigmas = sigma_schedule(num_inference_steps, shift)
    videos: list[Tensor] = []
    for start in range(0, len(examples), batch_size):
        part = slice(start, start + batch_size)
        conditions = policy.compact(policy.encode(examples[part]).to(policy.device))
        shape = policy.latent_shape(conditions)
        noise = torch.stack([counter_noise(shape, *key) for key in noise_keys[part]])
        unconditional = None
        if true_cfg_scale != 1:
            unconditional = policy.compact(policy.encode(examples[part], unconditional=True).to(policy.device))
        trajectory = rollout(
            policy,
            transformer,
            conditions,
            sigmas=sigmas,
            initial_noise=noise,
            ode_solver=ode_solver,
            unconditional=unconditional,
            true_cfg_scale=true_cfg_scale,
        )
        videos.extend(policy.decode(trajectory.clean))
    return videos
