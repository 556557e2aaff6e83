"""The hack that a reward for source fidelity invites: to return the source. The others have to outweigh it."""

import pytest
import torch

from editrl.data import EditDataset
from editrl.flow import group_advantages
from editrl.recipes.shapes import WEIGHTS
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.world import sample_scenes
from editrl.reward import RewardSet, reward_columns

REWARDS = {"clip_instruction": "clip", "clip_source_fidelity": "clip", "pickscore": "pickscore"}


@pytest.fixture(scope="module")
def scored() -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards [32,3] of the members of 16 groups, the copied source and the wanted edit; groups [32]."""
    dataset = EditDataset(rows(sample_scenes(16, seed=11)))
    examples = [example for index in range(len(dataset)) for example in [dataset[index]] * 2]
    videos = [example.source if k % 2 == 0 else example.target for k, example in enumerate(examples)]
    rewards = RewardSet(list(REWARDS), kwargs={name: {"model": str(WEIGHTS / f)} for name, f in REWARDS.items()})
    return rewards.to("cpu")(videos, reward_columns(examples)), torch.arange(32) // 2


def test_a_copy_has_the_highest_fidelity_there_is(scored):
    copies, edits = scored[0][0::2, 1], scored[0][1::2, 1]
    torch.testing.assert_close(copies, torch.ones(16))
    assert (edits < copies).all()


def test_a_copy_loses_to_the_edit_when_all_three_count(scored):
    rewards, groups = scored
    copies = group_advantages(rewards, groups)[0::2]
    assert (copies < 0).float().mean() >= 0.9
    alone = group_advantages(rewards[:, 1:2], groups)[0::2]
    assert (alone > 0).all(), "by fidelity alone it would win"
