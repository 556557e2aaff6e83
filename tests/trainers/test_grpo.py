"""FlowGRPOTrainer: on-policy to the bit, groups that hold one example, and rewards that rise."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

import editrl.trainers.scoring
from editrl.data import EditDataset, read_video
from editrl.errors import EditrlError
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.world import sample_scenes
from editrl.reward import RewardSet
from editrl.trainers.scoring import refuse_split_groups

MEMBERS = 4


def brightness(videos, **kwargs):
    return [video.mean().item() for video in videos]


def redness(videos, **kwargs):
    return [(video[:, 0] - video[:, 2]).mean().item() for video in videos]


def constant(videos, **kwargs):
    return [0.5] * len(videos)


class Watch(TrainerCallback):
    """Keeps the samples of each rollout, and the clips."""

    def __init__(self):
        self.samples, self.videos = [], []

    def on_rollout(self, args, state, control, videos, samples):
        self.samples.append(samples)
        self.videos.append(videos)


@pytest.fixture(scope="module")
def run(grpo):
    """Three updates on two rewards with KL, moving average, evaluation, videos and a metric."""
    watch = Watch()
    trainer = grpo(
        [brightness, redness],
        metrics=[constant],
        evaluate=EditDataset(rows(sample_scenes(3, seed=1))),
        callbacks=[watch],
        max_steps=3,
        reward_weights=[1.0, 0.5],
        beta=0.1,
        ema_decay=0.9,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=3,
        video_steps=2,
        num_videos=3,
    )
    trainer.watch = watch
    trainer.train()
    return trainer


# -- what is logged ----------------------------------------------------------------------------------------------------


def test_every_update_logs_rewards_ratio_clip_kl_and_seconds(run, updates):
    assert len(updates(run)) == 3
    for log in updates(run):
        for name in ("brightness", "redness"):
            for statistic in ("mean", "std", "frac_zero_std"):
                assert math.isfinite(log[f"rewards/{name}/{statistic}"])
        for key in ("loss", "grad_norm", "reward", "frac_reward_zero_std", "kl", "ratio/mean", "ratio/deviation"):
            assert math.isfinite(log[key])
        for key in ("clip_ratio/low", "clip_ratio/high", "rewards/redness/frac_zero_std"):
            assert 0 <= log[key] <= 1
        for phase in ("rollout", "decode", "reward", "train"):
            assert log[f"seconds/{phase}"] > 0
        assert log["grad_norm"] > 0


def test_every_reward_logs_its_seconds_and_its_share_of_the_advantage(run, updates):
    for log in updates(run):
        assert log["rewards/brightness/share"] + log["rewards/redness/share"] == pytest.approx(1)
        names = ("brightness", "redness", "constant")
        assert all(log[f"seconds/reward/{name}"] > 0 for name in names)
        assert sum(log[f"seconds/reward/{name}"] for name in names) <= log["seconds/reward"]
        assert "rewards/brightness/weight" not in log  # it does not change


def test_logged_rewards_are_those_of_the_clips(run, updates):
    for log, videos in zip(updates(run), run.watch.videos, strict=True):
        values = torch.tensor(brightness(videos))
        assert log["rewards/brightness/mean"] == pytest.approx(values.mean().item(), rel=1e-5)
        assert log["rewards/brightness/std"] == pytest.approx(values.std(correction=0).item(), rel=1e-4)
        assert log["reward"] == pytest.approx(
            log["rewards/brightness/mean"] + 0.5 * log["rewards/redness/mean"], rel=1e-5
        )


def test_evaluation_logs_rewards_and_metrics(run):
    evaluations = [log for log in run.state.log_history if "eval_rewards/brightness/mean" in log]
    assert [log["step"] for log in evaluations] == [1, 2, 3]
    for log in evaluations:
        assert math.isfinite(log["eval_rewards/redness/mean"])
        assert log["eval_metrics/constant/mean"] == 0.5


def test_metrics_are_logged_beside_the_rewards(run, updates):
    for log in updates(run):
        assert log["metrics/constant/mean"] == 0.5
        assert log["metrics/constant/std"] == 0
        assert "rewards/constant/mean" not in log


def test_videos_are_written_every_so_many_updates(run):
    folder = Path(run.args.output_dir) / "videos"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000", "step-000002"]
    first = run.watch.samples[0][0]
    written = folder / "step-000000"
    expected = [f"{first.id}-{member}.mp4" for member in range(3)] + [f"{first.id}-source.mp4"]
    assert sorted(path.name for path in written.iterdir()) == expected
    for name, video in ((expected[1], run.watch.videos[0][1]), (expected[3], first.source)):
        read, fps = read_video(written / name)
        assert read.shape == video.shape
        assert fps == first.fps
        assert (read - video).abs().mean() < 0.05


def test_kl_is_zero_at_the_start_and_not_after_an_update(run, updates):
    kl = [log["kl"] for log in updates(run)]
    assert kl[0] == 0
    assert kl[1] > 0


def test_a_checkpoint_holds_the_moving_average(run):
    saved = torch.load(Path(run.args.output_dir) / "checkpoint-3" / "ema.pt", weights_only=True)
    assert saved["optimization_step"] == 3
    for value, average in zip(saved["shadow_params"], run.ema.shadow_params, strict=True):
        assert torch.equal(value, average)


# -- on policy ---------------------------------------------------------------------------------------------------------


def test_the_ratio_is_exactly_one_while_a_rollout_is_on_policy(run, updates):
    for log in updates(run):
        assert log["ratio/mean"] == 1
        assert log["ratio/deviation"] == 0
        assert log["clip_ratio/low"] == log["clip_ratio/high"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"sde_kernel": "cps", "loss_type": "grpo_guard"},
        {"sde_kernel": "dance_sde", "noise_level": 0.5, "same_init_noise": True},
        {"bf16": True},
        {"peft": None, "beta": 0.1},
    ],
    ids=["micro-batches", "cps", "dance_sde", "bfloat16", "whole transformer"],
)
def test_the_ratio_is_exactly_one_whatever_the_setting(grpo, updates, changes):
    trainer = grpo([brightness], max_steps=1, **changes)
    trainer.train()
    assert updates(trainer)[0]["ratio/deviation"] == 0
    assert updates(trainer)[0]["grad_norm"] > 0


def test_gradient_checkpointing_changes_nothing_but_memory(grpo, weights, updates):
    trained = []
    for checkpointing in (False, True):
        trainer = grpo([brightness], max_steps=1, gradient_checkpointing=checkpointing)
        assert trainer.model.get_base_model().gradient_checkpointing == checkpointing
        trainer.train()
        assert updates(trainer)[0]["ratio/deviation"] == 0
        trained.append(weights(trainer))
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=0, atol=1e-6)


def test_dropout_is_off_in_rollout_and_update_alike(grpo, lora, updates):
    """With dropout on, the log-prob of an update is that of another model than the one that sampled."""
    trainer = grpo([brightness], peft=lora(lora_dropout=0.5), learning_rate=0.05)
    trainer.train()
    for log in updates(trainer):
        assert log["ratio/deviation"] == 0


def test_a_second_pass_over_a_rollout_is_off_policy(grpo, updates):
    trainer = grpo([brightness], num_iterations=2, max_steps=4)
    trainer.train()
    deviations = [log["ratio/deviation"] for log in updates(trainer)]
    assert deviations[0] == deviations[2] == 0
    assert deviations[1] > 0
    assert deviations[3] > 0
    assert "rewards/brightness/mean" not in updates(trainer)[1], "a rollout is scored once"


# -- groups and noise --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grouped(grpo):
    """Five rollouts of two groups over three examples, all of one instruction; the group ids as they are compared."""
    scenes = rows(sample_scenes(3, seed=2))
    for row in scenes:
        row["instruction"] = "remove the circle"
    watch, compared = Watch(), []
    group_advantages = editrl.trainers.scoring.group_advantages

    def recorded(rewards, group_ids, **kwargs):
        compared.append(group_ids)
        return group_advantages(rewards, group_ids, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(editrl.trainers.scoring, "group_advantages", recorded)
        grpo([brightness], dataset=EditDataset(scenes), callbacks=[watch], max_steps=5).train()
    return watch, compared


def test_a_group_holds_one_example_even_where_instructions_are_equal(grouped):
    watch, compared = grouped
    for samples, group_ids in zip(watch.samples, compared, strict=True):
        assert not group_ids.is_floating_point()
        for group in group_ids.unique():
            members = [sample.id for sample, id in zip(samples, group_ids, strict=True) if id == group]
            assert len(members) == MEMBERS
            assert len(set(members)) == 1


def test_group_ids_are_unique_over_the_run(grouped):
    _, compared = grouped
    assert [sorted(set(ids.tolist())) for ids in compared] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_every_pass_meets_every_example(grouped):
    watch, _ = grouped
    met = [samples[first].id for samples in watch.samples for first in (0, MEMBERS)]
    for first in (0, 3, 6):
        assert len(set(met[first : first + 3])) == 3


@pytest.mark.parametrize("same_init_noise", [False, True])
def test_members_start_from_their_own_noise_or_from_one_noise_a_group(grpo, same_init_noise):
    trainer = grpo([brightness], max_steps=1, sde_window="fixed", same_init_noise=same_init_noise)
    trainer.train()
    first_step = next(batch for batch in trainer._micro_batches if batch.step == 0)
    distinct = {tuple(latents.flatten().tolist()) for latents in first_step.latents}
    assert len(distinct) == (2 if same_init_noise else 8)
    after = {tuple(latents.flatten().tolist()) for latents in first_step.next_latents}
    assert len(after) == 8


def test_the_window_is_one_for_all_groups_and_moves_between_rollouts(grpo):
    windows = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            windows.append(sorted({batch.step for batch in trainer._micro_batches}))

    trainer = grpo([constant], callbacks=[Record()], max_steps=6, sde_window_range=[1, 3], num_inference_steps=5)
    trainer.train()
    assert all(window == [1, 2] for window in windows)
    windows.clear()
    trainer = grpo([constant], callbacks=[Record()], max_steps=6)
    trainer.train()
    assert {tuple(window) for window in windows} == {(0, 1), (1, 2)}


def test_the_number_of_updates_follows_from_the_epochs(grpo, pairs):
    """An epoch meets every example in one group: 8 examples, 2 groups an update."""
    watch = Watch()
    trainer = grpo([constant], callbacks=[watch], max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 8
    met = [samples[first].id for samples in watch.samples for first in (0, MEMBERS)]
    assert sorted(met[:8]) == sorted(met[8:]) == sorted(pairs.ids)
    # The second epoch samples anew: it does not repeat the clips of the first.
    seen = {}
    for samples, videos in zip(watch.samples, watch.videos, strict=True):
        for first in (0, MEMBERS):
            seen.setdefault(samples[first].id, []).append(videos[first])
    for first, second in seen.values():
        assert not torch.allclose(first, second, rtol=0, atol=1e-5)


# -- learning ----------------------------------------------------------------------------------------------------------


WIDE = {"r": 8, "lora_alpha": 32, "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "learning_rate", "sign"),
    [(WIDE, 5e-3, 1), (None, 1e-3, 1), (None, 1e-3, -1)],
    ids=["LoRA", "whole", "the opposite"],
)
def test_a_reward_rises(grpo, lora, latent_colours, options, learning_rate, sign):
    """Brighter clips where they are rewarded, darker ones where darkness is; on held-out scenes from fixed noise."""

    def reward(videos, **kwargs):
        return [sign * value for value in brightness(videos)]

    trainer = grpo(
        [reward],
        policy=latent_colours,
        peft=lora(**options) if options else None,
        evaluate=EditDataset(rows(sample_scenes(8, seed=1))),
        max_steps=12,
        learning_rate=learning_rate,
        num_generations=8,
        generation_batch_size=16,
        per_device_train_batch_size=16,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=6,
    )
    trainer.train()
    key = "eval_rewards/reward/mean"
    course = [log[key] for log in trainer.state.log_history if key in log]
    assert course[0] < course[1] < course[2]
    assert course[2] - course[0] > 0.02


@pytest.mark.parametrize("peft", ["lora", None], ids=["LoRA", "whole"])
def test_a_constant_reward_leaves_the_weights_alone(grpo, weights, updates, peft, equal):
    trainer = grpo([constant], peft=peft)
    before = weights(trainer)
    trainer.train()
    assert equal(weights(trainer), before)
    assert [log["frac_reward_zero_std"] for log in updates(trainer)] == [1, 1]
    assert [log["rewards/constant/frac_zero_std"] for log in updates(trainer)] == [1, 1]


def test_only_the_adapter_is_trained(run, editor):
    trained = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    base = {name.replace(".base_layer", ""): value for name, value in run.model.get_base_model().state_dict().items()}
    for name, value in editor.transformer.state_dict().items():
        assert torch.equal(base[name], value), name


def test_metrics_do_not_change_what_is_learned(grpo, weights, equal):
    trained = []
    for metrics in (None, [redness, constant]):
        trainer = grpo([brightness], metrics=metrics)
        start = weights(trainer)
        trainer.train()
        trained.append(weights(trainer))
    assert equal(*trained)
    assert not equal(trained[0], start)


def test_a_run_repeats_itself_bit_for_bit_and_another_seed_does_not(grpo, weights, equal):
    trained = []
    for seed in (7, 7, 8):
        trainer = grpo([brightness], seed=seed)
        trainer.train()
        trained.append(weights(trainer))
    assert equal(trained[0], trained[1])
    assert not equal(trained[0], trained[2])


# -- groups and weights that change ------------------------------------------------------------------------------------


def test_groupwise_rewards_and_scheduled_weights(grpo, updates):
    sizes = []

    def rank(videos):
        sizes.append(len(videos))
        means = [video.mean().item() for video in videos]
        return [float(sorted(means).index(mean)) for mean in means]

    rank.groupwise = True
    fading = {"start": 1.0, "end": 0.0, "steps": 2}
    held_out = EditDataset(rows(sample_scenes(2, seed=1)))
    trainer = grpo([rank, redness], reward_weights=[1.0, fading], evaluate=held_out)
    trainer.train()
    assert sizes == [MEMBERS] * 4  # two updates of two groups
    trainer.evaluate()
    assert sizes[4:] == [1, 1]  # there each clip is a group
    assert [log["rewards/redness/weight"] for log in updates(trainer)] == [1.0, 0.5]
    assert updates(trainer)[0]["rewards/rank/mean"] == pytest.approx(1.5)


def test_groups_that_are_split_over_processes_are_refused_for_a_groupwise_reward():
    args = SimpleNamespace(groups_per_generation=3, data_world_size=2)
    refuse_split_groups(RewardSet([brightness]), args)
    ranked = RewardSet([brightness], options={"brightness": {"groupwise": True}})
    with pytest.raises(EditrlError, match=r"'brightness' compares the clips of a group.* 3 and there are 2 processes"):
        refuse_split_groups(ranked, args)
