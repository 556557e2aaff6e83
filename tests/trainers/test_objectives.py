"""FlowGRPOTrainer behind every `loss_type`: what each trains on, and that it learns."""

import math
from pathlib import Path

import pytest
import torch

from editrl.data import EditDataset
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.world import sample_scenes
from editrl.rollout import add_noise

WINDOW = ["grpo", "grpo_guard", "dppo"]
MATCHING = ["nft", "awm", "rwr"]
MEMBERS = 4


def brightness(videos, **kwargs):
    return [video.mean().item() for video in videos]


def constant(videos, **kwargs):
    return [0.5] * len(videos)


def first_rollout(trainer):
    """The micro-batches of the first two groups, without an update."""
    return trainer.generate([[group, group] for group in range(2) for _ in range(MEMBERS)])


# -- every loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", WINDOW + MATCHING)
def test_two_updates_move_the_weights_and_are_logged(grpo, weights, updates, equal, loss_type):
    trainer = grpo([brightness], loss_type=loss_type)
    before = weights(trainer)
    trainer.train()
    assert not equal(weights(trainer), before)
    assert len(updates(trainer)) == 2
    for log in updates(trainer):
        assert math.isfinite(log["loss"])
        assert log["grad_norm"] > 0
        assert log.get("drift", 0) == 0, "one on-policy update a rollout"
        assert ("drift" in log) == (loss_type != "rwr"), "which knows no old policy"
        if loss_type in [*WINDOW, "awm"]:
            assert log["ratio/mean"] == 1
            assert log["ratio/deviation"] == log["clip_ratio/low"] == log["clip_ratio/high"] == 0
        else:
            assert "ratio/mean" not in log


@pytest.mark.parametrize("loss_type", WINDOW + MATCHING)
def test_a_second_update_of_a_rollout_is_off_policy(grpo, updates, loss_type):
    trainer = grpo([brightness], loss_type=loss_type, num_iterations=2, max_steps=2)
    trainer.train()
    first, second = updates(trainer)
    if loss_type == "rwr":
        assert "ratio/deviation" not in second
        return
    assert first["drift"] == 0
    assert second["drift"] > 0
    if loss_type != "nft":
        assert second["ratio/deviation"] > 0


@pytest.mark.parametrize("loss_type", ["nft", "awm"])
def test_a_constant_reward_leaves_the_weights_alone(grpo, weights, equal, loss_type):
    trainer = grpo([constant], loss_type=loss_type)
    before = weights(trainer)
    trainer.train()
    assert equal(weights(trainer), before)


@pytest.mark.parametrize("loss_type", ["grpo", "awm"])
def test_the_kl_pulls_the_weights_back(grpo, updates, loss_type):
    """A constant reward teaches nothing; what moves disturbed weights is the KL, which then falls."""
    trainer = grpo([constant], loss_type=loss_type, beta=1.0, num_iterations=5, max_steps=5, learning_rate=3e-3)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.trained_parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    trainer.train()
    kl = [log["kl"] for log in updates(trainer)]
    assert kl[0] > 0
    assert kl[-1] < 0.8 * kl[0]


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["grpo_guard", "dppo", *MATCHING])
def test_a_reward_rises(grpo, latent_colours, loss_type):
    trainer = grpo(
        [brightness],
        loss_type=loss_type,
        policy=latent_colours,
        peft=None,
        evaluate=EditDataset(rows(sample_scenes(8, seed=1))),
        max_steps=12,
        learning_rate=1e-3,
        num_generations=8,
        generation_batch_size=16,
        per_device_train_batch_size=16,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=12,
    )
    trainer.train()
    first, last = (
        log["eval_rewards/brightness/mean"]
        for log in trainer.state.log_history
        if "eval_runtime" not in log and "eval_rewards/brightness/mean" in log
    )
    assert last - first > 0.01


# -- clean samples, noised anew ----------------------------------------------------------------------------------------


def test_every_clip_is_noised_at_as_many_timesteps_as_asked(grpo):
    trainer = grpo([brightness], loss_type="nft", timesteps_per_sample=3, gradient_accumulation_steps=3)
    batches = first_rollout(trainer)
    assert len(batches) == 3
    assert all(torch.equal(batch.clean, batches[0].clean) for batch in batches), "one clip, three draws"
    sigmas = torch.stack([batch.sigma for batch in batches])
    assert sigmas.unique().numel() == 24
    assert sigmas.min() > 0
    assert sigmas.max() < 1
    noise = torch.stack([batch.noise for batch in batches]).flatten(2)
    assert torch.corrcoef(noise.flatten(0, 1)).fill_diagonal_(0).abs().max() < 0.3


def test_an_old_policy_is_a_moving_average_that_samples_and_is_compared_with(grpo, updates):
    trainer = grpo([brightness], loss_type="nft", old_policy_decay=0.9, ema_decay=0.1, max_steps=4, peft=None)
    trainer.train()
    assert updates(trainer)[3]["drift"] > 0, "it lags behind even on a fresh rollout"
    old = trainer.averages["old_policy"]
    assert not all(
        torch.equal(a, b) for a, b in zip(old.shadow_params, trainer.averages["ema"].shadow_params, strict=True)
    )
    batch = first_rollout(trainer)[0]
    latents = add_noise(batch.clean, batch.noise, batch.sigma)
    with torch.no_grad(), trainer.averaged_weights("old_policy"):
        velocity = trainer.policy.velocity(trainer.model, latents, batch.sigma, batch.conditions)
    assert torch.equal(batch.old_velocity, velocity)
    trainer.averages.clear()
    assert not torch.equal(first_rollout(trainer)[0].clean, batch.clean), "the current weights sample otherwise"


