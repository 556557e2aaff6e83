"""Which steps are stochastic, and the states that the members of a group share."""

import pytest
import torch

from editrl.trainers.sampling import stochastic_steps

MEMBERS = 4


def brightness(videos, **kwargs):
    return [video.mean().item() for video in videos]


def rollout_of(trainer):
    return trainer.generate([[group, group] for group in range(2) for _ in range(MEMBERS)])


def test_a_sliding_window_moves_on_and_starts_again(grpo):
    args = grpo(
        [brightness], sde_window="sliding", sde_window_interval=3, sde_window_range=[1, 5], num_inference_steps=6
    ).args
    starts = [stochastic_steps(args, generation).start for generation in range(12)]
    assert starts == [1, 1, 1, 2, 2, 2, 3, 3, 3, 1, 1, 1]
    assert all(len(stochastic_steps(args, generation)) == 2 for generation in range(12))


def test_a_fixed_window_stays_and_a_random_one_is_a_function_of_the_rollout(grpo):
    fixed = grpo([brightness], sde_window="fixed").args
    assert {stochastic_steps(fixed, generation) for generation in range(9)} == {range(0, 2)}
    drawn = grpo([brightness], sde_window="random").args
    windows = [stochastic_steps(drawn, generation) for generation in range(30)]
    assert windows == [stochastic_steps(drawn, generation) for generation in range(30)]
    assert set(windows) == {range(0, 2), range(1, 3)}


LATE = {"sde_window": "fixed", "sde_window_range": [2, 4], "num_inference_steps": 5, "same_init_noise": True}


@pytest.mark.parametrize("solver", ["euler", "dpm2"])
def test_a_shared_prefix_gives_the_same_clips(grpo, solver):
    """Bit for bit in batches of one, where both ways make the same forwards; else up to rounding."""
    for size, tolerance in ((1, 0.0), (8, 2e-5)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 16 // size, "ode_solver": solver}
        shared, plain = (
            rollout_of(grpo([brightness], shared_prefix=prefix, **LATE, **sizes)) for prefix in (True, False)
        )
        for one, other in zip(shared, plain, strict=True):
            assert one.step == other.step
            for name in ("latents", "next_latents", "old_mean", "old_log_prob", "advantages"):
                torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=tolerance or 0)


@pytest.mark.parametrize(("prefix", "expected"), [(False, 8 * 5), (True, 2 * 2 + 8 * 3)])
def test_a_shared_prefix_saves_forwards(grpo, editor, monkeypatch, prefix, expected):
    """5 steps, the window begins at step 2: two groups make the first 2 steps, their 8 members the other 3."""
    counted, velocity = [], type(editor).velocity

    def counting(self, transformer, latents, sigma, conditions):
        counted.append(len(latents))
        return velocity(self, transformer, latents, sigma, conditions)

    monkeypatch.setattr(type(editor), "velocity", counting)
    rollout_of(grpo([brightness], shared_prefix=prefix, **LATE))
    assert sum(counted) == expected


def test_members_with_noise_of_their_own_share_nothing(grpo, editor, monkeypatch):
    counted, velocity = [], type(editor).velocity

    def counting(self, transformer, latents, sigma, conditions):
        counted.append(len(latents))
        return velocity(self, transformer, latents, sigma, conditions)

    monkeypatch.setattr(type(editor), "velocity", counting)
    rollout_of(grpo([brightness], **LATE | {"same_init_noise": False}))
    assert counted == [8] * 5


def test_the_second_order_solver_samples_otherwise_and_stays_on_policy(grpo, updates):
    later = LATE | {"sde_window_range": [3, 5], "num_inference_steps": 6}  # its first two steps are Euler's
    states = [rollout_of(grpo([brightness], ode_solver=solver, **later))[0].latents for solver in ("euler", "dpm2")]
    assert (states[0] - states[1]).abs().max() > 1e-3
    trainer = grpo([brightness], ode_solver="dpm2", max_steps=1, **later)
    trainer.train()
    assert updates(trainer)[0]["ratio/deviation"] == 0


def test_the_solver_of_an_evaluation_is_its_own(grpo, pairs):
    settings = {"evaluate": pairs, "eval_num_inference_steps": 4}
    euler, dpm2, both = (
        grpo([brightness], **settings, **solvers).sample(pairs, [0])[0]
        for solvers in ({}, {"eval_ode_solver": "dpm2"}, {"ode_solver": "dpm2"})
    )
    assert torch.equal(dpm2, both), "the default is the solver of the rollout"
    assert not torch.equal(euler, dpm2)
