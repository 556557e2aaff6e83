"""A reward that is hacked in a real run (UniRL#407: reward up, background wiped) is caught by the watchdog."""

import logging
from pathlib import Path

import pytest

from editrl.data import EditDataset
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.world import sample_scenes


def calm(videos, **kwargs):
    """Sounds like smooth, clean pictures; is highest for one plain colour."""
    return [1 - video.std(dim=(-1, -2)).mean().item() for video in videos]


@pytest.mark.slow
def test_a_run_that_wipes_its_pictures_is_warned_of_and_stopped(grpo, caplog):
    trainer = grpo(
        [calm],
        peft=None,
        loss_type="nft",
        dataset=EditDataset(rows(sample_scenes(64, seed=0))),
        evaluate=EditDataset(rows(sample_scenes(32, seed=1))),
        max_steps=40,
        learning_rate=1e-4,
        num_generations=8,
        generation_batch_size=32,
        per_device_train_batch_size=32,
        num_inference_steps=6,
        eval_num_inference_steps=6,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=2,
        watchdog="stop",
    )
    with caplog.at_level(logging.WARNING, "editrl"):
        trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_rewards/calm/mean" in log]
    first, last = evaluations[0], evaluations[-1]
    assert last["eval_rewards/calm/mean"] > first["eval_rewards/calm/mean"], "by the reward all is well"
    edges = "eval_watchdog/edge_density/mean"
    assert last[edges] < 0.8 * first[edges]
    assert trainer.state.global_step < 40
    assert (Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}" / "complete").exists()
    assert "watchdog: edge_density" in caplog.text
    assert "Stopping, with a checkpoint" in caplog.text
