"""Transition kernels against float64 references written from the formulas (replaying them: test_replay.py)."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editrl.flow import get_kernel, sigma_schedule

STOCHASTIC = ["flow_sde", "dance_sde", "cps"]
EVERY_KERNEL = [*STOCHASTIC, "ode"]
VIDEO = (3, 4, 2, 5, 6)  # B, C, F, H, W


def sde_mean_and_std(x, v, sigma, sigma_next, s):
    dt = sigma_next - sigma
    mean = x * (1 + s**2 * dt / (2 * sigma)) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, s * math.sqrt(-dt)


def reference(name, parameter, x, v, sigma, sigma_next):
    """(mean, std) as the papers write them, in Python floats and float64 tensors."""
    if name == "ode":
        return x + v * (sigma_next - sigma), 0.0
    if name == "dance_sde":
        return sde_mean_and_std(x, v, sigma, sigma_next, parameter)
    if name == "flow_sde":
        clean_share = 1 - (sigma_next if sigma == 1 else sigma)
        return sde_mean_and_std(x, v, sigma, sigma_next, parameter * math.sqrt(sigma / clean_share))
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    std = sigma_next * math.sin(parameter * math.pi / 2)
    return clean * (1 - sigma_next) + noise * math.sqrt(sigma_next**2 - std**2), std


def latents(seed, shape=VIDEO):
    """sample, velocity, noise."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


@st.composite
def steps(draw):
    """A kernel, its parameter and one step, float32 values so that the reference sees the same numbers."""
    name = draw(st.sampled_from(EVERY_KERNEL))
    sigma = draw(st.one_of(st.just(1.0), st.floats(0.015625, 0.9921875, width=32)))
    fraction = draw(st.floats(0.03125, 0.96875, width=32))
    sigma_next = torch.tensor(sigma * fraction, dtype=torch.float32).item()
    parameter = draw(st.floats(0.125, 0.875))
    return name, parameter, sigma, sigma_next


def build(name, parameter):
    key = {"flow_sde": "noise_level", "cps": "noise_level", "dance_sde": "eta"}.get(name)
    return get_kernel(name, **{key: parameter} if key else {})


# ---- the step itself


@settings(deadline=None)
@given(steps(), st.integers(0, 2**16))
def test_mean_std_and_draw_follow_the_formula(step, seed):
    name, parameter, sigma, sigma_next = step
    x, v, noise = latents(seed, (2, 3, 4))
    transition = build(name, parameter).step(x, v, sigma, sigma_next, noise=noise)
    mean, std = reference(name, parameter, x.double(), v.double(), sigma, sigma_next)
    size = mean.abs().max().item() + x.abs().max().item() + std
    torch.testing.assert_close(transition.mean.double(), mean, rtol=1e-5, atol=1e-5 * size)
    assert transition.std.item() == pytest.approx(std, rel=1e-5)
    expected = mean + std * noise.double()
    torch.testing.assert_close(transition.next_sample.double(), expected, rtol=1e-5, atol=1e-5 * size)


