"""From the clips of a rollout to their advantages, and what is logged on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editrl.data import EditExample
from editrl.errors import EditrlError
from editrl.flow import group_advantages, reward_shares, zero_std_groups
from editrl.reward import RewardSet, reward_columns
from editrl.reward_ahead import Ahead, RewardThread
from editrl.reward_weights import read_schedule
from editrl.trainers import outage
from editrl.trainers.grpo_config import FlowGRPOConfig
from editrl.watchdog import measure

if TYPE_CHECKING:
    from editrl.trainers.grpo import FlowGRPOTrainer

Reward = str | Callable


@contextlib.contextmanager
def asked_ahead(
    trainer: FlowGRPOTrainer, samples: list[EditExample], groups: list[int]
) -> Iterator[dict[RewardSet, Ahead]]:
    """What takes the clips of a rollout, one after the other, for each set that has background rewards.

    One thread asks them all. Where the block is left early, what it has not begun is dropped.
    """
    columns, thread = reward_columns(samples), RewardThread()
    ahead = {scorer: scorer.ahead(thread, columns, groups) for scorer in trainer.scorers if scorer.background}
    try:
        yield ahead
    except BaseException:
        thread.close()
        for scorer in ahead:
            scorer.cancel()
        raise
    thread.close()


def score(
    trainer: FlowGRPOTrainer,
    videos: list[Tensor],
    samples: list[EditExample],
    groups: list[int],
    ahead: Mapping[RewardSet, Ahead],
) -> Tensor:
    """Score the clips, and compare them within their groups over all processes. Returns this process's [B].

    `ahead`: of `asked_ahead`, which has taken these clips.
    """
    args, scorer, device = trainer.args, trainer.rewards, trainer.args.device
    columns = reward_columns(samples)
    rewards = trainer.gather_clips(_timed(trainer, scorer, videos, columns, groups, ahead))
    group_ids = trainer.gather_clips(torch.tensor(groups, device=device))
    combined = {
        "weights": scorer.weights_at(trainer.state.global_step).to(device),
        "aggregation": args.multi_objective_aggregation,
        "scale": args.scale_rewards,
    }
    advantages = group_advantages(rewards, group_ids, clip=args.advantage_clip, **combined)
    _record_rewards(trainer, rewards, group_ids, combined)
    trainer.record("frac_reward_zero_std", zero_std_groups(advantages.unsqueeze(1), group_ids).mean())
    if trainer.watched is not None:
        watched = trainer.gather_clips(_timed(trainer, trainer.watched, videos, columns, groups, ahead))
        _record_scores(trainer, trainer.watched, watched, "metrics")
    if args.watchdog != "off":
        for name, values in measure(videos, [sample.source for sample in samples]).items():
            values = trainer.gather_clips(values.to(device))
            if not values.isnan().all():  # images do not flicker
                trainer.record(f"watchdog/{name}", values.nanmean())
    first = args.data_rank * len(groups)
    return advantages[first : first + len(groups)]


def _timed(
    trainer: FlowGRPOTrainer,
    scorer: RewardSet,
    videos: list[Tensor],
    columns: dict[str, list],
    groups: list[int],
    ahead: Mapping[RewardSet, Ahead],
) -> Tensor:
    """This process's scores, [B, K] on its device; what each reward took goes into `seconds/reward/<name>`."""
    scores = outage.score(trainer, scorer, videos, columns, groups, ahead.get(scorer))
    for name, seconds in scorer.seconds.items():
        trainer._seconds[f"reward/{name}"] += seconds
    return scores.to(trainer.args.device)


def _record_rewards(trainer: FlowGRPOTrainer, rewards: Tensor, group_ids: Tensor, combined: dict) -> None:
    """What each reward gave, how much of the advantages it makes, and with which weight."""
    scorer, weights = trainer.rewards, combined["weights"]
    _record_scores(trainer, scorer, rewards, "rewards")
    flat = zero_std_groups(rewards, group_ids).tolist()
    shares = reward_shares(rewards, group_ids, **combined).tolist()
    for k, name in enumerate(scorer.names):
        trainer.record(f"rewards/{name}/frac_zero_std", flat[k])
        trainer.record(f"rewards/{name}/share", shares[k])
        if not scorer.schedules[k].constant:
            trainer.record(f"rewards/{name}/weight", weights[k])
    trainer.record("reward", (rewards.nanmean(0).nan_to_num() * weights).sum())


def _record_scores(trainer: FlowGRPOTrainer, scorer: RewardSet, scores: Tensor, kind: str) -> None:
    for name, values in zip(scorer.names, scores.unbind(1), strict=True):
        known = values[~values.isnan()]
        if len(known):  # a reward may apply to no clip of a rollout
            trainer.record(f"{kind}/{name}/mean", known.mean())
            trainer.record(f"{kind}/{name}/std", known.std(correction=0))


def refuse_split_groups(scorer: RewardSet, args: FlowGRPOConfig) -> None:
    """EditrlError where a reward that compares the clips of a group would see a part of it only."""
    if scorer.groupwise and args.groups_per_generation % args.data_world_size:
        raise EditrlError(
            f"reward '{scorer.groupwise[0]}' compares the clips of a group, so every process needs whole groups, but "
            f"generation_batch_size / num_generations is {args.groups_per_generation} and there are "
            f"{args.data_world_size} processes; make it a multiple of them"
        )


def as_reward_set(rewards: Reward | Sequence[Reward] | RewardSet, weights: list | None = None) -> RewardSet:
    """A `RewardSet` of whatever the user gave."""
    if not isinstance(rewards, RewardSet):
        single = isinstance(rewards, str) or callable(rewards)
        return RewardSet([rewards] if single else list(rewards), weights=weights)
    given = weights and [read_schedule(weight, f"number {k}") for k, weight in enumerate(weights)]
    if weights is not None and given != rewards.schedules:
        raise EditrlError(f"reward_weights {weights} differ from the RewardSet's {rewards.weights.tolist()}; give one")
    return rewards
