"""How rewards ask to be called, and weights that change in the course of a run."""

import math

import pytest
import torch

from editrl.cli.arguments import RewardArguments
from editrl.errors import EditrlError
from editrl.registry import load_reward, register_reward
from editrl.reward import RewardSet
from editrl.reward_options import RewardOptions, frame_indices
from editrl.reward_weights import read_schedule


def clips(*values: float, frames: int = 1) -> list[torch.Tensor]:
    return [torch.full((frames, 3, 4, 4), float(value)) for value in values]


class Rank:
    """Place of each clip within its group, by brightness."""

    groupwise = True

    def __init__(self):
        self.calls = []

    def __call__(self, videos):
        means = [video.mean().item() for video in videos]
        self.calls.append([round(mean, 3) for mean in means])
        return [float(sorted(means).index(mean)) for mean in means]


def counted(**attributes):
    """A reward that notes how many clips each call had."""

    def reward(videos):
        reward.sizes.append(len(videos))
        return [video.mean().item() for video in videos]

    reward.sizes = []
    for name, value in attributes.items():
        setattr(reward, name, value)
    return reward


# --- groups


@pytest.mark.parametrize("batch_size", [None, 1, 3, 4])
def test_a_groupwise_reward_sees_each_group_whole_and_alone(batch_size):
    rank, each = Rank(), counted()
    scores = RewardSet([rank, each], batch_size=batch_size)(
        clips(0.1, 0.9, 0.2, 0.8, 0.3), {}, group_ids=[7, 2**60, 7, 2**60, 7]
    )
    assert scores[:, 0].tolist() == [0, 1, 1, 0, 2]
    assert rank.calls == [[0.1, 0.2, 0.3], [0.9, 0.8]]
    torch.testing.assert_close(scores[:, 1], torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3]))


def test_without_group_ids_a_groupwise_reward_is_refused():
    rewards = RewardSet([Rank()])
    assert rewards.groupwise == ["Rank"]
    with pytest.raises(EditrlError, match="'Rank' compares the clips of a group, but no group_ids were given"):
        rewards(clips(0, 1), {})
    with pytest.raises(EditrlError, match="there are 1 group_ids for 2 videos"):
        rewards(clips(0, 1), {}, [0])


# --- batch size


def test_each_reward_has_its_own_batch_size_and_all_share_the_cache():
    small, large = counted(batch_size=2), counted()
    small.__name__, large.__name__ = "small", "large"
    RewardSet([small, large])(clips(*[0] * 5), {})
    assert (small.sizes, large.sizes) == ([2, 2, 1], [5])

    def shared(videos, cache):
        cache["clips"] = cache.get("clips", 0) + len(videos)
        return [float(cache["clips"])] * len(videos)

    assert RewardSet([shared], options={"shared": {"batch_size": 2}})(clips(0, 0, 0), {})[:, 0].tolist() == [2, 2, 3]


# --- frames


@pytest.mark.parametrize(
    ("frames", "wanted"), [("all", [0, 1, 2, 3, 4, 5]), (2, [1, 4]), ("keyframes", [0, 2, 5]), (9, [0, 1, 2, 3, 4, 5])]
)
def test_frames_are_chosen_alike_from_everything_that_has_frames(frames, wanted):
    video = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 2, 2)
    seen = {}

    def looks(videos, source_videos, masks, target_videos=None):
        seen.update(videos=videos, source_videos=source_videos, masks=masks, target_videos=target_videos)
        return [0.0]

    columns = {"source_videos": [video + 1], "masks": [video[:, :1]], "target_videos": [None]}
    RewardSet([looks], options={"looks": {"frames": frames}})([video], columns)
    assert seen["videos"][0][:, 0, 0, 0].tolist() == wanted
    assert seen["source_videos"][0][:, 0, 0, 0].tolist() == [index + 1 for index in wanted]
    assert seen["masks"][0][:, 0, 0, 0].tolist() == wanted
    assert seen["target_videos"] == [None]


def test_keyframes_of_short_clips_are_looked_at_once():
    assert [frame_indices(count, "keyframes") for count in (1, 2, 3)] == [[0], [0, 1], [0, 1, 2]]


def test_chosen_frames_of_one_clip_are_one_tensor():
    """By its identity rewards that share a model recognise a clip."""
    seen = []

    def first(videos, source_videos, cache):
        seen.extend(map(id, source_videos))
        return [0.0] * len(videos)

    def second(videos, source_videos, cache):
        return first(videos, source_videos, cache)

    source = torch.rand(6, 3, 2, 2)
    options = {name: {"frames": 2} for name in ("first", "second")}
    RewardSet([first, second], options=options)(clips(0, 1, frames=6), {"source_videos": [source, source]})
    assert len(seen) == 4 and len(set(seen)) == 1


# --- where models are kept


class Model:
    def __init__(self, keep_on="gpu"):
        self.keep_on, self.moves = keep_on, []

    def to(self, device):
        self.moves.append(device)

    def __call__(self, videos):
        self.moves.append("scored")
        return [1.0] * len(videos)


@pytest.mark.parametrize(
    ("keep_on", "moves"),
    [("gpu", ["cuda", "scored"]), ("cpu", ["cpu", "scored"]), ("between", ["cpu", "cuda", "scored", "cpu"])],
)
def test_models_are_kept_where_they_ask_to_be(keep_on, moves):
    model = Model(keep_on)
    RewardSet([model]).to("cuda")(clips(0, 1), {})
    assert model.moves == moves


