"""What a reward that stays away (`OutageError`) does to training: it ends with a checkpoint, and can go on from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from editrl.errors import OutageError
from editrl.reward import RewardSet
from editrl.reward_ahead import Ahead
from editrl.trainers.base import COMPLETE

if TYPE_CHECKING:
    from editrl.trainers.grpo import FlowGRPOTrainer


def score(
    trainer: FlowGRPOTrainer,
    scorer: RewardSet,
    videos: list[Tensor],
    columns: dict[str, list],
    groups: Sequence[int],
    ahead: Ahead | None = None,
) -> Tensor:
    """Scores [B,K] of this process' clips. An outage that one process meets is raised in all of them, or the others
    would wait for its scores, and no checkpoint could be written."""
    scores = outage = None
    try:
        scores = scorer(videos, columns, groups, ahead=ahead)
    except OutageError as error:
        outage = error
    if trainer.accelerator.num_processes > 1:
        met = torch.tensor([outage is not None], device=trainer.args.device)
        if trainer.accelerator.gather(met.long()).any() and outage is None:
            raise OutageError("a reward of another process stays away")
    if outage is not None:
        raise outage
    return scores


@contextlib.contextmanager
def saving(trainer: FlowGRPOTrainer) -> Iterator[None]:
    """An outage within this block leaves a checkpoint of the last update, and then goes its way."""
    try:
        yield
    except OutageError as error:
        raise OutageError(f"{error}; {_save(trainer)}") from error


def _save(trainer: FlowGRPOTrainer) -> str:
    """Save what can be continued exactly; what the user can do, in words."""
    step = trainer.state.global_step
    resume = "go on with --resume_from_checkpoint true once it is back"
    if step % trainer.args.updates_per_generation:  # in an evaluation: the rest of this rollout would be lost
        return f"the run stops at update {step}, in the middle of a rollout; an earlier checkpoint can be continued"
    if step == 0:
        return "the run stops before its first update; start it again once it is back"
    folder = Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    # As process 0 sees it: all have to save, or none.
    [is_there] = broadcast_object_list([(folder / COMPLETE).is_file()])
    if not is_there:
        trainer._save_checkpoint(trainer.model, trial=None)
        trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        trainer.accelerator.wait_for_everyone()  # a process that ends now would take the one that writes with it
    return f"the run stops with {folder}; {resume}"
