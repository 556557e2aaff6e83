"""Forward-process losses against float64 formulas, written as the papers write them: with x_σ and predictions of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editrl.flow import awm_loss, flow_matching_loss, gaussian_kl, get_kernel, nft_loss, rwr_loss, velocity_kl

SEEDS = st.integers(0, 2**16)
# Below that, the reference, which adds clean to σ·noise and subtracts it again, runs out of float64.
SIGMAS = st.one_of(st.just(0.0), st.floats(0.0009765625, 1, width=32))
SHAPE = (3, 4, 2, 3, 5)  # B, C, F, H, W


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch(seed, shape=SHAPE, change=1.0):
    """velocity (with gradient), old_velocity, clean, noise, advantages; velocities differ by `change` an element."""
    old, clean, noise = (randn(seed + i, *shape) for i in range(3))
    velocity = (old + change * randn(seed + 3, *shape)).requires_grad_()
    return velocity, old, clean, noise, 3 * randn(seed + 4, shape[0])


def mean(value):
    return value.flatten(1).mean(1)


def per_sample(value, samples=SHAPE[0]):
    """float64 [B, 1, 1, 1, 1] of a float, 0-d or [B] value."""
    return torch.as_tensor(value).double().expand(samples).reshape(-1, 1, 1, 1, 1)


def assert_same_gradient(loss, velocity, expected, exact_velocity, rtol=1e-4):
    (gradient,) = torch.autograd.grad(loss, velocity)
    (expected_gradient,) = torch.autograd.grad(expected, exact_velocity)
    size = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=1e-5 * size)


# ---- flow_matching_loss


@settings(deadline=None)
@given(SEEDS, st.floats(0, 8, width=32), st.booleans())
def test_flow_matching_loss_matches_the_formula(seed, mask_weight, masked):
    shape = (2, 3, 2, 4, 5)
    velocity, clean, noise = (randn(seed + i, *shape).requires_grad_(i == 0) for i in range(3))
    mask = (randn(seed + 3, 2, 1, 2, 4, 5) > 0).float() if masked else None
    loss = flow_matching_loss(velocity, clean, noise, mask=mask, mask_weight=mask_weight)
    exact = velocity.detach().double().requires_grad_()
    weight = 1 + mask_weight * (mask.double().expand(shape) if masked else 0)
    expected = (weight * (exact - (noise.double() - clean.double())) ** 2).flatten(1).mean(1)
    assert loss.shape == (2,)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5)


def test_flow_matching_loss_is_zero_at_the_exact_velocity_and_an_empty_mask_is_no_mask():
    clean, noise = randn(0, 2, 3, 1, 4, 4), randn(1, 2, 3, 1, 4, 4)
    assert flow_matching_loss(noise - clean, clean, noise).tolist() == [0.0, 0.0]
    prediction, empty = randn(2, 2, 3, 1, 4, 4), torch.zeros(2, 1, 1, 4, 4, dtype=torch.bool)
    plain = flow_matching_loss(prediction, clean, noise)
    assert torch.equal(flow_matching_loss(prediction, clean, noise, mask=empty, mask_weight=3.0), plain)
    full = flow_matching_loss(prediction, clean, noise, mask=~empty, mask_weight=3.0)
    torch.testing.assert_close(full, 4 * plain)


def test_flow_matching_loss_is_float32_for_low_precision_predictions():
    velocity, clean, noise = (randn(i, 2, 3, 1, 4, 4) for i in range(3))
    loss = flow_matching_loss(velocity.bfloat16(), clean, noise)
    assert torch.equal(loss, flow_matching_loss(velocity.bfloat16().float(), clean, noise))
    assert loss.dtype == torch.float32


def test_flow_matching_loss_says_what_does_not_fit():
    video = torch.zeros(2, 3, 1, 4, 4)
    with pytest.raises(ValueError, match="different shapes"):
        flow_matching_loss(video, video, video[:1])
    with pytest.raises(ValueError, match="mask must be on the latent grid"):
        flow_matching_loss(video, video, video, mask=torch.zeros(2, 1, 1, 8, 8))
    with pytest.raises(ValueError, match="mask_weight must be at least 0"):
        flow_matching_loss(video, video, video, mask=video[:, :1], mask_weight=-1.0)


# ---- nft_loss


def reference_nft(velocity, old_velocity, clean, noise, sigma, advantages, beta, advantage_range):
    """DiffusionNFT as its paper and code have it, in float64."""
    old_velocity, clean, noise, advantages = (t.double() for t in (old_velocity, clean, noise, advantages))
    sigma = per_sample(sigma)
    noised = (1 - sigma) * clean + sigma * noise
    r = torch.clip(advantages / advantage_range, -1, 1) / 2 + 0.5
    losses = []
    for implicit in (
        beta * velocity + (1 - beta) * old_velocity,
        (1 + beta) * old_velocity - beta * velocity,
    ):
        prediction = noised - sigma * implicit
        size = mean((prediction - clean).abs()).clamp(min=1e-5).detach()
        losses.append(mean((prediction - clean) ** 2) / size)
    positive, negative = losses
    return advantage_range * (r / beta * positive + (1 - r) / beta * negative)


@settings(deadline=None)
@given(
    SEEDS,
    st.one_of(SIGMAS, st.lists(SIGMAS, min_size=3, max_size=3)),
    st.floats(0.0625, 2, width=32),
    st.floats(0.25, 8, width=32),
)
def test_nft_loss_and_gradient_match_the_definition(seed, sigma, beta, advantage_range):
    sigma = torch.tensor(sigma) if isinstance(sigma, list) else sigma
    velocity, *others, advantages = batch(seed)
    loss = nft_loss(velocity, *others, sigma, advantages, beta=beta, advantage_range=advantage_range)
    exact = velocity.detach().double().requires_grad_()
    expected = reference_nft(exact, *others, sigma, advantages, beta, advantage_range)
    assert loss.shape == (3,)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    assert_same_gradient(loss.sum(), velocity, expected.sum(), exact)


def test_nft_by_hand():
    """One element: v = 2, v_old = 1, noise - clean = 3, σ = .5. x̂0 errors: .5 and 1.5; loss = .5·r + 1.5·(1 - r)."""
    tensors = (torch.tensor([[value]]) for value in (2.0, 1.0, 0.0, 3.0))
    loss = nft_loss(*tensors, 0.5, torch.tensor([1.0]), advantage_range=2.0)
    assert loss.item() == pytest.approx(2.0 * (0.75 * 0.5 + 0.25 * 1.5))


@settings(deadline=None)
@given(SEEDS, st.floats(0.0625, 2, width=32), st.floats(0.25, 8, width=32))
def test_nft_starts_as_the_clipped_advantage_times_flow_matching(seed, beta, advantage_range):
    """At v = v_old: (2r - 1)·advantage_range = clip(A), so neither the range nor beta changes a step's size."""
    velocity, old, clean, noise, advantages = batch(seed, change=0.0)
    loss = nft_loss(velocity, old, clean, noise, 0.7, advantages, beta=beta, advantage_range=advantage_range)
    exact = velocity.detach().double().requires_grad_()
    error = (noise - clean).double() - exact
    normalised = 0.7 * mean(error**2) / mean(error.detach().abs())
    clipped = advantages.clamp(-advantage_range, advantage_range).double()
    assert_same_gradient(loss.sum(), velocity, (clipped * normalised).sum(), exact, rtol=1e-3)


