"""FlowGRPOTrainer: what it keeps beside the trained weights (reference, moving average), and what stops a run."""

import copy
import math

import pytest
import torch
from transformers import TrainerCallback

from editrl.data import EditDataset
from editrl.errors import EditrlError
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.world import sample_scenes
from editrl.rollout import edit_examples
from editrl.trainers.window import reference_mean


def brightness(videos, **kwargs):
    return [video.mean().item() for video in videos]


def constant(videos, **kwargs):
    return [0.5] * len(videos)


# -- the reference -----------------------------------------------------------------------------------------------------


def disturbed(trainer):
    """The adapter away from its start, where it is no longer the base model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.trained_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trainer


@pytest.mark.parametrize("peft", ["lora", None], ids=["LoRA", "whole"])
def test_the_kl_has_a_gradient_that_leads_back_to_the_reference(grpo, updates, peft):
    """A constant reward teaches nothing, so what moves the weights is the KL; here over one and the same rollout."""
    trainer = disturbed(grpo([constant], peft=peft, beta=1.0, num_iterations=5, max_steps=5, learning_rate=3e-3))
    trainer.train()
    kl = [log["kl"] for log in updates(trainer)]
    assert all(log["grad_norm"] > 0 for log in updates(trainer))
    assert kl[-1] < 0.7 * kl[0]


def test_the_reference_of_an_adapter_is_the_base_model(grpo, editor):
    trainer = disturbed(grpo([brightness], beta=0.1, max_steps=1))
    trainer.train()
    assert trainer.reference is None, "no second copy of the weights"
    batch = trainer._micro_batches[0]
    sigma, sigma_next = trainer.sigmas[batch.step], trainer.sigmas[batch.step + 1]
    with torch.no_grad():
        velocity = editor.velocity(copy.deepcopy(editor.transformer), batch.latents, sigma, batch.conditions)
    expected = trainer.kernel.step(batch.latents, velocity, sigma, sigma_next, next_sample=batch.next_latents).mean
    reference = reference_mean(trainer, trainer.model, batch)
    torch.testing.assert_close(reference, expected, rtol=0, atol=1e-6)
    assert (reference - batch.old_mean).abs().max() > 1e-4


def test_the_reference_of_a_whole_transformer_is_a_frozen_copy_of_its_start(grpo, editor, updates):
    trainer = grpo([brightness], peft=None, beta=0.1)
    trainer.train()
    for name, value in trainer.reference.state_dict().items():
        assert torch.equal(value, editor.transformer.state_dict()[name]), name
    assert not any(parameter.requires_grad for parameter in trainer.reference.parameters())
    assert updates(trainer)[0]["kl"] == 0
    assert updates(trainer)[1]["kl"] > 0


def test_without_a_kl_no_reference_is_kept(grpo):
    assert grpo([brightness], peft=None).reference is None


# -- moving average ----------------------------------------------------------------------------------------------------


def test_evaluation_sees_the_moving_average_and_training_does_not(grpo, weights, latent_colours, equal):
    held_out = EditDataset(rows(sample_scenes(2, seed=1)))

    def evaluated_with(model) -> float:
        videos = edit_examples(
            latent_colours,
            model,
            [held_out[0], held_out[1]],
            num_inference_steps=2,
            shift=3.0,
            noise_keys=[(1234, 0), (1234, 1)],
        )
        return sum(brightness(videos)) / 2

    class BeforeEvaluation(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            self.weights = weights(trainer)

    before = BeforeEvaluation()
    trainer = grpo(
        [brightness],
        policy=latent_colours,
        peft=None,
        evaluate=held_out,
        callbacks=[before],
        max_steps=3,
        ema_decay=0.5,
        eval_strategy="steps",
        eval_steps=3,
        eval_seed=1234,
    )
    trainer.train()
    assert trainer.ema.optimization_step == 3
    assert equal(weights(trainer), before.weights), "evaluation gives the weights back"
    logged = next(log for log in trainer.state.log_history if "eval_rewards/brightness/mean" in log)
    value = logged["eval_rewards/brightness/mean"]
    assert value != pytest.approx(evaluated_with(trainer.model), abs=1e-3)
    averaged = copy.deepcopy(trainer.model)
    with torch.no_grad():
        for parameter, average in zip(averaged.parameters(), trainer.ema.shadow_params, strict=True):
            parameter.copy_(average)
    assert value == pytest.approx(evaluated_with(averaged), abs=1e-6)


# -- what stops a run --------------------------------------------------------------------------------------------------


def broken(kind):
    def reward(videos, **kwargs):
        values = brightness(videos)
        if kind == "raises":
            raise RuntimeError("out of memory")
        if kind == "length":
            return values[:-1]
        return [*values[:-1], math.nan if kind == "NaN" else math.inf]

    reward.__name__ = "judge"
    return reward


@pytest.mark.parametrize("kind", ["NaN", "infinity", "length", "raises"])
def test_a_reward_that_fails_stops_the_run_and_is_named(grpo, weights, kind, equal):
    trainer = grpo([brightness, broken(kind)])
    before = weights(trainer)
    with pytest.raises(EditrlError, match="reward 'judge'"):
        trainer.train()
    assert equal(weights(trainer), before)


def test_a_metric_that_fails_stops_the_run_too(grpo):
    with pytest.raises(EditrlError, match="reward 'judge'"):
        grpo([brightness], metrics=[broken("NaN")]).train()


def test_a_missing_column_is_found_before_training(grpo, pairs):
    def strict(videos, subtitles, **kwargs):
        return brightness(videos)

    with pytest.raises(EditrlError, match="reward 'strict' needs 'subtitles'"):
        grpo([strict])
    with pytest.raises(EditrlError, match="reward 'strict' needs 'subtitles'"):
        grpo([brightness], metrics=[strict])


def test_a_reward_that_does_not_apply_to_a_sample_is_left_out(grpo, updates):
    def first_only(videos, **kwargs):
        return [value if i < 4 else None for i, value in enumerate(brightness(videos))]

    trainer = grpo([first_only], max_steps=1)
    trainer.train()
    log = updates(trainer)[0]
    assert math.isfinite(log["rewards/first_only/mean"])
    assert math.isfinite(log["loss"])
    assert log["rewards/first_only/frac_zero_std"] == 0, "of the groups that have a value"
    assert log["frac_reward_zero_std"] == 0.5


def test_weights_that_become_infinite_stop_the_run(grpo):
    trainer = grpo([brightness], max_steps=3, learning_rate=1e30)
    with pytest.raises(EditrlError):
        trainer.train()
    assert trainer.state.global_step < 3
