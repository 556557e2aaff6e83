"""dpm2_step against diffusers' scheduler, and on a problem whose exact solution is known."""

from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from editrl.flow import CleanPrediction, dpm2_step, get_kernel, sigma_schedule

M, C = 1.5, 0.5  # data x0 ~ N(m, c²)


def marginal_std(sigma):
    return ((1 - sigma) ** 2 * C**2 + sigma**2) ** 0.5


def exact_velocity(x, sigma):
    surprise = (x - (1 - sigma) * M) / marginal_std(sigma) ** 2
    return sigma * surprise - (M + (1 - sigma) * C**2 * surprise)  # E[noise | x] - E[x0 | x]


def exact_path(z, sigma):
    """The ODE keeps every quantile: z standard deviations from the mean at every noise level."""
    return (1 - sigma) * M + marginal_std(sigma) * z


def curved_velocity(x, sigma):
    """No linear problem, on which different solvers can agree by luck."""
    return torch.tanh(2 * x - sigma) + sigma * x.roll(1, dims=-1)


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def solve_dpm2(velocity, x, sigmas):
    previous = None
    for sigma, sigma_next in pairwise(sigmas):
        x, previous = dpm2_step(x, velocity(x, sigma), sigma, sigma_next, previous)
    return x


def solve_euler(velocity, x, sigmas):
    for sigma, sigma_next in pairwise(sigmas):
        x = get_kernel("ode").step(x, velocity(x, sigma), sigma, sigma_next).next_sample
    return x


def error(solve, sigmas):
    z = torch.linspace(-2, 2, 21)
    solved = solve(exact_velocity, exact_path(z, sigmas[0]), sigmas)
    return (solved - exact_path(z, sigmas[-1])).abs().max().item()


# ---- an independent implementation


def solve_diffusers(velocity, x, scheduler):
    path = []
    for i, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, scheduler.sigmas[i]), timestep, x).prev_sample
        path.append(x)
    return torch.stack(path)


def diffusers_scheduler(num_steps, shift):
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on NumPy 2
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 20])
@pytest.mark.parametrize("shift", [1.0, 5.0])
@pytest.mark.parametrize("from_pure_noise", [True, False])
def test_every_step_is_that_of_diffusers(num_steps, shift, from_pure_noise):
    """Also from σ = 1, where λ is -∞: diffusers' arithmetic then has the limit that we take."""
    scheduler = diffusers_scheduler(num_steps, shift)
    if from_pure_noise:
        scheduler.sigmas = sigma_schedule(num_steps, shift)
    assert (scheduler.sigmas[0] == 1) == from_pure_noise
    x = randn(0, 2, 3, 8)
    expected = solve_diffusers(curved_velocity, x, scheduler)
    previous = None
    for i, (sigma, sigma_next) in enumerate(pairwise(scheduler.sigmas)):
        x, previous = dpm2_step(x, curved_velocity(x, sigma), sigma, sigma_next, previous)
        torch.testing.assert_close(x, expected[i], rtol=1e-4, atol=1e-4)


# ---- a known solution


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("num_steps", [10, 20, 40])
def test_beats_euler_at_equal_forwards(num_steps, shift):
    sigmas = sigma_schedule(num_steps, shift)
    assert error(solve_dpm2, sigmas) < error(solve_euler, sigmas)


def test_needs_a_tenth_of_eulers_steps():
    assert error(solve_dpm2, sigma_schedule(40, 3.0)) < error(solve_euler, sigma_schedule(300, 3.0))


@pytest.mark.parametrize("first, last", [(0.9, 0.4), (0.9, 0.1)])
def test_is_of_second_order(first, last):
    """Twice the steps, a quarter of the error; half of it for Euler. Away from σ = 0 and 1, where λ is infinite."""
    grids = [torch.linspace(first, last, steps + 1) for steps in (20, 40, 80)]
    for solve, factor in ((solve_dpm2, 4), (solve_euler, 2)):
        for coarse, fine in pairwise(error(solve, sigmas) for sigmas in grids):
            assert coarse / fine == pytest.approx(factor, rel=0.1)


