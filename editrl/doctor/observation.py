"""One rollout as the checks see it, and the velocity of one of its micro-batches in whatever mode a check needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from editrl.data import EditExample
from editrl.policy import Conditions
from editrl.rollout import add_noise
from editrl.trainers.groups import GroupSchedule
from editrl.trainers.grpo_config import FlowGRPOConfig
from editrl.trainers.matching import NoisedBatch
from editrl.trainers.window import WindowBatch

if TYPE_CHECKING:
    from editrl.trainers.grpo import FlowGRPOTrainer

MicroBatch = WindowBatch | NoisedBatch


@dataclass
class Seen:
    """The first rollout of a run, this process's share."""

    batches: list[MicroBatch]  # chunk by chunk, and within a chunk step by step
    groups: list[int]  # of each clip
    videos: list[Tensor]
    samples: list[EditExample]
    peak: int | None  # bytes of GPU memory at most; None without CUDA

    def chunks(self) -> list[list[MicroBatch]]:
        """The micro-batches that train the same clips."""
        parts: dict[int, list[MicroBatch]] = {}
        for batch in self.batches:
            parts.setdefault(id(batch.conditions), []).append(batch)
        return list(parts.values())


class Watch(TrainerCallback):
    """Keeps the clips of a rollout."""

    def on_rollout(self, args, state, control, videos, samples):
        self.videos, self.samples = videos, samples


@contextlib.contextmanager
def undisturbed(trainer: FlowGRPOTrainer) -> Iterator[None]:
    """After the block the trainer's metrics and the random states are as before."""
    metrics = {name: list(values) for name, values in trainer._means.items()}
    seconds = dict(trainer._seconds)
    device = trainer.args.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # not those of the other processes
        try:
            yield
        finally:
            for kept, earlier in ((trainer._means, metrics), (trainer._seconds, seconds)):
                kept.clear()
                kept.update(earlier)


@contextlib.contextmanager
def changed(args: FlowGRPOConfig, **settings) -> Iterator[None]:
    """Within the block the arguments have these values."""
    before = {name: getattr(args, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


@contextlib.contextmanager
def prepared(trainer: FlowGRPOTrainer) -> Iterator[None]:
    """The model wrapped as for training; within the block, backward passes stay on this process."""
    if trainer.optimizer is None:
        trainer._prepare_for_training(trainer.args.max_steps, None, None)
    with trainer.accelerator.no_sync(trainer.model_wrapped):
        yield


def observe(trainer: FlowGRPOTrainer) -> Seen:
    """Make the first rollout of a training run; it writes no files, and keeps its own means and log-probs."""
    watch, numbers = Watch(), first_numbers(trainer)
    reset_peak()
    trainer.add_callback(watch)
    try:
        with changed(trainer.args, video_steps=0, old_log_prob="rollout"):
            batches = trainer.generate(numbers)
    finally:
        trainer.remove_callback(watch)
    return Seen(batches, [group for group, _ in numbers], watch.videos, watch.samples, peak())


def first_numbers(trainer: FlowGRPOTrainer) -> list[list[int]]:
    """[group, example] of each clip of this process in the first rollout, as its loader would give them."""
    args = trainer.args
    groups = GroupSchedule(len(trainer.train_dataset), args.groups_per_generation, args.seed)
    clips = [list(groups[group]) for group in range(len(groups)) for _ in range(args.num_generations)]
    share = len(clips) // args.data_world_size
    return clips[args.data_rank * share :][:share]


def inputs(trainer: FlowGRPOTrainer, batch: MicroBatch) -> tuple[Tensor, Tensor, Conditions]:
    """What the velocity of a micro-batch is a function of: latents [B,C,f,h,w], sigma (0-d or [B]), conditions."""
    if isinstance(batch, WindowBatch):
        return batch.latents, trainer.sigmas[batch.step], batch.conditions
    return add_noise(batch.clean, batch.noise, batch.sigma), batch.sigma, batch.conditions


def velocity(
    trainer: FlowGRPOTrainer,
    batch: MicroBatch,
    *,
    training: bool,
    graph: bool | None = None,
    rows: list[int] | None = None,
) -> Tensor:
    """Velocity of a micro-batch or of some of its rows, as an update computes it (`training`) or as a rollout does.

    graph: whether autograd records it, which chooses other kernels and gradient checkpointing. Default: in training.
    """
    latents, sigma, conditions = inputs(trainer, batch)
    if rows is not None:
        latents, conditions, sigma = latents[rows], conditions[rows], sigma[rows] if sigma.ndim else sigma
    model = model_in(trainer, training=training)
    with torch.set_grad_enabled(training if graph is None else graph):
        return trainer.policy.velocity(model, latents, sigma, conditions).detach()


def model_in(trainer: FlowGRPOTrainer, *, training: bool) -> nn.Module:
    """The wrapped model in training or eval mode."""
    trainer.model_wrapped.train(training)  # returns nothing where DeepSpeed wraps it
    return trainer.model_wrapped


def reset_peak() -> None:
    """Start measuring the peak of GPU memory anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> int | None:
    """Bytes of GPU memory at most since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
