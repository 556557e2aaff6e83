"""From a matrix of rewards to one advantage a sample, relative to the other samples of its group."""

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-4  # added to every std, as Flow-GRPO and TRL do


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    weights: Tensor | Sequence[float] | None = None,
    aggregation: str = "normalize_then_sum",
    scale: str = "group",
    clip: float | None = 5.0,
) -> Tensor:
    """Group-relative advantages of several weighted rewards (GRPO, Dr. GRPO, GDPO).

    "sum_then_normalize" (GRPO; VIVA's R = Σ w_k·R_k): R = Σ w_k·r_k, A = (R - group mean) / scale(R).
    "normalize_then_sum" (GDPO, arXiv 2601.05242): A_k = (r_k - group mean) / scale(r_k), A = Σ w_k·A_k, then divided by
    the standard deviation of A over the batch, so that its size does not depend on the number of rewards. Each reward
    counts by its weight, whatever its range.

    `scale` is the group's standard deviation ("group"), the batch's ("batch", of the raw values, so differences between
    groups count), or 1 ("none", Dr. GRPO). Standard deviations are of the population (divided by n) plus 1e-4.

    A group in which a value has no spread gives exactly 0. A missing value (NaN) is left out of its reward's means and
    standard deviations and contributes 0; a sample with none at all gets 0. Rewards of weight 0 have no influence.

    Args:
        rewards: [N, K], NaN where a reward does not apply. All samples of the generation batch, from every rank.
        group_ids: integers [N]; samples with one id form a group, of any size and in any order.
        weights: K finite numbers; ones when None.
        aggregation: "normalize_then_sum" or "sum_then_normalize".
        scale: "group", "batch" or "none".
        clip: advantages are limited to [-clip, clip]; None for no limit.

    Returns:
        float32 [N] on the device of `rewards`; finite.

    Raises:
        ValueError: shapes or types do not fit, an infinite reward, all weights 0, or an unknown option.
    """
    for option, value, known in (
        ("aggregation", aggregation, ("normalize_then_sum", "sum_then_normalize")),
        ("scale", scale, ("group", "batch", "none")),
    ):
        if value not in known:
            raise ValueError(f"unknown {option} {value!r}: use one of {', '.join(map(repr, known))}")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0, got {clip!r}")
    values, groups = _values_and_groups(rewards, group_ids)
    weights = torch.ones(values.shape[1]) if weights is None else torch.as_tensor(weights)
    weights = weights.detach().cpu().double()
    if weights.shape != (values.shape[1],) or not weights.isfinite().all() or not weights.any():
        raise ValueError(f"weights must be {values.shape[1]} finite numbers, not all 0, got {weights.tolist()}")

    values, weights = values[:, weights != 0], weights[weights != 0]
    scored = ~values.isnan().all(dim=1, keepdim=True)
    if aggregation == "sum_then_normalize":
        total = _weighted_sum(values, groups, weights)
        advantages = _normalize(total.where(scored, torch.nan), groups, scale)[:, 0]
    else:
        advantages = _normalize(values, groups, scale) @ weights
        advantages = advantages / (_batch_std(advantages[:, None].where(scored, torch.nan)) + EPSILON)
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    return advantages.to(rewards.device, torch.float32)


def reward_shares(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    weights: Tensor | Sequence[float] | None = None,
    aggregation: str = "normalize_then_sum",
    scale: str = "group",
) -> Tensor:
    """How much of the advantages each reward makes: mean |its part| over the sum of these means.

    The part of reward k in a sample's advantage is w_k·A_k ("normalize_then_sum") or w_k·(r_k - group mean) over the
    scale of the sum ("sum_then_normalize"); the parts of a sample add up to its advantage, before the clip and, for
    the former, the batch's standard deviation. Two rewards that pull against each other have a large share each.

    Args: as for `group_advantages`.

    Returns:
        float32 [K] in [0, 1] with sum 1 on the device of `rewards`; all 0 where no reward tells clips apart.

    Raises:
        ValueError: shapes or types do not fit, or an infinite reward.
    """
    values, groups = _values_and_groups(rewards, group_ids)
    weights = torch.ones(values.shape[1]) if weights is None else torch.as_tensor(weights)
    weights = weights.detach().cpu().double()
    if aggregation == "sum_then_normalize":
        total = _weighted_sum(values, groups, weights)
        total = total.where(~values[:, weights != 0].isnan().all(dim=1, keepdim=True), torch.nan)
        parts = _normalize(_fill_missing(values, groups), groups, "none") * weights
        parts = parts / _scale(total, _centred(total, groups), groups, scale)
    else:
        parts = _normalize(values, groups, scale) * weights
    sizes = parts.abs().mean(0)
    return (sizes / sizes.sum()).nan_to_num(nan=0.0).to(rewards.device, torch.float32)