def test_is_of_nearly_second_order_over_a_whole_schedule():
    """log(T)/T²: at both ends the steps in λ do not get smaller with their number."""
    coarse, fine = (error(solve_dpm2, sigma_schedule(steps, 1.0)) for steps in (160, 320))
    assert 3.2 < coarse / fine < 4


# ---- first order


@settings(deadline=None)
@given(st.floats(0.0625, 1, width=32), st.floats(0, 0.9375, width=32), st.integers(0, 2**16))
def test_a_step_without_history_is_eulers(sigma, fraction, seed):
    x, velocity = randn(seed, 2, 3, 4), randn(seed + 1, 2, 3, 4)
    expected = get_kernel("ode").step(x, velocity, sigma, sigma * fraction).next_sample
    stepped, history = dpm2_step(x, velocity, sigma, sigma * fraction)
    torch.testing.assert_close(stepped, expected)
    torch.testing.assert_close(history.clean, x - sigma * velocity)
    assert history.sigma == pytest.approx(sigma)


@pytest.mark.parametrize("previous_sigma, sigma, sigma_next", [(1.0, 0.9, 0.8), (0.3, 0.2, 0.0)])
def test_a_step_after_pure_noise_and_the_last_step_are_eulers(previous_sigma, sigma, sigma_next):
    x, velocity, clean = (randn(seed, 2, 3, 4) for seed in range(3))
    stepped, _ = dpm2_step(x, velocity, sigma, sigma_next, CleanPrediction(clean, previous_sigma))
    assert torch.equal(stepped, dpm2_step(x, velocity, sigma, sigma_next)[0])


def test_a_clean_prediction_that_stays_makes_every_step_eulers():
    """A straight path: nothing to extrapolate, and one step is already exact."""
    clean, noise = randn(0, 2, 8), randn(1, 2, 8)

    def straight(x, sigma):
        return noise - clean

    for num_steps in (1, 2, 7):
        torch.testing.assert_close(solve_dpm2(straight, noise, sigma_schedule(num_steps, 3.0)), clean)


# ---- types, and what goes wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_maths_is_float32_and_the_sample_keeps_its_dtype(dtype):
    x, velocity = randn(0, 2, 8).to(dtype), randn(1, 2, 8).to(dtype)
    history = CleanPrediction(randn(2, 2, 8), 0.9)
    low, low_history = dpm2_step(x, velocity, 0.8, 0.7, history)
    full, full_history = dpm2_step(x.float(), velocity.float(), 0.8, 0.7, history)
    assert low.dtype == dtype
    assert torch.equal(low, full.to(dtype))
    assert low_history.clean.dtype == torch.float32
    assert torch.equal(low_history.clean, full_history.clean)


def test_sigmas_may_be_floats_or_tensors():
    x, velocity, history = randn(0, 2, 8), randn(1, 2, 8), CleanPrediction(randn(2, 2, 8), 0.9)
    expected = dpm2_step(x, velocity, torch.tensor(0.8), torch.tensor(0.7), history)
    assert torch.equal(dpm2_step(x, velocity, 0.8, 0.7, history)[0], expected[0])
    assert isinstance(expected[1].sigma, float)


@pytest.mark.parametrize("sigma, sigma_next", [(0.5, 0.5), (0.5, 0.6), (1.1, 0.5), (0.5, -0.1), (float("nan"), 0.5)])
def test_sigmas_out_of_order_or_range(sigma, sigma_next):
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="1 >= sigma > sigma_next >= 0"):
        dpm2_step(x, x, sigma, sigma_next)


def test_a_history_of_a_later_step_is_refused():
    x = torch.zeros(2, 8)
    for sigma in (0.8, 0.7, float("nan")):
        with pytest.raises(ValueError, match=f"previous was predicted at sigma {sigma:g}, not above 0.8"):
            dpm2_step(x, x, 0.8, 0.6, CleanPrediction(x, sigma))


def test_wrong_shapes_are_named():
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="velocity has shape"):
        dpm2_step(x, x[:1], 0.8, 0.7)
    with pytest.raises(ValueError, match=r"previous\.clean has shape"):
        dpm2_step(x, x, 0.8, 0.7, CleanPrediction(x[:1], 0.9))
    with pytest.raises(ValueError, match="one sigma for the whole batch"):
        dpm2_step(x, x, torch.tensor([0.8, 0.8]), 0.7)
