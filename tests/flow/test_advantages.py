"""group_advantages against a NumPy reference that loops over groups, and what each option promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editrl.flow import group_advantages, reward_shares, zero_std_groups

AGGREGATIONS = ["normalize_then_sum", "sum_then_normalize"]
SCALES = ["group", "batch", "none"]


def present(values):
    return values[~np.isnan(values)]


def std(values):
    values = present(values)
    return values.std() if len(values) else 0.0


def normalize(values, groups, scale):
    """One column, one group at a time; a missing value gives 0."""
    result = np.zeros(len(values))
    for group in np.unique(groups):
        rows = np.flatnonzero((groups == group) & ~np.isnan(values))
        if len(rows) == 0 or np.ptp(values[rows]) == 0:
            continue
        divisor = {"group": std(values[rows]) + 1e-4, "batch": std(values) + 1e-4, "none": 1.0}[scale]
        result[rows] = (values[rows] - values[rows].mean()) / divisor
    return result


def reference(rewards, groups, weights, aggregation, scale, clip):
    rewards = rewards.astype(np.float64)
    unscored = np.isnan(rewards[:, weights != 0]).all(axis=1)
    if aggregation == "normalize_then_sum":
        columns = [w * normalize(rewards[:, k], groups, scale) for k, w in enumerate(weights) if w != 0]
        advantages = np.sum(columns, axis=0)
        advantages = advantages / (std(np.where(unscored, np.nan, advantages)) + 1e-4)
    else:
        total = np.zeros(len(rewards))
        for k, w in enumerate(weights):
            for i, value in enumerate(rewards[:, k]):
                neighbours = present(rewards[groups == groups[i], k])
                everyone = present(rewards[:, k])
                if np.isnan(value) and len(neighbours):
                    value = neighbours.mean()
                elif np.isnan(value):
                    value = everyone.mean() if len(everyone) else 0.0
                total[i] += w * value
        advantages = normalize(np.where(unscored, np.nan, total), groups, scale)
    return advantages if clip is None else np.clip(advantages, -clip, clip)


@st.composite
def batches(draw, missing=True):
    """rewards [N,K] on a grid of 1/64 (so that sums are exact), groups of any sizes in any order, weights [K].

    An offset of 100,000 is what a mean or a standard deviation taken in float32 would not survive.
    """
    num_samples, num_rewards = draw(st.integers(1, 16)), draw(st.integers(1, 3))
    offset = draw(st.sampled_from([0, 100_000]))
    value = st.integers(-64, 64).map(lambda step: offset + step / 64)
    value = st.one_of(value, st.just(float("nan"))) if missing else value
    row = st.lists(value, min_size=num_rewards, max_size=num_rewards)
    rewards = draw(st.lists(row, min_size=num_samples, max_size=num_samples))
    ids = st.sampled_from([-7, 0, 3, 2**53 + 1, 2**53])  # the last two are one number in float64
    groups = draw(st.lists(ids, min_size=num_samples, max_size=num_samples))
    weight = st.sampled_from([-0.5, 0.0, 0.25, 1.0, 2.0])
    weights = draw(st.lists(weight, min_size=num_rewards, max_size=num_rewards).filter(any))
    return np.array(rewards, dtype=np.float32), np.array(groups), np.array(weights)


@settings(deadline=None, max_examples=300)
@given(batches(), st.sampled_from(AGGREGATIONS), st.sampled_from(SCALES), st.sampled_from([None, 5.0, 0.5]))
def test_matches_the_numpy_reference(batch, aggregation, scale, clip):
    rewards, groups, weights = batch
    actual = group_advantages(
        torch.from_numpy(rewards),
        torch.from_numpy(groups),
        weights=torch.from_numpy(weights),
        aggregation=aggregation,
        scale=scale,
        clip=clip,
    )
    assert actual.dtype == torch.float32
    expected = reference(rewards, groups, weights, aggregation, scale, clip)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(batches(), st.sampled_from(AGGREGATIONS), st.sampled_from(SCALES), st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(batch, aggregation, scale, random):
    rewards, groups, weights = (torch.from_numpy(array) for array in batch)
    order = list(range(len(groups)))
    random.shuffle(order)
    options = {"weights": weights, "aggregation": aggregation, "scale": scale}
    straight = group_advantages(rewards, groups, **options)
    shuffled = group_advantages(rewards[order], groups[order], **options)
    torch.testing.assert_close(shuffled, straight[order], rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(
    batches(),
    st.lists(st.integers(-64, 64), min_size=5, max_size=5),
    st.sampled_from(AGGREGATIONS),
    st.sampled_from(["group", "none"]),
)
def test_a_constant_added_to_a_whole_group_changes_nothing(batch, shifts, aggregation, scale):
    """Why R_IF may drop its source term: C(V_s, t_s) is the same for every edit of one source."""
    rewards, groups, weights = batch
    rewards = np.where(np.isnan(rewards).any(axis=0), 0, rewards).astype(np.float32)
    _, number = np.unique(groups, return_inverse=True)
    shifted = rewards.copy()
    shifted[:, 0] += np.array(shifts)[number] / 64
    options = {"weights": torch.from_numpy(weights), "aggregation": aggregation, "scale": scale}
    before = group_advantages(torch.from_numpy(rewards), torch.from_numpy(groups), **options)
    after = group_advantages(torch.from_numpy(shifted), torch.from_numpy(groups), **options)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_with_the_batch_std_such_a_constant_does_matter():
    rewards, groups = torch.tensor([[0.1], [0.2], [0.1], [0.2]]), torch.tensor([0, 0, 1, 1])
    shifted = rewards + torch.tensor([[0.0], [0.0], [3.0], [3.0]])
    options = {"aggregation": "sum_then_normalize", "scale": "batch"}
    before, after = group_advantages(rewards, groups, **options), group_advantages(shifted, groups, **options)
    assert (after.abs() < before.abs() / 10).all()


def test_by_hand_grpo():
    rewards = torch.tensor([[1.0], [3.0], [10.0], [10.0]])
    advantages = group_advantages(rewards, torch.tensor([7, 7, 8, 8]), aggregation="sum_then_normalize")
    torch.testing.assert_close(advantages, torch.tensor([-1 / 1.0001, 1 / 1.0001, 0, 0]))


def test_per_reward_normalisation_keeps_a_narrow_reward_alive():
    """A reward of ±0.1 against one of ±10: summed first, the narrow one cannot decide anything."""
    rewards = torch.tensor([[0.1, -10.0], [-0.1, 10.0], [0.1, 10.0], [-0.1, -10.0]])
    groups = torch.zeros(4, dtype=torch.int64)
    summed = group_advantages(rewards, groups, aggregation="sum_then_normalize")
    assert summed[0] < 0 < summed[1]
    normalised = group_advantages(rewards, groups)
    torch.testing.assert_close(normalised[:2], torch.zeros(2), rtol=0, atol=2e-3)
    assert normalised[2] > 1
    assert normalised[3] < -1


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_equal_rewards_give_exactly_zero_although_their_mean_rounds(aggregation, scale):
    rewards = torch.full((7, 2), 0.1, dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 0, 0, 0])
    assert rewards[:, 0].sum() / 7 != rewards[0, 0]
    options = {"weights": [0.3, 0.7], "aggregation": aggregation, "scale": scale}
    assert group_advantages(rewards, groups, **options).tolist() == [0.0] * 7


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_missing_value_says_nothing_about_its_sample(aggregation):
    """Sample 2 lacks the second reward: neither punished for it, nor changing what the others get for theirs."""
    nan = float("nan")
    rewards = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, nan]])
    groups = torch.zeros(3, dtype=torch.int64)
    advantages = group_advantages(rewards, groups, aggregation=aggregation)
    assert advantages[0] == -advantages[1] < -0.5
    assert advantages[2] == 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_sample_without_any_reward_gets_zero_and_is_as_if_absent(aggregation, scale):
    nan = float("nan")
    rewards = torch.tensor([[1.0, 0.5], [2.0, 0.25], [nan, nan], [4.0, 0.0]])
    groups = torch.zeros(4, dtype=torch.int64)
    options = {"aggregation": aggregation, "scale": scale}
    with_it = group_advantages(rewards, groups, **options)
    without = group_advantages(rewards[[0, 1, 3]], groups[:3], **options)
    assert with_it[2] == 0
    torch.testing.assert_close(with_it[[0, 1, 3]], without)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_rewards_missing_everywhere_leave_zeros(aggregation):
    rewards = torch.full((3, 2), float("nan"))
    assert group_advantages(rewards, torch.tensor([0, 0, 1]), aggregation=aggregation).tolist() == [0.0, 0.0, 0.0]


@settings(deadline=None)
@given(batches(), st.sampled_from(AGGREGATIONS), st.sampled_from(SCALES))
def test_a_reward_of_weight_zero_has_no_influence(batch, aggregation, scale):
    rewards, groups, weights = (torch.from_numpy(array) for array in batch)
    extra = torch.arange(len(groups), dtype=torch.float32)[:, None]
    options = {"aggregation": aggregation, "scale": scale}
    plain = group_advantages(rewards, groups, weights=weights, **options)
    more = group_advantages(torch.cat([rewards, extra], 1), groups, weights=[*weights.tolist(), 0.0], **options)
    assert torch.equal(more, plain)


def test_an_outlier_is_clipped():
    rewards = torch.zeros(100, 1)
    rewards[0] = 1.0
    groups = torch.zeros(100, dtype=torch.int64)
    assert group_advantages(rewards, groups)[0] == 5
    assert group_advantages(rewards, groups, clip=None)[0] > 9


# ---- zero_std_groups


@settings(deadline=None)
@given(batches())
def test_zero_std_groups_matches_counting(batch):
    rewards, groups, _ = batch
    fractions = zero_std_groups(torch.from_numpy(rewards), torch.from_numpy(groups))
    for k in range(rewards.shape[1]):
        columns = [present(rewards[groups == group, k]) for group in np.unique(groups)]
        flat = [np.ptp(values) == 0 for values in columns if len(values)]
        assert fractions[k].item() == pytest.approx(np.mean(flat) if flat else np.nan, nan_ok=True)


def test_zero_std_groups_by_hand():
    nan = float("nan")
    rewards = torch.tensor([[0.1, 1.0, nan], [0.1, 2.0, nan], [0.3, 5.0, nan], [0.4, nan, nan]])
    fractions = zero_std_groups(rewards, torch.tensor([4, 4, 9, 9]))
    assert fractions[:2].tolist() == [0.5, 0.5]
    assert fractions[2].isnan()


# ---- what goes wrong, said clearly


def test_errors():
    rewards, groups = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="unknown aggregation 'sum'"):
        group_advantages(rewards, groups, aggregation="sum")
    with pytest.raises(ValueError, match="unknown scale True"):
        group_advantages(rewards, groups, scale=True)
    with pytest.raises(ValueError, match="clip must be above 0"):
        group_advantages(rewards, groups, clip=0)
    with pytest.raises(ValueError, match=r"rewards must be \[N, K\]"):
        group_advantages(rewards[:, 0], groups)
    with pytest.raises(ValueError, match=r"rewards must be \[N, K\]"):
        group_advantages(rewards, groups[:3])
    with pytest.raises(ValueError, match="group_ids must be integers"):
        group_advantages(rewards, groups.float())
    for weights in ([1.0], [0.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="weights must be 2 finite numbers"):
            group_advantages(rewards, groups, weights=weights)
    rewards[2, 1] = float("inf")
    with pytest.raises(ValueError, match="reward 1 of sample 2 is infinite"):
        group_advantages(rewards, groups)


# --- shares


def test_shares_are_the_mean_sizes_of_the_parts():
    rewards = torch.tensor([[0.0, 5.0, 1.0], [1.0, 5.0, 3.0], [2.0, 5.0, 2.0], [4.0, 5.0, 0.0]])
    groups, weights = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 1.0, 0.5])
    shares = reward_shares(rewards, groups, weights=weights)
    torch.testing.assert_close(shares, torch.tensor([2 / 3, 0.0, 1 / 3]), atol=1e-3, rtol=0)
    summed = reward_shares(rewards, groups, weights=weights, aggregation="sum_then_normalize", scale="none")
    torch.testing.assert_close(summed, torch.tensor([1.5 / 2.5, 0.0, 1.0 / 2.5]))


def test_a_reward_that_is_alone_has_the_whole_share_and_a_flat_one_none():
    groups = torch.tensor([0, 0, 1, 1])
    for aggregation in ("normalize_then_sum", "sum_then_normalize"):
        alone = torch.tensor([[0.0, torch.nan], [1.0, torch.nan], [3.0, torch.nan], [9.0, torch.nan]])
        assert reward_shares(alone, groups, aggregation=aggregation).tolist() == [1, 0]
        assert reward_shares(torch.ones(4, 2), groups, aggregation=aggregation).tolist() == [0, 0]
