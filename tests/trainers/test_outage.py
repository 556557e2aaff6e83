"""Where an outage ends training, and what is left to go on from. (The whole way, with a server: tests/serving.)"""

from pathlib import Path

import pytest

from editrl.errors import OutageError


class Away:
    """Mean value, but for one of its calls."""

    name = "away"

    def __init__(self, call: int):
        self.call, self.calls = call, 0

    def __call__(self, videos, **kwargs):
        self.calls += 1
        if self.calls == self.call:
            raise OutageError("no answer for 600 s")
        return [video.mean().item() for video in videos]


def checkpoints(trainer) -> list[str]:
    return sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))


def test_before_the_first_update_there_is_nothing_to_save(grpo):
    trainer = grpo([Away(1)])
    with pytest.raises(
        OutageError, match=r"reward 'away' failed on .*: no answer for 600 s; .* before its first update"
    ):
        trainer.train()
    assert checkpoints(trainer) == []


def test_after_an_update_it_is_saved_though_no_checkpoint_was_due(grpo):
    trainer = grpo([Away(2)])
    with pytest.raises(
        OutageError, match=r"the run stops with .*checkpoint-1; go on with --resume_from_checkpoint true"
    ):
        trainer.train()
    assert checkpoints(trainer) == ["checkpoint-1"]


def test_a_checkpoint_that_is_there_is_not_written_again(grpo):
    trainer = grpo([Away(2)], save_strategy="steps", save_steps=1)
    save, saved = trainer._save_checkpoint, []
    trainer._save_checkpoint = lambda *args, **kwargs: (saved.append(trainer.state.global_step), save(*args, **kwargs))
    with pytest.raises(OutageError, match=r"the run stops with .*checkpoint-1"):
        trainer.train()
    assert saved == [1]


def test_in_the_middle_of_a_rollout_nothing_is_saved(grpo, pairs):
    """Of two updates a rollout the first is done: no run could continue exactly from here."""
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "evaluate": pairs}
    trainer = grpo([Away(2)], num_iterations=2, **evaluated)
    with pytest.raises(OutageError, match="the run stops at update 1, in the middle of a rollout; an earlier"):
        trainer.train()
    assert checkpoints(trainer) == []