def zero_std_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Fraction of groups in which a reward has no spread, and so teaches nothing (`frac_reward_zero_std`).

    Args:
        rewards: [N, K], NaN where a reward does not apply.
        group_ids: integers [N].

    Returns:
        float32 [K] in [0, 1] on the device of `rewards`, over the groups in which the reward has a value at all; NaN
        for a reward that has none anywhere.

    Raises:
        ValueError: shapes or types do not fit, or an infinite reward.
    """
    values, groups = _values_and_groups(rewards, group_ids)
    scored = _group_sum((~values.isnan()).double(), groups) > 0
    flat = scored & ~_has_spread(values, groups)
    return (flat.sum(0) / scored.sum(0)).to(rewards.device, torch.float32)


def _values_and_groups(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """float64 rewards [N, K] and group numbers 0 ... G-1 [N], both on the CPU.

    On the CPU in float64 because the matrix is tiny and the sums below must not depend on the order in which a GPU
    happens to add: every rank computes the same advantages from the same rewards.
    """
    if rewards.ndim != 2 or 0 in rewards.shape or group_ids.shape != rewards.shape[:1]:
        shapes = f"{list(rewards.shape)} and {list(group_ids.shape)}"
        raise ValueError(f"rewards must be [N, K] and group_ids [N], neither empty, got {shapes}")
    if group_ids.is_floating_point() or group_ids.is_complex() or group_ids.dtype == torch.bool:
        raise ValueError(f"group_ids must be integers, got {group_ids.dtype}: a float loses large ids")
    values = rewards.detach().cpu().double()
    if values.isinf().any():
        row, column = values.isinf().nonzero()[0].tolist()
        raise ValueError(f"reward {column} of sample {row} is infinite; only NaN (a missing value) may be non-finite")
    return values, group_ids.cpu().unique(return_inverse=True)[1]


def _normalize(values: Tensor, groups: Tensor, scale: str) -> Tensor:
    """(value - group mean) / scale, [N, K]; 0 where a value is missing or its group has no spread."""
    centred = _centred(values, groups)
    return centred / _scale(values, centred, groups, scale)


def _centred(values: Tensor, groups: Tensor) -> Tensor:
    centred = (values - _group_mean(values, groups)[groups]).nan_to_num(nan=0.0)
    # The mean of equal numbers can miss them by a rounding error, but a group that teaches nothing must give exactly 0.
    return centred * _has_spread(values, groups)[groups]


def _scale(values: Tensor, centred: Tensor, groups: Tensor, scale: str) -> Tensor | float:
    """What centred values are divided by: a number, [K] or [N, K]."""
    if scale == "none":
        return 1.0
    if scale == "batch":
        return _batch_std(values) + EPSILON
    variance = _group_mean(centred.square().where(~values.isnan(), torch.nan), groups).nan_to_num(nan=0.0)
    return variance.sqrt()[groups] + EPSILON


def _weighted_sum(values: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
    """Σ w_k·r_k, [N, 1]."""
    return (_fill_missing(values, groups) * weights).sum(dim=1, keepdim=True)


def _fill_missing(values: Tensor, groups: Tensor) -> Tensor:
    """A missing value becomes its group's mean, which contributes 0 to the sum once that is centred.

    Where the whole group misses it: the batch's mean, so that it does not count as a difference between groups.
    """
    for mean in (_group_mean(values, groups)[groups], values.nanmean(dim=0).expand_as(values)):
        values = values.where(~values.isnan(), mean)
    return values.nan_to_num(nan=0.0)


def _group_sum(values: Tensor, groups: Tensor) -> Tensor:
    return values.new_zeros(int(groups.max()) + 1, values.shape[1]).index_add(0, groups, values)


def _group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """Mean over the values that are there, [G, K]; NaN where there is none."""
    return _group_sum(values.nan_to_num(nan=0.0), groups) / _group_sum((~values.isnan()).double(), groups)


def _has_spread(values: Tensor, groups: Tensor) -> Tensor:
    """Whether a group holds two different values, bool [G, K]."""
    index = groups[:, None].expand_as(values)
    bounds = values.new_zeros(int(groups.max()) + 1, values.shape[1])
    highest = bounds.scatter_reduce(0, index, values.nan_to_num(nan=-torch.inf), "amax", include_self=False)
    lowest = bounds.scatter_reduce(0, index, values.nan_to_num(nan=torch.inf), "amin", include_self=False)
    return highest > lowest


def _batch_std(values: Tensor) -> Tensor:
    """Population standard deviation of each column's present values, [K]; 0 where there is none."""
    return (values - values.nanmean(dim=0)).square().nanmean(dim=0).sqrt().nan_to_num(nan=0.0)