def test_nft_of_a_sample_without_advantage_pulls_back_to_the_old_velocity():
    velocity, old, clean, noise, _ = batch(0, change=0.1)
    gradient = torch.autograd.grad(nft_loss(velocity, old, clean, noise, 0.7, torch.zeros(3)).sum(), velocity)[0]
    assert (mean(gradient * (velocity.detach() - old)) > 0).all()
    at_old = old.clone().requires_grad_()
    gradient = torch.autograd.grad(nft_loss(at_old, old, clean, noise, 0.7, torch.zeros(3)).sum(), at_old)[0]
    assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("beta", [0.25, 1.0, 2.0])
def test_the_smaller_beta_the_further_the_optimum(beta):
    """One velocity for many samples of one x_σ: the gradient vanishes at v_old + 2/β·E[r·(noise - clean - v_old)].

    Exactly so without the division by the error; with it nearly, as 1,000 elements make that the same for every sample.
    """
    samples, elements = 400, 1000
    clean, noise, advantages = randn(0, samples, elements), torch.zeros(samples, elements), randn(1, samples)
    old = (noise - clean).mean(0)
    share = (1 + advantages.clamp(-2, 2) / 2) / 2
    optimum = old + 2 / beta * (share[:, None] * (noise - clean - old)).mean(0)

    def gradient_at(velocity):
        velocity = velocity.clone().requires_grad_()
        pair = (v.expand(samples, elements) for v in (velocity, old))
        loss = nft_loss(*pair, clean, noise, 0.7, advantages, beta=beta, advantage_range=2.0)
        return torch.autograd.grad(loss.mean(), velocity)[0].norm()

    assert gradient_at(optimum) < 0.03 * gradient_at(old)
    assert gradient_at(2 * optimum - old) > 0.9 * gradient_at(old)


