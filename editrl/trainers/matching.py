"""Regressions on a rollout's clean samples, noised anew: nft, awm, rwr. No step is replayed, no log-prob is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editrl.flow import awm_loss, nft_loss, rwr_loss, velocity_kl
from editrl.policy import Conditions
from editrl.rollout import add_noise, counter_noise, sample_noise, training_sigmas
from editrl.trainers.chunk import Chunk
from editrl.trainers.sampling import sampling_model

if TYPE_CHECKING:
    from editrl.trainers.grpo import FlowGRPOTrainer

DRAW = 2**31
"""Draw k uses the noise of step DRAW + k, which no denoising step has."""


@dataclass
class NoisedBatch:
    """One trained (chunk of clips, draw of timesteps and noise)."""

    clean: Tensor  # [B,C,f,h,w]
    noise: Tensor  # [B,C,f,h,w]
    sigma: Tensor  # [B]
    old_velocity: Tensor | None  # [B,C,f,h,w]; None: the one update of a rollout finds it itself
    advantages: Tensor  # [B]
    compared: Tensor  # [N], the advantages of the whole rollout, over all processes
    conditions: Conditions
    step: None = None  # no step of the schedule


def noised_batches(trainer: FlowGRPOTrainer, chunks: Sequence[Chunk]) -> list[NoisedBatch]:
    """The micro-batches of a rollout."""
    compared = trainer.gather_clips(torch.cat([chunk.advantages for chunk in chunks]))
    draws = range(trainer.args.timesteps_per_sample)
    with trainer.sampler.gathered() if needs_old_velocity(trainer) else contextlib.nullcontext():
        return [noised_batch(trainer, chunk, draw, compared) for chunk in chunks for draw in draws]


def needs_old_velocity(trainer: FlowGRPOTrainer) -> bool:
    """Whether the velocity of the policy that sampled has to be computed before the first update."""
    args = trainer.args
    return args.loss_type != "rwr" and ("old_policy" in trainer.averages or args.updates_per_generation > 1)


@torch.no_grad()
def noised_batch(trainer: FlowGRPOTrainer, chunk: Chunk, draw: int, compared: Tensor) -> NoisedBatch:
    """Draw number `draw`, with the velocity of the policy that sampled (its weights are loaded) where it is needed."""
    args, clean = trainer.args, chunk.trajectory.clean
    noise = sample_noise(clean.shape[1:], args.seed, chunk.groups, chunk.members, DRAW + draw).to(clean.device)
    clips = zip(chunk.groups, chunk.members, strict=True)
    normal = torch.cat([counter_noise((1,), args.seed, *clip, DRAW + draw, 0) for clip in clips])
    sigma = training_sigmas(normal, args.timestep_sampling, args.shift).to(clean.device)
    old_velocity = None
    if needs_old_velocity(trainer):
        latents = add_noise(clean, noise, sigma)
        with trainer.sampler.as_trained():
            model = sampling_model(trainer)
            old_velocity = trainer.policy.velocity(model, latents, sigma, chunk.conditions).detach()
    return NoisedBatch(clean, noise, sigma, old_velocity, chunk.advantages, compared, chunk.conditions)


def matching_loss(trainer: FlowGRPOTrainer, model, batch: NoisedBatch) -> Tensor:
    """Loss of a micro-batch."""
    args = trainer.args
    latents = add_noise(batch.clean, batch.noise, batch.sigma)
    velocity = trainer.policy.velocity(model, latents, batch.sigma, batch.conditions)
    old_velocity = velocity.detach() if batch.old_velocity is None else batch.old_velocity
    if args.loss_type != "rwr":  # which knows no old velocity
        trainer.record("drift", velocity_kl(velocity.detach(), old_velocity).sqrt().mean())
    targets = (batch.clean, batch.noise)
    if args.loss_type == "awm":
        clip = {"epsilon": args.epsilon, "epsilon_high": args.epsilon_high}
        objective = awm_loss(velocity, old_velocity, *targets, batch.advantages, **clip)
        trainer.record_ratio(objective)
        loss = objective.loss
    elif args.loss_type == "nft":
        reach = {"beta": args.nft_beta, "advantage_range": args.advantage_clip}
        loss = nft_loss(velocity, old_velocity, *targets, batch.sigma, batch.advantages, **reach).mean()
    else:
        weighing = {"temperature": args.rwr_temperature, "compared": batch.compared}
        loss = rwr_loss(velocity, *targets, batch.advantages, **weighing).mean()
    if not args.beta:
        return loss
    reference = trainer.reference_velocity(model, latents, batch.sigma, batch.conditions)
    kl = velocity_kl(velocity, reference).mean()
    trainer.record("kl", kl)
    return loss + args.beta * kl
