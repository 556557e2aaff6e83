"""Which steps of a rollout are stochastic, and the rollouts of groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from editrl.policy import Conditions
from editrl.rollout import INITIAL, Trajectory, rollout, sample_noise
from editrl.speed import MergedAdapter
from editrl.trainers.grpo_config import FlowGRPOConfig
from editrl.trainers.one_pass import GradientCollector

if TYPE_CHECKING:
    from editrl.trainers.grpo import FlowGRPOTrainer


def stochastic_steps(args: FlowGRPOConfig, generation: int) -> range:
    """The window of rollout number `generation`; one for all groups, so that their updates share a noise level.

    Fixed and random as in Flow-GRPO-Fast, sliding as in MixGRPO: it moves on by a step every `sde_window_interval`
    rollouts, and starts again when it has reached the end of its range.
    """
    if not args.on_window:
        return range(0)
    start, stop = args.sde_window_range
    places = stop - start - args.sde_window_size + 1
    if args.sde_window == "random":
        generator = torch.Generator().manual_seed(args.seed + generation)
        start += int(torch.randint(places, (1,), generator=generator))
    elif args.sde_window == "sliding":
        start += generation // args.sde_window_interval % places
    return range(start, start + args.sde_window_size)


def sample_groups(
    trainer: FlowGRPOTrainer,
    conditions: Conditions,
    groups: Sequence[int],
    members: Sequence[int],
    window: range,
    size: int,
) -> Iterator[Trajectory]:
    """Trajectories of the clips, `size` at a time; each is sampled when it is asked for.

    Members that start from one noise share their states up to the window: these are computed once a group.
    """
    args = trainer.args
    shape = trainer.policy.latent_shape(conditions)
    settings = {
        "sigmas": trainer.sigmas,
        "kernel": trainer.kernel,
        "window": window,
        "ode_solver": args.ode_solver,
    } | contexts(trainer)
    starts = [0] * len(members) if args.same_init_noise else members
    first = window.start if args.same_init_noise and args.shared_prefix else 0
    prefix = shared_states(trainer, conditions, groups, first, size, settings) if first else None
    model = sampling_model(trainer)
    for begin in range(0, len(groups), size):
        part = slice(begin, begin + size)
        if prefix is None:
            state = sample_noise(shape, args.seed, groups[part], starts[part], INITIAL)
        else:
            state = torch.stack([prefix[group] for group in groups[part]])

        def step_noise(step: int, part: slice = part) -> Tensor:
            return sample_noise(shape, args.seed, groups[part], members[part], step)

        yield rollout(
            trainer.policy,
            model,
            trainer.policy.compact(conditions[part]),
            initial_noise=state,
            step_noise=step_noise,
            start=first,
            on_window=GradientCollector(trainer, window) if args.one_pass else None,
            **settings,
        )
        trainer._collected += size


def sampling_model(trainer: FlowGRPOTrainer) -> nn.Module:
    """What a rollout calls. Where steps run with gradient, not through DDP, which would take each of these forwards for
    one of training."""
    model, with_gradient = trainer.sampler.model, trainer.sampler.trained_compiled or trainer.args.one_pass
    return trainer.accelerator.unwrap_model(model) if with_gradient else model


def contexts(trainer: FlowGRPOTrainer) -> dict[str, Callable]:
    """How a rollout runs its forwards.

    The stochastic steps are replayed: they run as training does, so that the ratio starts at 1; or they are
    differentiated at once (`one_pass`). Deterministic steps are not scored, and may be rounded otherwise: with merged
    adapters, where there are whole weights to merge.
    """
    found = {"around_window": torch.enable_grad if trainer.args.one_pass else trainer.sampler.as_trained}
    if trainer.args.merge_adapter and trainer.sampler.whole:
        found["around_ode"] = MergedAdapter(trainer.accelerator.unwrap_model(trainer.model))
    return found


def shared_states(
    trainer: FlowGRPOTrainer, conditions: Conditions, groups: Sequence[int], stop: int, size: int, settings: dict
) -> dict[int, Tensor]:
    """Group -> its state before step `stop`, from the initial noise of its member 0."""
    distinct = list(dict.fromkeys(groups))
    conditions = conditions[torch.tensor([groups.index(group) for group in distinct], device=trainer.args.device)]
    shape = trainer.policy.latent_shape(conditions)
    states = []
    for begin in range(0, len(distinct), size):
        part = slice(begin, begin + size)
        noise = sample_noise(shape, trainer.args.seed, distinct[part], [0] * len(distinct[part]), INITIAL)
        shared = trainer.policy.compact(conditions[part])
        states.extend(
            rollout(trainer.policy, trainer.sampler.model, shared, initial_noise=noise, stop=stop, **settings).clean
        )
    return dict(zip(distinct, states, strict=True))
