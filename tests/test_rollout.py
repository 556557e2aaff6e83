"""Noise that depends on its key alone, and rollouts that depend on nothing but their noise."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editrl.data import EditDataset
from editrl.flow import get_kernel, sigma_schedule
from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy
from editrl.policy import Conditions, FlowPolicy
from editrl.recipes.shapes import WEIGHTS
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.world import sample_scenes
from editrl.rollout import INITIAL, counter_noise, edit_examples, rollout, sample_noise

SHAPE = (4, 2, 6, 8)
SIGMAS = sigma_schedule(10, 3.0)
WINDOW = [2, 3, 4]


class GaussianPolicy(FlowPolicy):
    """The exact velocity where clean latents are N(0, scale²): E[noise - clean | x] is linear in x."""

    def __init__(self):
        self.transformer = torch.nn.Linear(1, 1)  # says where the policy lives

    def latent_shape(self, conditions):
        return SHAPE

    def velocity(self, transformer, latents, sigma, conditions):
        variance = conditions.scale.view(-1, 1, 1, 1, 1) ** 2
        return latents * (sigma - (1 - sigma) * variance) / ((1 - sigma) ** 2 * variance + sigma**2)


POLICY = GaussianPolicy()


def conditions(*scales: float) -> Conditions:
    return Conditions({"scale": torch.tensor(scales)})


def gaussian_rollout(scales, *, sigmas=SIGMAS, window=WINDOW, members=None):
    members = range(len(scales)) if members is None else members
    groups = [0] * len(scales)
    return rollout(
        POLICY,
        POLICY.transformer,
        conditions(*scales),
        sigmas=sigmas,
        kernel=get_kernel("flow_sde"),
        window=window,
        initial_noise=sample_noise(SHAPE, 1, groups, members, INITIAL),
        step_noise=lambda step: sample_noise(SHAPE, 1, groups, members, step),
    )


def euler(latents, scales, steps, sigmas=SIGMAS):
    """The plain Euler integral over some steps of the schedule."""
    for step in steps:
        velocity = POLICY.velocity(None, latents, sigmas[step], conditions(*scales))
        latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
    return latents


# -- noise -------------------------------------------------------------------------------------------------------------

word = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(st.lists(word, min_size=1, max_size=4))
def test_noise_is_a_pure_function_of_its_key(key):
    first = counter_noise((3, 5), *key)
    torch.randn(7)  # whatever else draws numbers has no part in it
    torch.manual_seed(0)
    counter_noise((2,), 1, 2, 3)
    assert torch.equal(counter_noise((3, 5), *key), first)
    assert first.shape == (3, 5)
    assert first.dtype == torch.float32


def test_drawing_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    counter_noise((3, 5), 1)
    assert torch.equal(torch.get_rng_state(), before)


@settings(deadline=None)
@given(st.tuples(*[word] * 4), st.tuples(*[word] * 4))
def test_different_keys_have_different_noise(key, other):
    """Keys of one length, that is: (seed, group, member, step)."""
    if key != other:
        assert not torch.equal(counter_noise((16,), *key), counter_noise((16,), *other))


def test_keys_of_small_numbers_do_not_meet():
    """(seed 1, group 2) is neither (seed 2, group 1) nor (seed 0, group 3)."""
    drawn = [counter_noise((16,), *key) for key in product(range(3), range(4), range(3), [0, 1, INITIAL])]
    assert len({tuple(noise.tolist()) for noise in drawn}) == len(drawn)


def test_noise_is_standard_normal_and_neighbouring_keys_are_independent():
    count = 200_000
    noise, neighbour = counter_noise((count,), 5, 0), counter_noise((count,), 5, 1)
    error = 5 / math.sqrt(count)  # five standard errors of a mean
    assert abs(noise.mean()) < error
    assert abs(noise.std() - 1) < error
    assert abs((noise.abs() < 1).float().mean() - 0.6827) < error
    assert abs((noise * neighbour).mean()) < error


def test_the_noise_of_a_batch_is_that_of_its_samples():
    noise = sample_noise(SHAPE, 7, [3, 3, 4], [0, 1, 0], 5)
    assert noise.shape == (3, *SHAPE)
    for row, (group, member) in enumerate([(3, 0), (3, 1), (4, 0)]):
        assert torch.equal(noise[row], counter_noise(SHAPE, 7, group, member, 5))


# -- rollout -----------------------------------------------------------------------------------------------------------


def test_without_a_window_a_rollout_is_the_euler_integral():
    scales = (0.5, 2.0)
    trajectory = gaussian_rollout(scales, window=())
    start = sample_noise(SHAPE, 1, [0, 0], [0, 1], INITIAL)
    assert torch.equal(trajectory.clean, euler(start, scales, range(10)))
    assert trajectory.steps == trajectory.latents == trajectory.log_probs == []


def test_many_small_steps_carry_noise_to_the_clean_distribution():
    """For Gaussians the flow is known: clean = scale * noise."""
    trajectory = gaussian_rollout((0.5, 2.0), sigmas=sigma_schedule(400), window=())
    start = sample_noise(SHAPE, 1, [0, 0], [0, 1], INITIAL)
    expected = torch.tensor([0.5, 2.0]).view(-1, 1, 1, 1, 1) * start
    assert (trajectory.clean - expected).norm() < 0.02 * expected.norm()


def test_outside_the_window_a_rollout_is_the_euler_integral():
    scales = (0.5, 2.0)
    trajectory = gaussian_rollout(scales)
    start = sample_noise(SHAPE, 1, [0, 0], [0, 1], INITIAL)
    assert torch.equal(trajectory.latents[0], euler(start, scales, range(2)))
    assert torch.equal(trajectory.clean, euler(trajectory.next_latents[-1], scales, range(5, 10)))


def test_inside_the_window_the_kernel_draws_with_the_noise_of_its_step():
    scales = (0.5, 2.0)
    trajectory = gaussian_rollout(scales)
    kernel = get_kernel("flow_sde")
    for k, step in enumerate(WINDOW):
        latents = trajectory.latents[k]
        drawn = kernel.step(
            latents,
            POLICY.velocity(None, latents, SIGMAS[step], conditions(*scales)),
            SIGMAS[step],
            SIGMAS[step + 1],
            noise=sample_noise(SHAPE, 1, [0, 0], [0, 1], step),
        )
        assert torch.equal(trajectory.next_latents[k], drawn.next_sample)
        assert torch.equal(trajectory.means[k], drawn.mean)
        assert torch.equal(trajectory.log_probs[k], drawn.log_prob)
        assert not torch.equal(drawn.next_sample, drawn.mean)


def test_only_the_window_is_stored():
    trajectory = gaussian_rollout((1.0, 0.3))
    assert trajectory.steps == WINDOW
    for stored in (trajectory.latents, trajectory.next_latents, trajectory.means):
        assert [tensor.shape for tensor in stored] == [(2, *SHAPE)] * len(WINDOW)
        assert {tensor.dtype for tensor in stored} == {torch.float32}
    assert [log_prob.shape for log_prob in trajectory.log_probs] == [(2,)] * len(WINDOW)
    for previous, following in zip(trajectory.next_latents, trajectory.latents[1:], strict=False):
        assert torch.equal(previous, following)


def test_a_sample_does_not_depend_on_its_neighbours():
    scales = (0.5, 1.0, 2.0, 0.7)
    whole = gaussian_rollout(scales)
    for members in ([0, 1], [2, 3], [3]):
        part = gaussian_rollout([scales[m] for m in members], members=members)
        assert torch.equal(part.clean, whole.clean[members])
        for one, all_of_them in zip(part.log_probs, whole.log_probs, strict=True):
            assert torch.equal(one, all_of_them[members])


def test_a_rollout_leaves_no_graph():
    assert not gaussian_rollout((1.0,)).log_probs[0].requires_grad


# -- with the real model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def editor() -> HunyuanVideoPolicy:
    policy = HunyuanVideoPolicy.from_pretrained(str(WEIGHTS / "sft"))
    policy.transformer.eval()
    return policy


@pytest.fixture(scope="module")
def examples():
    dataset = EditDataset(rows(sample_scenes(6, seed=0)))
    return [dataset[index] for index in range(6)]


def test_the_same_samples_come_whatever_the_chunking(editor, examples):
    encoded = editor.encode(examples)
    shape = editor.latent_shape(encoded)

    def samples(size):
        parts = []
        for start in range(0, 6, size):
            numbers = range(start, start + size)
            parts.append(
                rollout(
                    editor,
                    editor.transformer,
                    encoded[start : start + size],
                    sigmas=sigma_schedule(4, 3.0),
                    kernel=get_kernel("flow_sde"),
                    window=[1, 2],
                    initial_noise=sample_noise(shape, 0, numbers, [0] * size, INITIAL),
                    step_noise=lambda step, numbers=numbers: sample_noise(shape, 0, numbers, [0] * size, step),
                )
            )
        log_probs = [torch.cat([part.log_probs[k] for part in parts]) for k in range(2)]
        return torch.cat([part.clean for part in parts]), *log_probs

    whole = samples(6)
    for one, other in zip(samples(6), whole, strict=True):
        assert torch.equal(one, other)
    for size in (1, 3):
        for one, other in zip(samples(size), whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def edit(editor, examples, seeds, batch_size=8):
    return edit_examples(
        editor,
        editor.transformer,
        examples,
        num_inference_steps=3,
        shift=3.0,
        noise_keys=[(99, seed) for seed in seeds],
        batch_size=batch_size,
    )


def test_an_edit_is_decided_by_example_and_key(editor, examples):
    first = edit(editor, examples, range(6))
    assert len(first) == 6
    assert all(video.shape == example.source.shape for video, example in zip(first, examples, strict=True))
    for one, other in zip(edit(editor, examples, range(6)), first, strict=True):
        assert torch.equal(one, other)
    backwards = edit(editor, examples[::-1], range(5, -1, -1), batch_size=4)[::-1]
    for one, other in zip(backwards, first, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_another_key_gives_another_edit_of_the_same_example(editor, examples):
    one, other, again = edit(editor, [examples[0]] * 3, [0, 1, 0])
    assert not torch.allclose(one, other, atol=1e-3)
    torch.testing.assert_close(one, again, rtol=0, atol=1e-5)