def test_a_checkpoint_holds_the_old_policy(grpo):
    trainer = grpo([brightness], loss_type="nft", old_policy_decay=0.9, save_strategy="steps", save_steps=2)
    trainer.train()
    saved = torch.load(Path(trainer.args.output_dir) / "checkpoint-2" / "old_policy.pt", weights_only=True)
    for value, average in zip(saved["shadow_params"], trainer.averages["old_policy"].shadow_params, strict=True):
        assert torch.equal(value, average)


# -- old log-probs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [1, 2])
def test_recomputed_log_probs_hide_how_the_rollout_was_computed(grpo, editor, updates, monkeypatch, passes):
    """Sampling in another precision than training moves the ratio; recomputing what training compares with does not."""
    exact = type(editor).velocity

    def coarse_when_sampling(self, transformer, latents, sigma, conditions):
        velocity = exact(self, transformer, latents, sigma, conditions)
        return velocity if transformer.training else velocity.bfloat16().float()

    monkeypatch.setattr(type(editor), "velocity", coarse_when_sampling)
    deviations = {}
    for where in ("rollout", "recompute"):
        trainer = grpo([brightness], old_log_prob=where, num_iterations=passes, max_steps=passes)
        trainer.train()
        deviations[where] = [log["ratio/deviation"] for log in updates(trainer)]
    assert deviations["rollout"][0] > 0
    assert deviations["recompute"][0] == 0
    assert len(deviations["recompute"]) == passes
    assert all(deviation > 0 for deviation in deviations["recompute"][1:])


# -- best of N ---------------------------------------------------------------------------------------------------------


def test_the_best_and_the_worst_of_each_group_are_trained(grpo, updates):
    trainer = grpo(
        [brightness],
        num_selected_generations=2,
        per_device_train_batch_size=4,
        max_steps=1,
    )
    assert trainer.args.steps_per_generation == 2, "4 of 8 clips, 2 steps"
    whole = grpo([brightness], per_device_train_batch_size=4, gradient_accumulation_steps=4)
    everything, selected = first_rollout(whole), first_rollout(trainer)
    advantages = torch.cat([everything[0].advantages, everything[2].advantages]).view(2, MEMBERS)
    latents = torch.cat([everything[0].next_latents, everything[2].next_latents])
    kept = selected[0]
    assert len(selected) == 2
    assert kept.advantages.view(2, 2).sort().values.tolist() == [
        [group.min().item(), group.max().item()] for group in advantages
    ]
    for value, state in zip(kept.advantages, kept.next_latents, strict=True):
        row = advantages.flatten().tolist().index(value.item())
        torch.testing.assert_close(state, latents[row], rtol=0, atol=1e-5)
    trainer.train()
    assert updates(trainer)[0]["ratio/deviation"] < 1e-6


# -- diagnostics -------------------------------------------------------------------------------------------------------


def test_what_is_known_of_a_step_is_logged_by_step(grpo, updates):
    trainer = grpo([brightness], num_iterations=2, max_steps=2, sde_window="fixed", learning_rate=1e-2)
    trainer.train()
    second = updates(trainer)[1]
    for name in ("ratio/mean", "ratio/deviation", "clip_ratio/low", "clip_ratio/high", "drift"):
        steps = [second[f"{name}/step_{step}"] for step in (0, 1)]
        assert second[name] == pytest.approx(sum(steps) / 2, rel=1e-5, abs=1e-9)
        assert f"{name}/step_2" not in second
    assert second["drift/step_0"] > 0


def test_the_gradient_norm_of_each_step(grpo, updates):
    settings = {"sde_window": "fixed", "max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 1e-9}
    trainer = grpo([brightness], log_step_grad_norm=True, **settings)
    trainer.train()
    log = updates(trainer)[0]
    other = grpo([brightness], **settings)
    other.model.train()
    for batch in other.generate([[group, index] for group, index in trainer_numbers(trainer)]):
        loss = other.compute_loss(other.model, batch)
        gradients = torch.autograd.grad(loss, other.trained_parameters())
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        assert log[f"grad_norm/step_{batch.step}"] == pytest.approx(norm, rel=1e-4)


def trainer_numbers(trainer):
    """What the first rollout of a run samples."""
    from editrl.trainers.groups import GroupSchedule

    args = trainer.args
    groups = GroupSchedule(len(trainer.train_dataset), args.groups_per_generation, args.seed)
    return [groups[group] for group in range(args.groups_per_generation) for _ in range(args.num_generations)]


def test_the_watchdog_measures_rollouts_and_evaluations(grpo, updates):
    evaluate = EditDataset(rows(sample_scenes(3, seed=1)))
    trainer = grpo([brightness], evaluate=evaluate, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    trainer.train()
    for name in ("edge_density", "colour_entropy", "exposure", "temporal_flicker", "source_similarity"):
        assert all(math.isfinite(log[f"watchdog/{name}"]) for log in updates(trainer))
        logged = [log for log in trainer.state.log_history if f"eval_watchdog/{name}/mean" in log]
        assert [log["step"] for log in logged] == [0, 2]
        assert all(log[f"eval_watchdog/{name}/std"] >= 0 for log in logged)
    silent = grpo([brightness], watchdog="off", max_steps=1)
    silent.train()
    assert not any(name.startswith("watchdog") for name in updates(silent)[0])
