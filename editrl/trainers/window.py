"""Policy gradients on the stochastic steps of a rollout: grpo, grpo_guard, dppo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editrl.flow import (
    PolicyLoss,
    Transition,
    dppo_loss,
    gaussian_kl,
    grpo_guard_loss,
    grpo_loss,
    timestep_weights,
)
from editrl.policy import Conditions
from editrl.trainers.chunk import Chunk

if TYPE_CHECKING:
    from editrl.trainers.grpo import FlowGRPOTrainer


@dataclass
class WindowBatch:
    """One trained (chunk of clips, window step): everything a replay of that step needs."""

    latents: Tensor  # [B,C,f,h,w]
    next_latents: Tensor  # [B,C,f,h,w]
    old_mean: Tensor | None  # [B,C,f,h,w]; None: the one update of a rollout finds them itself
    old_log_prob: Tensor | None  # [B]
    advantages: Tensor  # [B]
    conditions: Conditions
    step: int  # index into the schedule
    weight: float  # of this step, mean 1 over the window


def window_batches(trainer: FlowGRPOTrainer, chunks: Sequence[Chunk]) -> list[WindowBatch]:
    """The micro-batches of a rollout."""
    args, steps = trainer.args, chunks[0].trajectory.steps
    weights = timestep_weights(trainer.kernel, trainer.sigmas, steps, args.timestep_weighting).tolist()
    batches = [
        WindowBatch(
            part.latents[k],
            part.next_latents[k],
            part.means[k],
            part.log_probs[k],
            chunk.advantages,
            chunk.conditions,
            step,
            weights[k],
        )
        for chunk in chunks
        for part in [chunk.trajectory]
        for k, step in enumerate(steps)
    ]
    if args.old_log_prob == "recompute":
        recompute(trainer, batches)
    return batches


@torch.no_grad()
def recompute(trainer: FlowGRPOTrainer, batches: Sequence[WindowBatch]) -> None:
    """Replace the old means and log-probs by those of the model as it trains."""
    trainer.model_wrapped.train()
    for batch in batches:
        batch.old_mean = batch.old_log_prob = None
        if trainer.args.updates_per_generation > 1:
            old = replay(trainer, trainer.model_wrapped, batch)
            batch.old_mean, batch.old_log_prob = old.mean, old.log_prob


def replay(trainer: FlowGRPOTrainer, model, batch: WindowBatch) -> Transition:
    """The stored step, scored under the current weights."""
    sigma, sigma_next = trainer.sigmas[batch.step], trainer.sigmas[batch.step + 1]
    velocity = trainer.policy.velocity(model, batch.latents, sigma, batch.conditions)
    return trainer.kernel.step(batch.latents, velocity, sigma, sigma_next, next_sample=batch.next_latents)


def window_loss(trainer: FlowGRPOTrainer, model, batch: WindowBatch) -> Tensor:
    """Loss of a micro-batch; what it tells about the step is recorded, over the window and by step."""
    args = trainer.args
    new = replay(trainer, model, batch)
    old_mean = new.mean.detach() if batch.old_mean is None else batch.old_mean
    old_log_prob = new.log_prob.detach() if batch.old_log_prob is None else batch.old_log_prob
    objective = policy_loss(trainer, batch, new, old_mean, old_log_prob)
    drift = gaussian_kl(new.mean.detach(), old_mean, new.std).mul(2).sqrt()
    trainer.record_ratio(objective, batch.step)
    trainer.record("drift", drift.mean(), batch.step)
    if not args.beta:
        return objective.loss
    # The reference's own forward needs no gradient; the mean it is compared with does.
    kl = gaussian_kl(new.mean, reference_mean(trainer, model, batch), new.std).mean()
    trainer.record("kl", kl)
    return objective.loss + args.beta * kl


def policy_loss(
    trainer: FlowGRPOTrainer, batch: WindowBatch, new: Transition, old_mean: Tensor, old_log_prob: Tensor
) -> PolicyLoss:
    """The objective that `loss_type` names."""
    args = trainer.args
    scored = (new.log_prob, old_log_prob, batch.advantages)
    weights = torch.full_like(batch.advantages, batch.weight)
    means = {"mean": new.mean, "old_mean": old_mean, "std": new.std}
    if args.loss_type == "dppo":
        return dppo_loss(*scored, **means, threshold=args.dppo_threshold, weights=weights)
    clip = {"epsilon": args.epsilon, "epsilon_high": args.epsilon_high}
    if args.loss_type == "grpo_guard":
        dt = trainer.sigmas[batch.step + 1] - trainer.sigmas[batch.step]
        return grpo_guard_loss(*scored, **means, dt=dt, weights=weights, **clip)
    return grpo_loss(*scored, weights=weights, **clip)


def reference_mean(trainer: FlowGRPOTrainer, model, batch: WindowBatch) -> Tensor:
    """Mean of the step under the reference policy."""
    sigma, sigma_next = trainer.sigmas[batch.step], trainer.sigmas[batch.step + 1]
    velocity = trainer.reference_velocity(model, batch.latents, sigma, batch.conditions)
    return trainer.kernel.step(batch.latents, velocity, sigma, sigma_next, next_sample=batch.next_latents).mean
