"""One pass: the gradient of a stochastic step is computed when the step is sampled, and weighed when it is scored.

With one update a rollout, every step would be replayed under the very weights that sampled it: the ratio is 1, nothing
is clipped, and the gradient of the loss for an advantage A is A times the gradient for an advantage of 1, which can be
had before A is known. So the rollout's own forward serves the backward pass, and none is run a second time. Nothing is
replayed, so sampling and training cannot differ either. The update is the same up to rounding. The price is memory: a
gradient of the trained weights for each clip, until all are scored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from editrl.flow import timestep_weights
from editrl.trainers.chunk import Chunk
from editrl.trainers.window import WindowBatch, policy_loss

if TYPE_CHECKING:
    from editrl.trainers.grpo import FlowGRPOTrainer


class GradientCollector:
    """The gradient of one clip for an advantage of 1, summed over the window while the clip is sampled.

    Attributes: `gradients`, one a trained parameter (None where the loss does not depend on it); `losses`, of each
    window step.
    """

    def __init__(self, trainer: FlowGRPOTrainer, window: Sequence[int]):
        self.trainer, self.window = trainer, list(window)
        mode = trainer.args.timestep_weighting
        self.weights = timestep_weights(trainer.kernel, trainer.sigmas, self.window, mode).tolist()
        self.parameters = trainer.trained_parameters()
        self.gradients: list[Tensor | None] = [None] * len(self.parameters)
        self.losses: list[Tensor] = []

    @torch.enable_grad()
    def __call__(self, step: int, latents: Tensor, velocity: Tensor, next_latents: Tensor) -> None:
        """Add a step of a batch of one clip; `velocity` with its graph, which is used up."""
        trainer = self.trainer
        weight = self.weights[self.window.index(step)]
        one = torch.ones(1, device=latents.device)
        batch = WindowBatch(latents, next_latents, None, None, one, None, step, weight)
        sigma, sigma_next = trainer.sigmas[step], trainer.sigmas[step + 1]
        new = trainer.kernel.step(latents, velocity, sigma, sigma_next, next_sample=next_latents)
        objective = policy_loss(trainer, batch, new, new.mean.detach(), new.log_prob.detach())
        found = torch.autograd.grad(objective.loss, self.parameters, allow_unused=True)
        self.gradients = [_sum(old, more) for old, more in zip(self.gradients, found, strict=True)]
        self.losses.append(objective.loss.detach())
        trainer.record_ratio(objective, step)
        trainer.record("drift", 0.0, step)


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total.add_(more)


@dataclass
class GradientBatch:
    """A clip at one window step, whose share of the gradient is known but for its advantage.

    Each step of a clip is given an equal share of the clip's sum, so that all micro-batches are alike.
    """

    gradients: list[Tensor | None]  # of the clip, for an advantage of 1
    share: float
    loss: Tensor  # of this step, for an advantage of 1
    advantages: Tensor  # [1]
    step: int


def gradient_batches(chunks: Sequence[Chunk]) -> list[GradientBatch]:
    """The micro-batches of a rollout."""
    return [
        GradientBatch(found.gradients, 1 / len(found.window), found.losses[k], chunk.advantages, step)
        for chunk in chunks
        for found in [chunk.trajectory.collected]
        for k, step in enumerate(found.window)
    ]


def gradient_loss(trainer: FlowGRPOTrainer, model: nn.Module, batch: GradientBatch) -> Tensor:
    """What `window_loss` would be, with the gradient that it would have.

    It comes out of a forward of `model`, as any loss does: in theirs, DDP and DeepSpeed prepare themselves for the
    backward pass.
    """
    advantage = batch.advantages[0]

    def known() -> Tensor:
        scale = advantage * batch.share
        return _Known.apply(advantage * batch.loss, scale, batch.gradients, *trainer.trained_parameters())

    module = trainer.accelerator.unwrap_model(model)
    with _forward(module, known):
        return model()


@contextlib.contextmanager
def _forward(module: nn.Module, function: Callable) -> Iterator[None]:
    """Within the block the module computes `function`."""
    own = module.__dict__.get("forward")  # mixed precision may have put one there
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


class _Known(torch.autograd.Function):
    """A value with a known gradient: `scale` times `gradients`, one a parameter."""

    @staticmethod
    def forward(ctx, value, scale, gradients, *parameters):
        ctx.scale, ctx.gradients = scale, gradients
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        scale = (upstream * ctx.scale).float()
        weighed = (None if found is None else (found * scale).to(found.dtype) for found in ctx.gradients)
        return None, None, None, *weighed