def test_nft_gives_the_old_velocity_and_the_advantages_no_gradient():
    tensors = [tensor.detach().requires_grad_() for tensor in batch(0)]
    velocity, old, clean, noise, advantages = tensors
    nft_loss(velocity, old, clean, noise, 0.5, advantages).sum().backward()
    assert velocity.grad is not None
    assert old.grad is None
    assert advantages.grad is None


def test_nft_is_finite_where_a_prediction_is_exact_and_where_there_is_no_noise():
    clean, noise = randn(0, *SHAPE), randn(1, *SHAPE)
    for sigma in (0.0, 0.5):
        velocity = (noise - clean).requires_grad_()
        loss = nft_loss(velocity, noise - clean, clean, noise, sigma, torch.ones(3))
        assert loss.tolist() == [0.0, 0.0, 0.0]
        assert torch.autograd.grad(loss.sum(), velocity)[0].isfinite().all()


def test_nft_takes_one_sigma_or_one_for_each_sample():
    *tensors, advantages = batch(0)
    shared = nft_loss(*tensors, 0.25, advantages)
    for sigma in (torch.tensor(0.25), torch.full((3,), 0.25), torch.full((3, 1, 1, 1, 1), 0.25)):
        assert torch.equal(nft_loss(*tensors, sigma, advantages), shared)


# ---- awm_loss


def reference_awm(velocity, old_velocity, clean, noise, advantages, weights, low, high):
    """Matching errors as log-probabilities, PPO's surrogate on their ratio, one sample at a time in float64."""
    target = noise.double() - clean.double()
    total = 0
    for i in range(len(velocity)):
        log_prob = -weights[i].double() * ((velocity[i] - target[i]) ** 2).mean()
        old_log_prob = -weights[i].double() * ((old_velocity[i].double() - target[i]) ** 2).mean()
        ratio = torch.exp(log_prob - old_log_prob)
        advantage = advantages[i].double()
        total = total - torch.minimum(advantage * ratio, advantage * torch.clip(ratio, low, high))
    return total / len(velocity)


@settings(deadline=None)
@given(SEEDS, st.floats(0.0625, 0.9375), st.none() | st.floats(0.0625, 2), st.booleans(), st.sampled_from([0.01, 0.2]))
def test_awm_loss_and_gradient_match_the_definition(seed, epsilon, epsilon_high, weighted, change):
    velocity, *others, advantages = batch(seed, change=change)
    weights = randn(seed + 5, 3).abs() if weighted else None
    policy = awm_loss(velocity, *others, advantages, epsilon=epsilon, epsilon_high=epsilon_high, weights=weights)
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    exact = velocity.detach().double().requires_grad_()
    expected = reference_awm(exact, *others, advantages, torch.ones(3) if weights is None else weights, low, high)
    torch.testing.assert_close(policy.loss.double(), expected, rtol=1e-4, atol=1e-5)
    if torch.minimum((policy.ratio - low).abs(), (policy.ratio - high).abs()).min() > 1e-4:
        (gradient,) = torch.autograd.grad(policy.loss, velocity)
        (expected_gradient,) = torch.autograd.grad(expected, exact)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-5)


@settings(deadline=None)
@given(SEEDS, st.booleans())
def test_awm_starts_at_ratio_one_as_advantage_times_flow_matching(seed, weighted):
    velocity, old, clean, noise, advantages = batch(seed, change=0.0)
    weights = randn(seed + 5, 3).abs() if weighted else None
    policy = awm_loss(velocity, old, clean, noise, advantages, epsilon=1e-4, weights=weights)
    assert torch.equal(policy.ratio, torch.ones(3))
    assert not (policy.clipped_low | policy.clipped_high).any()
    exact = velocity.detach().double().requires_grad_()
    error = mean((exact - (noise - clean).double()) ** 2)
    expected = (advantages.double() * (1 if weights is None else weights.double()) * error).mean()
    assert_same_gradient(policy.loss, velocity, expected, exact)


