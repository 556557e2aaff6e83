"""What a served reward asks for, and which rewards can be served."""

import pytest
import torch

from editrl.cli.serve_reward import identity
from editrl.errors import EditrlError
from editrl.reward import RewardSet
from editrl.rewards.expression import Expression
from editrl.serving.service import RewardService


def test_a_reward_that_looks_into_its_kwargs_says_for_what(clips):
    """Else clients would not send it, and the served reward would not be the local one."""
    edited = clips(2)
    columns = {
        "source_videos": [clip * 0.9 for clip in edited],
        "masks": [torch.zeros_like(clip[:, :1]) for clip in edited],
    }
    reward = Expression("preservation / 10")
    service = RewardService(reward, "expression")
    sent = {name: values for name, values in columns.items() if name in service.columns}
    assert sent.keys() == columns.keys()
    expected = RewardSet([reward])(edited, columns)[:, 0].tolist()
    assert service._score({"videos": edited} | sent) == expected
    assert None not in expected


def test_an_attribute_of_the_reward_adds_columns():
    class Looks:
        columns = ("moods",)

        def __call__(self, videos, tasks=None, **kwargs):
            return [0.0] * len(videos)

    assert RewardService(Looks(), "looks").columns == ["moods", "tasks", "videos"]
    assert RewardSet([Looks()]).columns == {"moods", "tasks", "videos"}


def test_a_reward_of_whole_groups_is_refused():
    class Ranks:
        groupwise = True

        def __call__(self, videos, **kwargs):
            return list(range(len(videos)))

    with pytest.raises(EditrlError, match="'ranks' compares the clips of a group, and requests do not say"):
        RewardService(Ranks(), "ranks")


def test_the_identity_is_that_of_file_and_arguments_wherever_they_lie(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "reward.py").write_text("def reward(videos): ...")
    here, there = (f"{tmp_path / folder}/reward.py:reward" for folder in ("here", "there"))
    assert identity(here, {"a": 1, "b": 2}) == identity(f"alias={there}", {"b": 2, "a": 1})
    assert identity(here, {}) != identity(here, {"a": 1})
    (tmp_path / "there" / "reward.py").write_text("def reward(videos): return []")
    assert identity(here, {}) != identity(there, {})
    assert identity("pickscore", {}) != identity("aesthetic", {})