def test_a_model_goes_back_when_scoring_fails():
    class Fails(Model):
        def __call__(self, videos):
            raise RuntimeError("broken")

    model = Fails("between")
    with pytest.raises(EditrlError, match="broken"):
        RewardSet([model]).to("cuda")(clips(0), {})
    assert model.moves[-1] == "cpu"


# --- where options come from


def test_the_decorator_takes_options_and_bound_arguments_keep_them():
    @register_reward("ranked_by_decorator", groupwise=True, frames="keyframes")
    def ranked(videos, power=1):
        return [1.0] * len(videos)

    assert RewardOptions.of("x", ranked, {}) == RewardOptions(groupwise=True, frames="keyframes")
    assert RewardOptions.of("x", load_reward("ranked_by_decorator", power=2), {}).groupwise
    assert RewardSet(["ranked_by_decorator"], kwargs={"ranked_by_decorator": {"power": 2}}).groupwise
    assert RewardOptions.of("x", ranked, {"frames": 4}).frames == 4  # a recipe has the last word


def test_a_recipe_gives_options_by_name_for_rewards_and_metrics(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def one(videos):\n    return [0.0] * len(videos)\n\n\n"
        "def two(videos):\n    return [float(len(videos))] * len(videos)\n"
    )
    arguments = RewardArguments(
        reward_funcs=[f"{tmp_path / 'mine.py'}:one"],
        metric_funcs=[f"{tmp_path / 'mine.py'}:two"],
        reward_options={"one": {"groupwise": True}, "two": {"batch_size": 2}},
    )
    rewards, metrics = arguments.load([{"start": 1.0, "end": 0.5, "steps": 10}])
    assert rewards.groupwise == ["one"] and rewards.weights_at(10).tolist() == [0.5]
    assert metrics(clips(0, 0, 0), {})[:, 0].tolist() == [2, 2, 1]
    arguments.reward_options["tow"] = {"batch_size": 2}
    with pytest.raises(EditrlError, match="reward options for 'tow'"):
        arguments.load(None)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"frame": 3}, "no 'frame' among .* Did you mean 'frames'"),
        ({"frames": 0}, "frames is 0: give a positive whole number or 'all', 'keyframes'"),
        ({"frames": "some"}, "frames is 'some'"),
        ({"batch_size": True}, "batch_size is True"),
        ({"groupwise": 1}, "groupwise is 1"),
        ({"background": "yes"}, "background is 'yes'"),
        ({"background": True, "keep_on": "between"}, "drop keep_on 'between'"),
        ({"keep_on": "gpus"}, "keep_on is 'gpus'.*Did you mean 'gpu'"),
        ({"keep_on": "between"}, r"needs a method `to\(device\)`"),
        ({"groupwise": True, "batch_size": 2}, "sees a whole group at a time"),
    ],
)
def test_wrong_options_are_refused(options, wanted):
    with pytest.raises(EditrlError, match=wanted):
        RewardSet([counted()], options={"reward": options})


def test_unknown_names_and_decorator_options_are_refused():
    with pytest.raises(EditrlError, match=r"reward options for 'rewards'.*Did you mean 'reward'"):
        RewardSet([counted()], options={"rewards": {}})
    with pytest.raises(EditrlError, match="Did you mean 'groupwise'"):
        register_reward("never_registered", group_wise=True)


# --- weights


def test_weights_follow_their_schedules():
    rewards = RewardSet(
        [counted(__name__=name) for name in "abcd"],
        weights=[
            0.5,
            {"start": 1.0, "end": 0.2, "steps": 200},
            {"start": 0.0, "end": 1.0, "steps": 4, "shape": "cosine"},
            [[2, 1.0], [4, 3.0], [5, 0.0]],
        ],
    )
    assert rewards.weights.tolist() == [0.5, 1.0, 0.0, 1.0]
    torch.testing.assert_close(rewards.weights_at(3), torch.tensor([0.5, 0.988, (1 + math.sqrt(0.5)) / 2, 2.0]))
    assert rewards.weights_at(10**6).tolist() == pytest.approx([0.5, 0.2, 1.0, 0.0])
    assert [schedule.constant for schedule in rewards.schedules] == [True, False, False, False]


def test_weights_that_all_end_at_zero_are_refused():
    fade = {"start": 1.0, "end": 0.0, "steps": 20}
    with pytest.raises(EditrlError, match="at update 20 the weights of all rewards are 0"):
        RewardSet([counted()], weights=[fade])
    RewardSet([counted(), counted(__name__="other")], weights=[fade, 0.1])


@pytest.mark.parametrize(
    ("weight", "wanted"),
    [
        ("much", "the weight of reward 'r' is 'much': give a number"),
        (math.nan, "the weight of reward 'r' is nan"),
        (True, "is True"),
        ([], r"is \[\]"),
        ({"start": 1.0, "end": 0.0}, "has no 'steps'"),
        ({"start": 1.0, "end": 0.0, "step": 3}, "Did you mean 'steps'"),
        ({"start": 1.0, "end": 0.0, "steps": 1.5}, "steps is 1.5"),
        ({"start": 1.0, "end": 0.0, "steps": 2, "shape": "step"}, "shape is 'step'"),
        ({"start": 1.0, "end": math.inf, "steps": 2}, "at its end, is inf"),
        ([[0, 1.0], [0, 2.0]], "must be at least 0 and rise, got 0"),
        ([[0, 1.0, 2]], "has the point"),
        ([[0, "x"]], "at update 0, is x"),
    ],
)
def test_wrong_schedules_are_refused(weight, wanted):
    with pytest.raises(EditrlError, match=wanted):
        read_schedule(weight, "r")