def test_awm_clips_what_has_moved_its_own_way():
    """Sample 0 moves towards its target (ratio > 1), sample 1 away from it."""
    clean, noise, old = torch.zeros(2, 4), torch.ones(2, 4), torch.zeros(2, 4)
    velocity = torch.tensor([[0.5], [-0.5]]).expand(2, 4).clone().requires_grad_()
    advantages = torch.tensor([1.0, -1.0])
    policy = awm_loss(velocity, old, clean, noise, advantages, epsilon=0.1)
    torch.testing.assert_close(policy.ratio, torch.tensor([1 - 0.25, 1 - 2.25]).exp())
    assert policy.clipped_high.tolist() == [True, False]
    assert policy.clipped_low.tolist() == [False, True]
    assert not torch.autograd.grad(policy.loss, velocity)[0].any()
    policy = awm_loss(velocity, old, clean, noise, -advantages, epsilon=0.1)
    assert torch.autograd.grad(policy.loss, velocity)[0].all()


def test_awm_ratio_sinks_with_any_change_of_the_velocity():
    """A change blind to the target: the log-ratio sinks by w·mean((v - v_old)²), as on video under grpo_loss."""
    clean, noise, old = (randn(seed, 16, 50_000) for seed in range(3))
    change, weights = 0.1 * randn(3, 16, 50_000), torch.full((16,), 0.5)
    policy = awm_loss(old + change, old, clean, noise, torch.ones(16), epsilon=0.1, weights=weights)
    assert policy.ratio.log().mean().item() == pytest.approx(-0.5 * 0.1**2, rel=0.1)


def test_awm_gives_only_the_velocity_a_gradient():
    velocity, old, *others = batch(0)
    old.requires_grad_()
    policy = awm_loss(velocity, old, *others, epsilon=0.5)
    policy.loss.backward()
    assert velocity.grad is not None
    assert old.grad is None
    assert not policy.ratio.requires_grad


# ---- rwr_loss


@settings(deadline=None)
@given(SEEDS, st.floats(0.125, 4, width=32))
def test_rwr_loss_and_gradient_match_the_formula(seed, temperature):
    velocity, _, clean, noise, advantages = batch(seed)
    loss = rwr_loss(velocity, clean, noise, advantages, temperature=temperature)
    exact = velocity.detach().double().requires_grad_()
    weights = torch.exp(advantages.double() / temperature)
    expected = weights / weights.mean() * mean((exact - (noise - clean).double()) ** 2)
    assert loss.shape == (3,)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    assert_same_gradient(loss.sum(), velocity, expected.sum(), exact)


@pytest.mark.parametrize("advantage", [-5.0, 0.0, 5.0])
def test_rwr_of_equal_advantages_is_flow_matching(advantage):
    velocity, _, clean, noise, _ = batch(0)
    loss = rwr_loss(velocity, clean, noise, torch.full((3,), advantage), temperature=0.1)
    torch.testing.assert_close(loss, flow_matching_loss(velocity, clean, noise))


def test_rwr_never_pushes_away_and_at_low_temperature_keeps_only_the_best():
    velocity, _, clean, noise, _ = batch(0)
    loss = rwr_loss(velocity, clean, noise, torch.tensor([-3.0, 3.0, 1.0]), temperature=1e-3)
    assert loss[[0, 2]].tolist() == [0.0, 0.0]
    torch.testing.assert_close(loss[1], 3 * flow_matching_loss(velocity, clean, noise)[1])
    assert (rwr_loss(velocity, clean, noise, torch.tensor([-3.0, 3.0, 1.0])) > 0).all()


def test_rwr_in_micro_batches_is_rwr_of_all():
    velocity, _, clean, noise, advantages = batch(0)
    whole = rwr_loss(velocity, clean, noise, advantages, temperature=0.5)
    for row in range(len(velocity)):
        one = slice(row, row + 1)
        part = rwr_loss(velocity[one], clean[one], noise[one], advantages[one], temperature=0.5, compared=advantages)
        torch.testing.assert_close(part, whole[one])


def test_rwr_weights_have_no_gradient():
    velocity, _, clean, noise, advantages = batch(0)
    advantages.requires_grad_()
    rwr_loss(velocity, clean, noise, advantages).sum().backward()
    assert velocity.grad is not None
    assert advantages.grad is None


def test_rwr_in_a_batch_of_one_forgets_the_advantage():
    velocity, _, clean, noise, _ = batch(0, (1, 8))
    for advantage in (-5.0, 5.0):
        loss = rwr_loss(velocity, clean, noise, torch.tensor([advantage]))
        assert torch.equal(loss, flow_matching_loss(velocity, clean, noise))


# ---- velocity_kl


