"""Losses against float64 formulas and autograd, and the behaviour of the ratios that clip ranges depend on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editrl.flow import (
    dppo_loss,
    gaussian_kl,
    get_kernel,
    grpo_guard_loss,
    grpo_loss,
    sigma_schedule,
    timestep_weights,
)

FLOATS = st.floats(-3, 3, width=32)
SEEDS = st.integers(0, 2**16)


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference_surrogate(ratio, advantages, low, high, weights):
    """mean of w·max(-A·r, -A·clip(r)), in float64 and one sample at a time."""
    total = 0 * ratio.sum()
    for r, a, w in zip(ratio, advantages.double(), weights.double(), strict=True):
        clipped = r if low <= r <= high else torch.tensor(min(max(r.item(), low), high), dtype=torch.float64)
        total = total + w * (-a * r if -a * r >= -a * clipped else -a * clipped)
    return total / len(ratio)


# ---- grpo_loss


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-0.5, 0.5, width=32), FLOATS, st.floats(0.125, 4, width=32)), min_size=1, max_size=8),
    st.floats(0.0625, 0.5),
    st.none() | st.floats(0.0625, 0.5),
)
def test_grpo_loss_and_gradient_match_the_plain_formula(rows, epsilon, epsilon_high):
    difference, advantages, weights = (torch.tensor(column) for column in zip(*rows, strict=True))
    old = torch.full_like(difference, -1.25)
    new = (old + difference).requires_grad_()
    policy = grpo_loss(new, old, advantages, epsilon=epsilon, epsilon_high=epsilon_high, weights=weights)

    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    exact = new.detach().double().requires_grad_()
    ratio = (exact - old.double()).exp()
    at_the_edge = torch.minimum((ratio - low).abs(), (ratio - high).abs()) < 1e-5
    expected = reference_surrogate(ratio, advantages, low, high, weights)
    torch.testing.assert_close(policy.loss.double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(policy.loss, new)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient.double()[~at_the_edge], expected_gradient[~at_the_edge], rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5, width=32), FLOATS), min_size=1, max_size=8), st.floats(1e-5, 0.2))
def test_the_ratio_is_exactly_one_before_the_first_update(rows, epsilon):
    log_prob, advantages = (torch.tensor(column) for column in zip(*rows, strict=True))
    log_prob.requires_grad_()
    policy = grpo_loss(log_prob, log_prob.detach(), advantages, epsilon=epsilon)
    assert torch.equal(policy.ratio, torch.ones(len(rows)))
    assert not (policy.clipped_low | policy.clipped_high).any()
    (gradient,) = torch.autograd.grad(policy.loss, log_prob)
    torch.testing.assert_close(gradient, -advantages / len(rows))


def test_clipping_silences_only_the_samples_that_moved_their_own_way():
    log_ratio = torch.tensor([-0.1, -0.1, 0.1, 0.1, 0.0]).requires_grad_()
    advantages = torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0])
    policy = grpo_loss(log_ratio, torch.zeros(5), advantages, epsilon=0.01)
    assert policy.clipped_low.tolist() == [True, False, False, False, False]
    assert policy.clipped_high.tolist() == [False, False, False, True, False]
    (gradient,) = torch.autograd.grad(policy.loss, log_ratio)
    assert (gradient != 0).tolist() == [False, True, True, False, True]


def test_the_upper_range_can_be_wider():
    log_ratio = torch.tensor([math.log(1.05), math.log(0.95)])
    advantages = torch.tensor([1.0, -1.0])
    policy = grpo_loss(log_ratio, torch.zeros(2), advantages, epsilon=0.01, epsilon_high=0.1)
    assert policy.clipped_high.tolist() == [False, False]
    assert policy.clipped_low.tolist() == [False, True]


def test_only_the_loss_and_only_the_new_log_prob_carry_gradient():
    new, old = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    policy = grpo_loss(new, old, torch.ones(3), epsilon=1e-4)
    assert policy.loss.shape == ()
    assert not policy.ratio.requires_grad
    policy.loss.backward()
    assert old.grad is None
    assert policy.clipped_low.dtype == policy.clipped_high.dtype == torch.bool


@pytest.mark.parametrize("epsilon, epsilon_high", [(0.0, None), (1.0, None), (-0.1, None), (0.1, 0.0)])
def test_a_clip_range_out_of_range(epsilon, epsilon_high):
    with pytest.raises(ValueError, match="epsilon must be in"):
        grpo_loss(torch.zeros(2), torch.zeros(2), torch.ones(2), epsilon=epsilon, epsilon_high=epsilon_high)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"'advantages': \[2, 1\]"):
        grpo_loss(torch.zeros(2), torch.zeros(2), torch.ones(2, 1), epsilon=0.1)
    with pytest.raises(ValueError, match="weights"):
        grpo_loss(torch.zeros(2), torch.zeros(2), torch.ones(2), epsilon=0.1, weights=torch.ones(1))
    with pytest.raises(ValueError, match="log_prob"):
        grpo_loss(torch.zeros(()), torch.zeros(()), torch.ones(()), epsilon=0.1)


# ---- grpo_guard_loss


def drifted(drift, samples=64, elements=50_000, std=0.2, seed=0):
    """Transitions whose mean moved by `drift` standard deviations an element, in a direction blind to the noise.

    Returns log_prob, old_log_prob, mean, old_mean, noise.
    """
    generator = torch.Generator().manual_seed(seed)
    noise, direction = (torch.randn(samples, elements, generator=generator) for _ in range(2))
    old_mean = torch.zeros(samples, elements)
    mean = old_mean + drift * std * direction
    next_sample = old_mean + std * noise
    log_probs = [
        torch.distributions.Normal(m.double(), std).log_prob(next_sample.double()).mean(1).float()
        for m in (mean, old_mean)
    ]
    return *log_probs, mean, old_mean, noise


def drifted_rows(drift, elements, samples):
    """log_prob, old_log_prob, mean, old_mean of `drifted`, made row by row: a batch of videos would fill the memory."""
    for seed in range(samples):
        yield drifted(drift, samples=1, elements=elements, seed=seed)[:4]


@pytest.mark.parametrize(
    "elements, drift, below, above",
    [
        (65_536, 0.014, (0.2, 0.8), 0),  # an image of 512²
        (806_400, 0.02, (1, 1), 0),  # a video of 480 x 480 x 53
    ],
)
def test_the_clip_of_a_mean_reduced_ratio_is_one_sided(elements, drift, below, above):
    """log r ~ N(-d²/2, d²/D): on video all ratios lie below 1 - 1e-4 and none above 1 + 1e-4. The guard undoes it."""
    rows, std, ones = list(drifted_rows(drift, elements, 24)), torch.tensor(0.2), torch.ones(1)
    plain = [grpo_loss(row[0], row[1], ones, epsilon=1e-4).ratio for row in rows]
    log_ratio = torch.cat(plain).log()
    width = drift / elements**0.5
    assert log_ratio.mean().item() == pytest.approx(-(drift**2) / 2, abs=3 * width / 24**0.5 + 5e-7)
    assert log_ratio.std().item() == pytest.approx(width, rel=0.5)
    assert below[0] <= (log_ratio.exp() < 1 - 1e-4).float().mean() <= below[1]
    assert (log_ratio.exp() > 1 + 1e-4).float().mean() == above

    guarded = [
        grpo_guard_loss(row[0], row[1], ones, mean=row[2], old_mean=row[3], std=std, dt=-0.05, epsilon=2e-6).ratio
        for row in rows
    ]
    assert 0.25 < (torch.cat(guarded) > 1).float().mean() < 0.75
    assert torch.cat(guarded).log().mean().abs() < 3 * 0.2 * width / 24**0.5 + 1e-7


def test_guard_removes_the_bias_of_the_mean_reduced_ratio():
    """At a drift of 0.02 every plain ratio is below 1, by about 0.02²/2 = 2e-4; normalised ones lie on both sides."""
    log_prob, old_log_prob, mean, old_mean, noise = drifted(0.02)
    advantages = torch.ones(64)
    plain = grpo_loss(log_prob, old_log_prob, advantages, epsilon=1e-5).ratio
    assert (plain < 1 - 1e-5).float().mean() > 0.9
    assert plain.log().mean().item() == pytest.approx(-(0.02**2) / 2, rel=0.1)
    guarded = grpo_guard_loss(
        log_prob, old_log_prob, advantages, mean=mean, old_mean=old_mean, std=torch.tensor(0.2), dt=-0.05, epsilon=2e-6
    ).ratio
    assert 0.3 < (guarded > 1).float().mean() < 0.7
    standard_error = guarded.std() / 64**0.5
    assert abs(guarded.mean() - 1) < 3 * standard_error
    torch.testing.assert_close(guarded.log(), (noise * (mean - old_mean)).mean(1), rtol=0, atol=2e-7)


@settings(deadline=None)
@given(SEEDS, st.floats(0.0625, 0.5, width=32), st.floats(0.015625, 0.25, width=32), st.booleans())
def test_guard_loss_and_gradient_match_the_plain_formula(seed, std, dt, weighted):
    batch, elements = 4, 12
    old_mean, noise = randn(seed, batch, elements), randn(seed + 1, batch, elements)
    next_sample = old_mean + std * noise
    advantages = randn(seed + 2, batch)
    weights = randn(seed + 3, batch).abs() if weighted else None
    epsilon = 0.05

    def log_prob_of(mean):
        return torch.distributions.Normal(mean, std).log_prob(next_sample.to(mean.dtype)).mean(1)

    mean = (old_mean + 0.5 * std * randn(seed + 4, batch, elements)).requires_grad_()
    policy = grpo_guard_loss(
        log_prob_of(mean),
        log_prob_of(old_mean),
        advantages,
        mean=mean,
        old_mean=old_mean,
        std=torch.full((batch, 1), std),
        dt=-dt,
        epsilon=epsilon,
        weights=weights,
    )

    exact, exact_old = mean.detach().double().requires_grad_(), old_mean.double()
    bias = (exact - exact_old).square().mean(1) / (2 * std**2)
    ratio = ((log_prob_of(exact) - log_prob_of(exact_old) + bias) * std).exp()
    ones = torch.ones(batch) if weights is None else weights
    expected = reference_surrogate(ratio, advantages, 1 - epsilon, 1 + epsilon, ones) / dt
    torch.testing.assert_close(policy.loss.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy.ratio.double(), ratio.detach(), rtol=1e-5, atol=1e-6)
    if torch.minimum((ratio - 1 - epsilon).abs(), (ratio - 1 + epsilon).abs()).min() > 1e-5:
        (gradient,) = torch.autograd.grad(policy.loss, mean)
        (expected_gradient,) = torch.autograd.grad(expected, exact)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde", "cps"])
def test_guard_ratio_is_exactly_one_when_a_replayed_step_has_not_changed(name):
    sample, velocity, noise = (randn(seed, 3, 4, 5, 6) for seed in range(3))
    kernel = get_kernel(name)
    old = kernel.step(sample, velocity, 0.8, 0.7, noise=noise)
    new = kernel.step(sample, velocity.clone().requires_grad_(), 0.8, 0.7, next_sample=old.next_sample)
    policy = grpo_guard_loss(
        new.log_prob,
        old.log_prob,
        torch.ones(3),
        mean=new.mean,
        old_mean=old.mean,
        std=new.std,
        dt=-0.1,
        epsilon=2e-6,
    )
    assert torch.equal(policy.ratio, torch.ones(3))


def test_guard_pulls_equally_hard_on_the_velocity_at_every_step():
    """Under flow_sde 1 + s²(1-σ)/(2σ) = 1 + a²/2 at every σ < 1: why timestep_weights do not belong on top."""
    sigmas = sigma_schedule(16, 5.0)
    kernel = get_kernel("flow_sde", noise_level=0.7)
    sample, noise = randn(0, 1, 1000), randn(1, 1, 1000)
    norms = []
    for i in range(1, 16):
        velocity = randn(2, 1, 1000).requires_grad_()
        old = kernel.step(sample, velocity.detach(), sigmas[i], sigmas[i + 1], noise=noise)
        new = kernel.step(sample, velocity, sigmas[i], sigmas[i + 1], next_sample=old.next_sample)
        policy = grpo_guard_loss(
            new.log_prob,
            old.log_prob,
            torch.ones(1),
            mean=new.mean,
            old_mean=old.mean,
            std=new.std,
            dt=sigmas[i + 1] - sigmas[i],
            epsilon=2e-6,
        )
        norms.append(torch.autograd.grad(policy.loss, velocity)[0].norm())
    expected = (1 + 0.7**2 / 2) * noise.norm() / 1000
    torch.testing.assert_close(torch.stack(norms), expected.expand(15), rtol=1e-3, atol=0)


def test_guard_takes_one_std_and_dt_for_each_sample():
    log_prob, old_log_prob, mean, old_mean, _ = drifted(0.5, samples=3, elements=50)
    shared = {"mean": mean, "old_mean": old_mean, "epsilon": 0.5}
    one = grpo_guard_loss(log_prob, old_log_prob, torch.ones(3), std=torch.tensor(0.2), dt=-0.1, **shared)
    for std in (torch.full((3,), 0.2), torch.full((3, 1), 0.2)):
        each = grpo_guard_loss(log_prob, old_log_prob, torch.ones(3), std=std, dt=torch.full((3,), -0.1), **shared)
        torch.testing.assert_close(each.loss, one.loss)
    steeper = grpo_guard_loss(log_prob, old_log_prob, torch.ones(3), std=torch.tensor(0.2), dt=0.05, **shared)
    torch.testing.assert_close(steeper.loss, 2 * one.loss)


def test_guard_says_what_does_not_fit():
    mean, advantages = torch.zeros(2, 4), torch.ones(2)
    shared = {"mean": mean, "old_mean": mean, "std": torch.tensor(0.1), "dt": -0.1, "epsilon": 1e-5}
    with pytest.raises(ValueError, match="dt must not be 0"):
        grpo_guard_loss(torch.zeros(2), torch.zeros(2), advantages, **{**shared, "dt": 0.0})
    with pytest.raises(ValueError, match="different shapes"):
        grpo_guard_loss(torch.zeros(2), torch.zeros(2), advantages, **{**shared, "old_mean": mean[:1]})
    with pytest.raises(ValueError, match="std must be one value"):
        grpo_guard_loss(torch.zeros(2), torch.zeros(2), advantages, **{**shared, "std": torch.ones(2, 4)})
    with pytest.raises(ValueError, match="mean holds 2 samples"):
        grpo_guard_loss(torch.zeros(3), torch.zeros(3), torch.ones(3), **shared)


# ---- dppo_loss


def reference_dppo(log_prob, old_log_prob, advantages, mean, old_mean, std, threshold, weights):
    """mean of -w·A·r over the kept terms (and zeros), one sample at a time in float64; also which were dropped."""
    total, dropped = 0 * log_prob.sum(), []
    for i in range(len(log_prob)):
        ratio = (log_prob[i] - old_log_prob[i].double()).exp()
        divergence = ((mean[i].double() - old_mean[i].double()) ** 2).mean() / (2 * std**2)
        its_own_way = (ratio > 1 and advantages[i] > 0) or (ratio < 1 and advantages[i] < 0)
        dropped.append(bool(divergence >= threshold and its_own_way))
        if not dropped[-1]:
            total = total - weights[i].double() * advantages[i].double() * ratio
    return total / len(log_prob), torch.tensor(dropped)


@settings(deadline=None)
@given(
    SEEDS,
    st.lists(st.tuples(st.floats(-0.5, 0.5, width=32), FLOATS, st.floats(0.125, 4, width=32)), min_size=1, max_size=8),
    st.floats(0.0625, 0.5, width=32),
    st.sampled_from([0.03, 0.1, 0.3, 10.0]),
)
def test_dppo_loss_and_gradient_match_the_plain_formula(seed, rows, std, threshold):
    difference, advantages, weights = (torch.tensor(column) for column in zip(*rows, strict=True))
    old_log_prob = torch.full_like(difference, -1.25)
    log_prob = (old_log_prob + difference).requires_grad_()
    old_mean = randn(seed, len(rows), 12)
    mean = old_mean + std * randn(seed + 1, len(rows), 1).expand(-1, 12)  # divergences around 0.5·(0 ... 4)
    shared = {"threshold": threshold, "weights": weights}
    policy = dppo_loss(
        log_prob, old_log_prob, advantages, mean=mean, old_mean=old_mean, std=torch.tensor(std), **shared
    )
    exact = log_prob.detach().double().requires_grad_()
    expected, dropped = reference_dppo(exact, old_log_prob, advantages, mean, old_mean, std, **shared)
    assert (policy.clipped_low | policy.clipped_high).tolist() == dropped.tolist()
    assert policy.clipped_low.tolist() == (dropped & (advantages < 0)).tolist()
    torch.testing.assert_close(policy.loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(policy.ratio.double(), (exact - old_log_prob.double()).exp().detach())
    (gradient,) = torch.autograd.grad(policy.loss, log_prob)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-6)


def dppo_of(log_ratio, advantages, drift, **options):
    """Means that moved by `drift` standard deviations [B] an element; std 0.1, so the divergence is drift²/2."""
    mean = 0.1 * torch.tensor(drift)[:, None].expand(-1, 6)
    zeros = torch.zeros(len(drift))
    return dppo_loss(
        log_ratio, zeros, torch.tensor(advantages), mean=mean, old_mean=0 * mean, std=torch.tensor(0.1), **options
    )


def test_dppo_drops_only_what_has_moved_both_too_far_and_its_own_way():
    log_ratio = torch.tensor([0.1, 0.1, -0.1, -0.1, 0.1, -0.1, 0.0, 0.1]).requires_grad_()
    advantages = [1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 0.0]
    drift = [0.02, 0.02, 0.02, 0.02, 0.001, 0.001, 0.02, 0.02]
    policy = dppo_of(log_ratio, advantages, drift)
    assert policy.clipped_high.tolist() == [True, False, False, False, False, False, False, False]
    assert policy.clipped_low.tolist() == [False, False, False, True, False, False, False, False]
    (gradient,) = torch.autograd.grad(policy.loss, log_ratio)
    assert (gradient != 0).tolist() == [False, True, True, False, True, True, True, False]
    kept = torch.tensor([False, True, True, False, True, True, True, True])
    torch.testing.assert_close(policy.loss, -(torch.tensor(advantages) * policy.ratio)[kept].sum() / 8)


def test_dppo_drops_from_the_threshold_on():
    log_ratio, mean, old_mean = torch.full((1,), 0.1), torch.full((1, 4), 0.5), torch.zeros(1, 4)
    for threshold, dropped in ((0.5, True), (0.5 + 2**-20, False)):
        shared = {"mean": mean, "old_mean": old_mean, "std": torch.tensor(0.5), "threshold": threshold}
        assert dppo_loss(log_ratio, torch.zeros(1), torch.ones(1), **shared).clipped_high == dropped


def test_the_default_dppo_threshold_is_a_drift_of_0_0045_std():
    log_ratio = torch.full((2,), 0.1)
    assert dppo_of(log_ratio, [1.0, 1.0], [0.0044, 0.0046]).clipped_high.tolist() == [False, True]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-0.5, 0.5, width=32), FLOATS), min_size=1, max_size=8))
def test_dppo_below_its_threshold_is_grpo_without_a_clip(rows):
    log_ratio, advantages = (torch.tensor(column) for column in zip(*rows, strict=True))
    log_ratio.requires_grad_()
    dppo = dppo_of(log_ratio, advantages.tolist(), [0.5] * len(rows), threshold=0.2)
    grpo = grpo_loss(log_ratio, torch.zeros(len(rows)), advantages, epsilon=0.99, epsilon_high=1e6)
    torch.testing.assert_close(dppo.loss, grpo.loss)
    assert torch.equal(dppo.ratio, grpo.ratio)
    assert not (dppo.clipped_low | dppo.clipped_high).any()
    gradients = [torch.autograd.grad(policy.loss, log_ratio)[0] for policy in (dppo, grpo)]
    torch.testing.assert_close(*gradients)


def test_dppo_keeps_everything_before_the_first_update():
    sample, velocity, noise = (randn(seed, 3, 4, 5, 6) for seed in range(3))
    kernel = get_kernel("flow_sde")
    old = kernel.step(sample, velocity, 0.8, 0.7, noise=noise)
    new = kernel.step(sample, velocity.clone().requires_grad_(), 0.8, 0.7, next_sample=old.next_sample)
    policy = dppo_loss(
        new.log_prob, old.log_prob, torch.tensor([1.0, -1.0, 2.0]), mean=new.mean, old_mean=old.mean, std=new.std
    )
    assert torch.equal(policy.ratio, torch.ones(3))
    assert not (policy.clipped_low | policy.clipped_high).any()


def test_the_dppo_mask_has_no_gradient_of_its_own():
    log_prob, mean, old_mean = torch.zeros(2).requires_grad_(), randn(0, 2, 8).requires_grad_(), randn(1, 2, 8)
    old_mean.requires_grad_()
    policy = dppo_loss(log_prob, torch.zeros(2), torch.ones(2), mean=mean, old_mean=old_mean, std=torch.tensor(0.1))
    policy.loss.backward()
    assert log_prob.grad is not None
    assert mean.grad is None
    assert old_mean.grad is None
    assert not policy.ratio.requires_grad


def test_on_video_the_dppo_mask_is_one_sided_too():
    """Its distance is exact, but its direction is the sign of a ratio that sinks below 1 whatever the advantage."""
    advantages = [torch.ones(1) if seed % 2 else -torch.ones(1) for seed in range(8)]
    for advantage, (log_prob, old_log_prob, mean, old_mean) in zip(
        advantages, drifted_rows(0.02, 806_400, 8), strict=True
    ):
        policy = dppo_loss(log_prob, old_log_prob, advantage, mean=mean, old_mean=old_mean, std=torch.tensor(0.2))
        assert not policy.clipped_high
        assert policy.clipped_low == (advantage < 0)


def test_dppo_takes_low_precision_and_one_std_for_each_sample():
    log_prob, old_log_prob, advantages = torch.tensor([0.1, -0.1]), torch.zeros(2), torch.tensor([1.0, -1.0])
    mean, old_mean = randn(0, 2, 64).bfloat16(), randn(1, 2, 64).bfloat16()
    expected = dppo_loss(
        log_prob, old_log_prob, advantages, mean=mean.float(), old_mean=old_mean.float(), std=torch.tensor(0.1)
    )
    for std in (torch.tensor(0.1), torch.full((2,), 0.1), torch.full((2, 1), 0.1)):
        actual = dppo_loss(log_prob, old_log_prob, advantages.bfloat16(), mean=mean, old_mean=old_mean, std=std)
        assert torch.equal(actual.loss, expected.loss)
        assert actual.loss.dtype == torch.float32


def test_dppo_says_what_does_not_fit():
    shared = {"mean": torch.zeros(2, 4), "old_mean": torch.zeros(2, 4), "std": torch.tensor(0.1)}
    zeros, ones = torch.zeros(2), torch.ones(2)
    for threshold in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="threshold must be above 0"):
            dppo_loss(zeros, zeros, ones, threshold=threshold, **shared)
    with pytest.raises(ValueError, match=r"'advantages': \[2, 1\]"):
        dppo_loss(zeros, zeros, ones[:, None], **shared)
    with pytest.raises(ValueError, match="weights"):
        dppo_loss(zeros, zeros, ones, weights=ones[:1], **shared)
    with pytest.raises(ValueError, match="different shapes"):
        dppo_loss(zeros, zeros, ones, **{**shared, "old_mean": torch.zeros(1, 4)})
    with pytest.raises(ValueError, match="std must be one value"):
        dppo_loss(zeros, zeros, ones, **{**shared, "std": torch.ones(2, 4)})
    with pytest.raises(ValueError, match="mean holds 2 samples"):
        dppo_loss(torch.zeros(3), torch.zeros(3), torch.ones(3), **shared)


# ---- gaussian_kl


@settings(deadline=None)
@given(SEEDS, st.floats(0.03125, 2, width=32))
def test_kl_is_the_true_gaussian_kl_divided_by_the_elements(seed, std):
    mean, ref_mean = randn(seed, 3, 4, 5), randn(seed + 1, 3, 4, 5)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean.double(), std), torch.distributions.Normal(ref_mean.double(), std)
    ).mean(dim=(1, 2))
    for shape in ((), (3,), (3, 1, 1)):
        kl = gaussian_kl(mean, ref_mean, torch.full(shape, std))
        assert kl.shape == (3,)
        torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-6)


def test_kl_is_zero_at_the_reference_and_moves_only_the_mean():
    mean = randn(0, 2, 8).requires_grad_()
    assert gaussian_kl(mean, mean.detach(), torch.tensor(0.1)).tolist() == [0.0, 0.0]
    kl = gaussian_kl(mean, torch.zeros(2, 8), torch.tensor(0.5))
    (gradient,) = torch.autograd.grad(kl.sum(), mean)
    torch.testing.assert_close(gradient, mean.detach() / (0.25 * 8))


def test_kl_of_low_precision_means_is_taken_in_float32():
    mean, ref_mean = randn(0, 2, 64).bfloat16(), randn(1, 2, 64).bfloat16()
    expected = gaussian_kl(mean.float(), ref_mean.float(), torch.tensor(0.1))
    assert torch.equal(gaussian_kl(mean, ref_mean, torch.tensor(0.1)), expected)


def test_kl_refuses_what_would_broadcast():
    with pytest.raises(ValueError, match="different shapes"):
        gaussian_kl(torch.zeros(2, 4), torch.zeros(1, 4), torch.tensor(0.1))
    with pytest.raises(ValueError, match="std must be one value"):
        gaussian_kl(torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(4))


# ---- timestep_weights


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde", "cps"])
def test_uniform_gradient_weights_cancel_the_gradient_scale(name):
    sigmas = sigma_schedule(16, 5.0)
    kernel = get_kernel(name)
    steps = [1, 3, 4, 9]
    weights = timestep_weights(kernel, sigmas, steps, "uniform_gradient")
    assert weights.dtype == torch.float32
    assert weights.mean().item() == pytest.approx(1)
    pull = torch.stack(
        [w * kernel.gradient_scale(sigmas[i], sigmas[i + 1]) for w, i in zip(weights, steps, strict=True)]
    )
    torch.testing.assert_close(pull, pull[:1].expand(4))


def test_no_weighting_is_ones_for_every_kernel():
    assert timestep_weights(get_kernel("ode"), sigma_schedule(8), range(3)).tolist() == [1.0, 1.0, 1.0]


def test_timestep_weights_say_what_is_wrong():
    kernel, sigmas = get_kernel("cps"), sigma_schedule(8, 5.0)
    with pytest.raises(ValueError, match="unknown timestep weighting 'gradient'"):
        timestep_weights(kernel, sigmas, [0], "gradient")
    for steps in ([], [8], [-1]):
        with pytest.raises(ValueError, match=r"steps 0 \.\.\. 7"):
            timestep_weights(kernel, sigmas, steps, "uniform_gradient")
    with pytest.raises(ValueError, match="cps has std 0"):
        timestep_weights(kernel, sigmas, [6, 7], "uniform_gradient")
