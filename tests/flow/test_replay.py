"""A stored step, scored again: the same log-probability bit for bit, in float32, of the latent that was stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editrl.flow import get_kernel, sigma_schedule

STOCHASTIC = ["flow_sde", "dance_sde", "cps"]
EVERY_KERNEL = [*STOCHASTIC, "ode"]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def latents(seed, shape=(3, 4, 2, 5, 6)):
    """sample, velocity, noise; B, C, F, H, W."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


@settings(deadline=None)
@given(
    st.sampled_from(STOCHASTIC),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.integers(0, 2**16),
    st.integers(0, 14),
)
def test_replay_returns_the_same_transition_bit_for_bit(name, dtype, seed, index):
    sigmas = sigma_schedule(16, 5.0)
    x, v, noise = latents(seed)
    x = x.to(dtype)
    kernel = get_kernel(name)
    drawn = kernel.step(x, v, sigmas[index], sigmas[index + 1], noise=noise)
    replayed = kernel.step(x, v, sigmas[index], sigmas[index + 1], next_sample=drawn.next_sample)
    assert drawn.next_sample.dtype == dtype
    for one, other in zip(drawn, replayed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_replay_is_exact_in_any_micro_batch_and_for_any_form_of_sigma(name, device):
    x, v, noise = (tensor.to(device) for tensor in latents(3, (7, 4, 3, 16, 16)))
    sigmas = sigma_schedule(16, 5.0)
    kernel = get_kernel(name)
    drawn = kernel.step(x, v, sigmas[3], sigmas[4], noise=noise)
    for rows in ([0], [6, 2], [5, 4, 3]):
        levels = [torch.full((len(rows),), level.item()) for level in sigmas[3:5]]
        for sigma, sigma_next in ((sigmas[3], sigmas[4]), (sigmas[3].item(), sigmas[4].item()), levels):
            replayed = kernel.step(x[rows], v[rows], sigma, sigma_next, next_sample=drawn.next_sample[rows])
            assert torch.equal(replayed.log_prob, drawn.log_prob[rows])


def test_replay_is_exact_where_a_single_video_is_summed_by_several_threads():
    """A float32 mean over one long row is split between threads, over eight rows it is not: half of them differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        x, v, noise = latents(3, (8, 100_000))
        drawn = get_kernel("flow_sde").step(x, v, 0.8, 0.7, noise=noise)
        for i in range(8):
            row = slice(i, i + 1)
            replayed = get_kernel("flow_sde").step(x[row], v[row], 0.8, 0.7, next_sample=drawn.next_sample[row])
            assert torch.equal(replayed.log_prob, drawn.log_prob[row])
    finally:
        torch.set_num_threads(threads)


@needs_cuda
def test_a_step_does_not_wait_for_the_gpu_when_sigmas_are_on_the_cpu():
    x, v, noise = (tensor.cuda() for tensor in latents(3))
    levels = torch.full((3,), 0.8), torch.full((3,), 0.7)
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = get_kernel("flow_sde").step(x, v, *levels, noise=noise)
        replayed = get_kernel("flow_sde").step(x, v, 0.8, 0.7, next_sample=drawn.next_sample)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert drawn.log_prob.is_cuda and replayed.log_prob.is_cuda


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounded_next_sample_is_the_one_that_is_scored(dtype):
    x, v, noise = latents(4)
    kernel = get_kernel("dance_sde", eta=0.05)  # so little noise that the rounding is a visible part of it
    x = x.to(dtype)
    drawn = kernel.step(x, v, 0.8, 0.79, noise=noise)
    unrounded = drawn.mean + drawn.std * noise
    density = torch.distributions.Normal(drawn.mean.double(), drawn.std.double())
    rounded_score = density.log_prob(unrounded.to(dtype).double()).flatten(1).mean(1)
    unrounded_score = density.log_prob(unrounded.double()).flatten(1).mean(1)
    torch.testing.assert_close(drawn.log_prob.double(), rounded_score, rtol=1e-6, atol=1e-6)
    assert (drawn.log_prob.double() - unrounded_score).abs().min() > 1e-4
    replayed = kernel.step(x, v, 0.8, 0.79, next_sample=unrounded)
    assert torch.equal(replayed.log_prob, drawn.log_prob)


@pytest.mark.parametrize("name", EVERY_KERNEL)
def test_maths_is_float32_whatever_comes_in(name):
    x, v, noise = (tensor.bfloat16() for tensor in latents(5))
    low = get_kernel(name).step(x, v, 0.8, 0.7, noise=noise)
    full = get_kernel(name).step(x.float(), v.float(), 0.8, 0.7, noise=noise.float())
    assert low.mean.dtype == low.std.dtype == low.log_prob.dtype == torch.float32
    assert torch.equal(low.mean, full.mean)
    assert torch.equal(low.next_sample, full.next_sample.bfloat16())


def test_autocast_does_not_lower_the_maths():
    x, v, noise = latents(6)
    kernel = get_kernel("flow_sde")
    expected = kernel.step(x, v, 0.8, 0.7, noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        actual = kernel.step(x, v, 0.8, 0.7, noise=noise)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)
