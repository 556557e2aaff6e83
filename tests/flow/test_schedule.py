"""sigma_schedule: float32, 1.0 ... 0.0, shifted exactly once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editrl.flow import sigma_schedule

SHIFTS = st.floats(0.1, 50)


@settings(deadline=None)
@given(st.integers(1, 200), SHIFTS)
def test_matches_the_formula_in_float64(num_steps, shift):
    sigmas = sigma_schedule(num_steps, shift)
    expected = []
    for i in range(num_steps + 1):
        u = 1 - i / num_steps
        expected.append(shift * u / (1 + (shift - 1) * u))
    torch.testing.assert_close(sigmas.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)


@settings(deadline=None)
@given(st.integers(1, 200), SHIFTS)
def test_runs_from_exactly_one_down_to_exactly_zero(num_steps, shift):
    sigmas = sigma_schedule(num_steps, shift)
    assert sigmas.dtype == torch.float32
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_shift_one_is_a_uniform_grid():
    assert sigma_schedule(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_larger_shift_stays_longer_at_high_noise():
    assert (sigma_schedule(16, 7.0)[1:-1] > sigma_schedule(16, 5.0)[1:-1]).all()


def test_the_timestep_of_a_known_schedule():
    """The value that a bfloat16 sigma would turn into 988.28."""
    assert (sigma_schedule(16, 5.0)[1] * 1000).item() == pytest.approx(986.8421, abs=1e-3)


@pytest.mark.parametrize("num_steps", [0, -1, 2.5, True, "10"])
def test_rejects_a_step_count_that_is_not_a_positive_whole_number(num_steps):
    with pytest.raises(ValueError, match="num_steps must be a whole number"):
        sigma_schedule(num_steps)


@pytest.mark.parametrize("shift", [0, -1.0, float("nan"), float("inf"), "5", True])
def test_rejects_a_shift_that_is_not_a_positive_number(shift):
    with pytest.raises(ValueError, match="shift must be a finite number"):
        sigma_schedule(10, shift)
