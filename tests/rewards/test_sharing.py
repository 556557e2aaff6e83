"""CLIP rewards inside a RewardSet: one image pass a batch, and scores that do not depend on who stands beside whom."""

import pytest
import torch

from editrl.registry import list_rewards, load_reward
from editrl.reward import RewardSet
from editrl.rewards.aesthetic import Aesthetic
from editrl.rewards.backbone import load_backbone
from editrl.rewards.clip import ClipFrameConsistency, ClipInstruction, ClipSourceFidelity
from editrl.rewards.expression import Expression
from editrl.rewards.pickscore import PickScore

NAMES = ["clip_instruction", "clip_source_fidelity", "pickscore"]


@pytest.fixture
def reward_set(tiny_clip):
    return lambda **kwargs: RewardSet(NAMES, kwargs={name: {"model": tiny_clip} for name in NAMES}, **kwargs)


@pytest.fixture
def batch():
    """Two groups of three edits; the source of a group is one tensor, as the data set gives it."""
    generator = torch.Generator().manual_seed(4)
    first, second = torch.rand(2, 5, 3, 40, 48, generator=generator)
    videos = [torch.rand(5, 3, 40, 48, generator=generator) for _ in range(6)]
    columns = {
        "source_videos": [first] * 3 + [second] * 3,
        "source_captions": ["a red ball"] * 3 + ["a cube"] * 3,
        "target_captions": ["a blue ball"] * 3 + ["a cone"] * 3,
    }
    return videos, columns


@pytest.fixture
def count_frames(tiny_clip):
    """The sizes of the image tower's forwards."""
    backbone = load_backbone(tiny_clip)  # held here, so that the rewards get the same one
    sizes = []
    hook = backbone.model.vision_model.register_forward_hook(
        lambda module, inputs, output: sizes.append(len(output[0]))
    )
    yield sizes
    hook.remove()


def test_every_distinct_frame_passes_the_image_tower_once(reward_set, batch, count_frames):
    reward_set()(*batch)
    assert count_frames == [6 * 5, 2 * 5]  # the edited clips, then one source a group; PickScore adds none


def test_the_shared_cache_does_not_outlive_a_call(reward_set, batch, count_frames):
    rewards = reward_set()
    assert torch.equal(rewards(*batch), rewards(*batch))
    assert count_frames == [30, 10, 30, 10]


def test_frame_policies_do_not_share_embeddings(tiny_clip, batch):
    alone = RewardSet([ClipSourceFidelity(tiny_clip, num_frames=2)])(*batch)
    beside = RewardSet([ClipInstruction(tiny_clip), ClipSourceFidelity(tiny_clip, num_frames=2)])(*batch)
    assert torch.equal(alone[:, 0], beside[:, 1])


def test_scores_are_those_of_each_reward_alone(reward_set, tiny_clip, batch):
    videos, columns = batch
    together = reward_set()(*batch)
    for k, reward in enumerate([ClipInstruction(tiny_clip), ClipSourceFidelity(tiny_clip), PickScore(tiny_clip)]):
        torch.testing.assert_close(together[:, k], torch.tensor(reward(videos, **columns)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_scores_do_not_depend_on_order_or_batch_size(reward_set, batch, batch_size):
    videos, columns = batch
    wanted = reward_set()(videos, columns)
    order = [4, 0, 5, 2, 1, 3]
    shuffled = {name: [values[i] for i in order] for name, values in columns.items()}
    scores = reward_set(batch_size=batch_size)([videos[i] for i in order], shuffled)
    torch.testing.assert_close(scores, wanted[order], atol=1e-5, rtol=0)


@pytest.fixture
def every_clip_reward(tiny_clip, tmp_path):
    torch.manual_seed(0)
    torch.save(torch.nn.Linear(24, 1).state_dict(), tmp_path / "head.pth")
    return [
        ClipInstruction(tiny_clip),
        ClipSourceFidelity(tiny_clip),
        PickScore(tiny_clip),
        ClipFrameConsistency(tiny_clip),
        Aesthetic(str(tmp_path / "head.pth"), tiny_clip),
        Expression("full * 2 - directional", rewards={name: forms[name](tiny_clip) for name in forms}),
    ]


forms = {
    "full": lambda model: ClipInstruction(model, form="full"),
    "directional": lambda model: ClipInstruction(model, form="directional"),
}


def test_all_of_them_share_one_forward_of_the_edited_clips_and_one_of_the_sources(
    every_clip_reward, batch, count_frames
):
    RewardSet(every_clip_reward)(*batch)
    assert count_frames == [6 * 5, 2 * 5]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_none_of_them_depends_on_order_or_batch_size(every_clip_reward, batch, batch_size):
    videos, columns = batch
    wanted = RewardSet(every_clip_reward)(videos, columns)
    order = [4, 0, 5, 2, 1, 3]
    shuffled = {name: [values[i] for i in order] for name, values in columns.items()}
    scores = RewardSet(every_clip_reward, batch_size=batch_size)([videos[i] for i in order], shuffled)
    torch.testing.assert_close(scores, wanted[order], atol=1e-5, rtol=1e-5)
    assert (wanted.std(0) > 1e-5).all()


def test_needs_are_read_off_the_signatures(reward_set):
    assert reward_set().requires == {"source_videos", "source_captions", "target_captions"}


def test_all_three_are_installed_under_their_names():
    listed = {entry.name: entry.summary for entry in list_rewards()}
    assert all(listed[name] for name in NAMES)
    assert [type(load_reward(name)) for name in NAMES] == [ClipInstruction, ClipSourceFidelity, PickScore]