@settings(deadline=None)
@given(steps(), st.integers(0, 2**16))
def test_log_prob_is_the_mean_gaussian_log_density(step, seed):
    name, parameter, sigma, sigma_next = step
    x, v, noise = latents(seed, (2, 3, 4))
    transition = build(name, parameter).step(x, v, sigma, sigma_next, noise=noise)
    if name == "ode":
        assert transition.log_prob.tolist() == [0.0, 0.0]
        return
    density = torch.distributions.Normal(transition.mean.double(), transition.std.double())
    expected = density.log_prob(transition.next_sample.double()).mean(dim=(1, 2))
    assert transition.log_prob.dtype == torch.float32
    torch.testing.assert_close(transition.log_prob.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_drawn_noise_has_the_reported_std(name):
    x, v, noise = latents(0, (4, 50_000))
    transition = get_kernel(name).step(x, v, 0.8, 0.7, noise=noise)
    drawn = (transition.next_sample - transition.mean).std(dim=1)
    torch.testing.assert_close(drawn, transition.std.expand(4), rtol=0.02, atol=0)


def test_dance_equals_flow_where_their_noise_agrees():
    """s(σ) = a·sqrt(σ/(1-σ)) is eta at σ = eta²/(a² + eta²)."""
    a, eta = 0.7, 0.4
    sigma = eta**2 / (a**2 + eta**2)
    x, v, noise = latents(1)
    flow = get_kernel("flow_sde", noise_level=a).step(x, v, sigma, 0.6 * sigma, noise=noise)
    dance = get_kernel("dance_sde", eta=eta).step(x, v, sigma, 0.6 * sigma, noise=noise)
    for one, other in zip(flow, dance, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_flow_sde_borrows_sigma_next_at_pure_noise():
    kernel = get_kernel("flow_sde", noise_level=0.7)
    assert kernel.std(1.0, 0.9).item() == pytest.approx(0.7 * math.sqrt(1 / 0.1) * math.sqrt(0.1), rel=1e-6)
    x, v, noise = latents(2)
    assert all(field.isfinite().all() for field in kernel.step(x, v, 1.0, 0.9, noise=noise))
    assert kernel.std(torch.tensor([1.0, 0.9]), torch.tensor([0.9, 0.8])).tolist() == [
        kernel.std(1.0, 0.9).item(),
        kernel.std(0.9, 0.8).item(),
    ]


@given(noise_level=st.floats(0.01, 1), sigma=st.floats(0.1, 1), fraction=st.floats(0.05, 0.95))
@settings(deadline=None)
def test_cps_keeps_the_noise_level(noise_level, sigma, fraction):
    """With x̂0 = 0 and x̂1 = 1 the mean is the kept noise: kept² + std² = σ_next²."""
    sigma_next = sigma * fraction
    sample, velocity = torch.full((1, 1), sigma), torch.ones(1, 1)
    kernel = get_kernel("cps", noise_level=noise_level)
    mean, std = kernel.step(sample, velocity, sigma, sigma_next, noise=torch.zeros(1, 1))[1:3]
    assert mean.item() ** 2 + std.item() ** 2 == pytest.approx(sigma_next**2, rel=1e-4)


# ---- marginals: x0 ~ N(m, c²), whose exact velocity is known

M, C = 1.5, 0.5


def end_of_simulation(name, num_steps, samples=20_000):
    """(mean, std) at σ = 0 after integrating the exact velocity of the toy problem at shift 5."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, generator=generator)
    kernel = get_kernel(name)
    sigmas = sigma_schedule(num_steps, 5.0)
    for sigma, sigma_next in pairwise(sigmas):
        surprise = (x - (1 - sigma) * M) / ((1 - sigma) ** 2 * C**2 + sigma**2)
        velocity = sigma * surprise - (M + (1 - sigma) * C**2 * surprise)  # E[noise | x] - E[x0 | x]
        x = kernel.step(x, velocity, sigma, sigma_next, noise=torch.randn(samples, generator=generator)).next_sample
    return x.mean().item(), x.std().item()


@pytest.mark.parametrize("name, at_100", [("flow_sde", 0.486), ("dance_sde", 0.480), ("ode", 0.478)])
def test_marginals_are_kept_as_steps_get_small(name, at_100):
    mean, coarse = end_of_simulation(name, 100)
    assert coarse == pytest.approx(at_100, abs=0.008)
    mean, fine = end_of_simulation(name, 400)
    assert mean == pytest.approx(M, abs=0.015)
    assert fine == pytest.approx(C, abs=0.012)
    assert abs(fine - C) < abs(coarse - C)


@pytest.mark.parametrize("num_steps, at_the_end", [(100, 0.380), (400, 0.395), (1600, 0.401)])
def test_cps_does_not_keep_the_marginals_however_small_the_steps(num_steps, at_the_end):
    mean, std = end_of_simulation("cps", num_steps)
    assert mean == pytest.approx(M, abs=0.015)
    assert std == pytest.approx(at_the_end, abs=0.008)


def test_marginals_at_every_noise_level_between():
    """x_σ ~ N((1-σ)m, (1-σ)²c² + σ²) all along, not only at the end."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20_000, generator=generator)
    kernel = get_kernel("flow_sde")
    sigmas = sigma_schedule(400, 5.0)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        surprise = (x - (1 - sigma) * M) / ((1 - sigma) ** 2 * C**2 + sigma**2)
        velocity = sigma * surprise - (M + (1 - sigma) * C**2 * surprise)
        x = kernel.step(x, velocity, sigma, sigma_next, noise=torch.randn(20_000, generator=generator)).next_sample
        if i % 100 == 99 and i < 399:
            assert x.mean().item() == pytest.approx(((1 - sigma_next) * M).item(), abs=0.02)
            assert x.std().item() == pytest.approx(
                ((1 - sigma_next) ** 2 * C**2 + sigma_next**2).sqrt().item(), abs=0.02
            )


# ---- shapes of sigma


@pytest.mark.parametrize("name", EVERY_KERNEL)
def test_a_sigma_per_sample_is_the_same_as_one_step_each(name):
    x, v, noise = latents(7)
    sigma, sigma_next = torch.tensor([1.0, 0.7, 0.2]), torch.tensor([0.9, 0.5, 0.1])
    kernel = get_kernel(name)
    batch = kernel.step(x, v, sigma, sigma_next, noise=noise)
    assert batch.std.shape == (3, 1, 1, 1, 1)
    assert kernel.std(sigma, sigma_next).shape == (3,)
    for i in range(3):
        single = kernel.step(x[i : i + 1], v[i : i + 1], sigma[i].item(), sigma_next[i].item(), noise=noise[i : i + 1])
        assert single.std.shape == ()
        assert torch.equal(single.next_sample[0], batch.next_sample[i])
        assert torch.equal(single.log_prob[0], batch.log_prob[i])


def test_one_sigma_may_be_shared():
    x, v, noise = latents(8)
    both = get_kernel("flow_sde").step(x, v, torch.full((3,), 0.5), torch.full((3,), 0.25), noise=noise)
    mixed = get_kernel("flow_sde").step(x, v, torch.full((3,), 0.5), 0.25, noise=noise)
    assert torch.equal(both.next_sample, mixed.next_sample)


# ---- gradients


@pytest.mark.parametrize("name", STOCHASTIC)
def test_gradient_of_log_prob_is_g_times_the_noise(name):
    """∂log_prob/∂v = -g·noise/D, which is what gradient_scale promises; drawing must not cancel it."""
    x, v, noise = latents(9)
    v.requires_grad_()
    kernel = get_kernel(name)
    drawn = kernel.step(x, v, 0.8, 0.7, noise=noise)
    replayed = kernel.step(x, v, 0.8, 0.7, next_sample=drawn.next_sample.detach())
    for transition in (drawn, replayed):
        (gradient,) = torch.autograd.grad(transition.log_prob.sum(), v)
        expected = -kernel.gradient_scale(0.8, 0.7) * noise / noise[0].numel()
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["ode", "cps"])
def test_a_step_without_noise_does_not_spoil_gradients(name):
    x, v, noise = latents(10)
    v.requires_grad_()
    transition = get_kernel(name).step(x, v, 0.2, 0.0, noise=noise)
    assert torch.equal(transition.next_sample, transition.mean)
    assert transition.log_prob.tolist() == [0.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(transition.log_prob.sum() + transition.mean.sum(), v)
    assert gradient.isfinite().all()


def test_gradient_scale_at_the_known_schedule():
    sigmas = sigma_schedule(16, 5.0)
    flow = get_kernel("flow_sde").gradient_scale(sigmas[:-1], sigmas[1:])
    assert flow[0].item() == pytest.approx(0.019, abs=5e-4)
    assert flow[14].item() == pytest.approx(0.86, abs=5e-3)
    dance = get_kernel("dance_sde").gradient_scale(sigmas[:-1], sigmas[1:])
    assert (dance[14] / dance[0]).item() == pytest.approx(3.7, abs=0.05)


# ---- what goes wrong, said clearly


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_kernel_takes_exactly_one_of_noise_and_next_sample(name):
    x, v, noise = latents(11)
    with pytest.raises(ValueError, match=f"{name} is stochastic"):
        get_kernel(name).step(x, v, 0.8, 0.7)
    with pytest.raises(ValueError, match="not both"):
        get_kernel(name).step(x, v, 0.8, 0.7, noise=noise, next_sample=noise)


def test_the_ode_needs_neither_and_ignores_noise():
    x, v, noise = latents(12)
    plain = get_kernel("ode").step(x, v, 0.8, 0.7)
    assert torch.equal(plain.next_sample, get_kernel("ode").step(x, v, 0.8, 0.7, noise=noise).next_sample)
    assert plain.std == 0


@pytest.mark.parametrize("name, sigma, sigma_next", [("ode", 0.8, 0.7), ("cps", 0.2, 0.0)])
def test_a_step_of_std_zero_cannot_be_scored(name, sigma, sigma_next):
    x, v, _ = latents(13)
    with pytest.raises(ValueError, match=f"{name} has std 0 at the step {sigma:g} -> {sigma_next:g}"):
        get_kernel(name).step(x, v, sigma, sigma_next, next_sample=x)
    with pytest.raises(ValueError, match="cannot be trained"):
        get_kernel(name).gradient_scale(sigma, sigma_next)


def test_one_row_of_std_zero_is_enough():
    x, v, _ = latents(14)
    with pytest.raises(ValueError, match="cps has std 0"):
        get_kernel("cps").step(x, v, 0.2, torch.tensor([0.1, 0.0, 0.1]), next_sample=x)


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde"])
def test_the_last_step_of_an_sde_can_be_scored(name):
    x, v, noise = latents(15)
    drawn = get_kernel(name).step(x, v, 0.2, 0.0, noise=noise)
    assert drawn.std > 0
    assert torch.equal(get_kernel(name).step(x, v, 0.2, 0.0, next_sample=drawn.next_sample).log_prob, drawn.log_prob)


@pytest.mark.parametrize("sigma, sigma_next", [(0.5, 0.5), (0.5, 0.6), (1.1, 0.5), (0.5, -0.1), (float("nan"), 0.5)])
def test_sigmas_out_of_order_or_range(sigma, sigma_next):
    x, v, noise = latents(16)
    with pytest.raises(ValueError, match="1 >= sigma > sigma_next >= 0"):
        get_kernel("flow_sde").step(x, v, sigma, sigma_next, noise=noise)


def test_wrong_shapes_are_named():
    x, v, noise = latents(17)
    kernel = get_kernel("flow_sde")
    with pytest.raises(ValueError, match="velocity has shape"):
        kernel.step(x, v[:1], 0.8, 0.7, noise=noise)
    with pytest.raises(ValueError, match="noise has shape"):
        kernel.step(x, v, 0.8, 0.7, noise=noise[:1])
    with pytest.raises(ValueError, match="next_sample has shape"):
        kernel.step(x, v, 0.8, 0.7, next_sample=noise[..., :1])
    with pytest.raises(ValueError, match="2 samples, but there are 3"):
        kernel.step(x, v, torch.tensor([0.8, 0.8]), 0.7, noise=noise)
    with pytest.raises(ValueError, match=r"0-d or \[B\]"):
        kernel.step(x, v, torch.full((3, 1), 0.8), 0.7, noise=noise)


def test_an_unknown_kernel_comes_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"unknown kernel 'flow_sd'\. Did you mean 'flow_sde'.*dance_sde"):
        get_kernel("flow_sd")
    with pytest.raises(ValueError, match=r"unknown kernel 'zzz'\. Known"):
        get_kernel("zzz")


def test_an_unknown_parameter_comes_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'flow_sde' has no parameter 'noise_levl'\. Did you mean 'noise_level'"):
        get_kernel("flow_sde", noise_levl=0.7)
    with pytest.raises(ValueError, match=r"'dance_sde' has no parameter 'noise_level'\. It takes: eta"):
        get_kernel("dance_sde", noise_level=0.7)
    with pytest.raises(ValueError, match="It takes none"):
        get_kernel("ode", eta=0.7)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "0.7", None, True])
def test_a_parameter_must_be_a_positive_number(value):
    for name, parameter in (("flow_sde", "noise_level"), ("dance_sde", "eta"), ("cps", "noise_level")):
        with pytest.raises(ValueError, match=f"{name}: {parameter} must be a finite number above 0"):
            get_kernel(name, **{parameter: value})


def test_cps_noise_level_ends_at_one():
    get_kernel("cps", noise_level=1.0)
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        get_kernel("cps", noise_level=1.1)


def test_kernels_are_values():
    assert get_kernel("flow_sde") == get_kernel("flow_sde", noise_level=0.7)
    assert get_kernel("flow_sde") != get_kernel("flow_sde", noise_level=0.8)
    with pytest.raises(AttributeError):
        get_kernel("flow_sde").noise_level = 1.0