def test_velocity_kl_is_the_mean_square_and_moves_only_the_velocity():
    velocity, reference = randn(0, 2, 8).requires_grad_(), randn(1, 2, 8)
    kl = velocity_kl(velocity, reference)
    torch.testing.assert_close(kl.double(), mean((velocity.double() - reference.double()) ** 2))
    (gradient,) = torch.autograd.grad(kl.sum(), velocity)
    torch.testing.assert_close(gradient, 2 * (velocity.detach() - reference) / 8)
    assert velocity_kl(velocity, velocity.detach()).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde", "cps"])
def test_velocity_kl_is_a_steps_kl_up_to_the_gradient_scale(name):
    sample, velocity, reference, noise = (randn(seed, 2, 3, 4) for seed in range(4))
    kernel = get_kernel(name)
    step, other = (kernel.step(sample, v, 0.8, 0.7, noise=noise) for v in (velocity, reference))
    expected = kernel.gradient_scale(0.8, 0.7) ** 2 / 2 * velocity_kl(velocity, reference)
    torch.testing.assert_close(gaussian_kl(step.mean, other.mean, step.std), expected, rtol=1e-4, atol=0)


# ---- low precision, and what goes wrong


def losses_of(velocity, old, clean, noise, advantages):
    """Every loss of own samples, [3] or []."""
    return [
        nft_loss(velocity, old, clean, noise, 0.7, advantages),
        awm_loss(velocity, old, clean, noise, advantages, epsilon=0.5, weights=torch.ones(3, dtype=clean.dtype)).loss,
        rwr_loss(velocity, clean, noise, advantages),
        velocity_kl(velocity, old),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_maths_is_float32_whatever_comes_in(dtype):
    low = [tensor.detach().to(dtype) for tensor in batch(0)]
    for actual, expected in zip(losses_of(*low), losses_of(*(t.float() for t in low)), strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


def test_autocast_does_not_lower_the_maths():
    tensors = batch(0)
    expected = losses_of(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        actual = losses_of(*tensors)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_shapes_that_would_broadcast_are_refused():
    velocity, old, clean, noise, advantages = (tensor.detach() for tensor in batch(0))
    for bad in (
        (velocity, old[:1], clean, noise),
        (velocity, old, clean[:, :1], noise),
        (velocity, old, clean, old[0]),
    ):
        with pytest.raises(ValueError, match="velocity, old_velocity, clean, noise have different shapes"):
            nft_loss(*bad, 0.5, advantages)
        with pytest.raises(ValueError, match="velocity, old_velocity, clean, noise have different shapes"):
            awm_loss(*bad, advantages, epsilon=0.1)
    with pytest.raises(ValueError, match="velocity, clean, noise have different shapes"):
        rwr_loss(velocity, clean, noise[:1], advantages)
    with pytest.raises(ValueError, match="velocity, ref_velocity have different shapes"):
        velocity_kl(velocity, old[:1])
    for bad in (advantages[:1], advantages[:, None], advantages[0]):
        with pytest.raises(ValueError, match=r"advantages must be \[B\], \[3\]"):
            nft_loss(velocity, old, clean, noise, 0.5, bad)
        with pytest.raises(ValueError, match=r"advantages must be \[B\], \[3\]"):
            awm_loss(velocity, old, clean, noise, bad, epsilon=0.1)
        with pytest.raises(ValueError, match=r"advantages must be \[B\], \[3\]"):
            rwr_loss(velocity, clean, noise, bad)
        with pytest.raises(ValueError, match=r"weights must be \[B\], \[3\]"):
            awm_loss(velocity, old, clean, noise, advantages, epsilon=0.1, weights=bad)
    with pytest.raises(ValueError, match="sigma must be one value"):
        nft_loss(velocity, old, clean, noise, torch.tensor([0.5, 0.5]), advantages)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_a_value_must_be_a_finite_number_above_zero(value):
    *tensors, advantages = batch(0)
    with pytest.raises(ValueError, match="beta must be a finite number above 0"):
        nft_loss(*tensors, 0.5, advantages, beta=value)
    with pytest.raises(ValueError, match="advantage_range must be a finite number above 0"):
        nft_loss(*tensors, 0.5, advantages, advantage_range=value)
    with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
        rwr_loss(tensors[0], *tensors[2:], advantages, temperature=value)


@pytest.mark.parametrize("epsilon, epsilon_high", [(0.0, None), (1.0, None), (0.1, 0.0)])
def test_a_clip_range_out_of_range(epsilon, epsilon_high):
    with pytest.raises(ValueError, match="epsilon must be in"):
        awm_loss(*batch(0), epsilon=epsilon, epsilon_high=epsilon_high)
