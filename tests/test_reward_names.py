"""`name=spec`: several rewards of one kind, each by a name of its own wherever rewards are given."""

import math

import pytest
import torch

from editrl.cli import main
from editrl.cli.arguments import RewardArguments
from editrl.errors import EditrlError
from editrl.registry import load_reward, register_reward, reward_name, split_alias
from editrl.reward import RewardSet
from editrl.reward_check import check_reward
from editrl.rewards.expression import Expression

CLIPS = [torch.full((1, 3, 4, 4), value) for value in (0.25, 0.5)]


@pytest.fixture
def power(tmp_path) -> str:
    """The spec of a class, in a file."""
    (tmp_path / "mine.py").write_text(
        "class Power:\n"
        "    def __init__(self, exponent=1, name='power'):\n"
        "        self.exponent, self.name = exponent, name\n"
        "    def __call__(self, videos):\n"
        "        return [video.mean().item() ** self.exponent for video in videos]\n"
    )
    return f"{tmp_path / 'mine.py'}:Power"


def test_kwargs_options_and_scores_go_by_these_names(power):
    rewards = RewardSet(
        [f"plain={power}", f"squared-1={power}"],
        weights=[1.0, 0.5],
        kwargs={"squared-1": {"exponent": 2}},
        options={"plain": {"groupwise": True}},
    )
    assert rewards.names == ["plain", "squared-1"] and rewards.groupwise == ["plain"]
    assert rewards(CLIPS, {}, [0, 1]).tolist() == [[0.25, 0.0625], [0.5, 0.25]]


def test_it_wins_over_the_name_that_a_reward_was_constructed_with(power):
    rewards = RewardSet([f"other={power}"], kwargs={"other": {"name": "power of two"}})
    assert rewards.names == ["other"]
    assert load_reward(f"other={power}", name="power of two").name == "other"
    assert load_reward(power, name="power of two").name == "power of two"


def test_errors_use_it():
    @register_reward("never_a_number")
    def broken(videos):
        return [math.nan] * len(videos)

    with pytest.raises(EditrlError, match="reward 'mine' returned nan for sample 0"):
        RewardSet(["mine=never_a_number"])(CLIPS, {})


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("=remote", "'' before the = is no name"),
        ("my quality=remote", "'my quality' before the = is no name"),
        ("a.b=remote", "'a.b' before the = is no name"),
        ("2nd=remote", "'2nd' before the = is no name"),
        ("-x=remote", "'-x' before the = is no name"),
        ("quality=", "nothing follows the ="),
        ("quality=a=b", "no reward is called 'a=b'"),
        ("quality=expresion", "no reward is called 'expresion'. Did you mean 'expression'"),
    ],
)
def test_what_is_no_name_is_refused(spec, wanted):
    with pytest.raises(EditrlError, match=wanted):
        RewardSet([spec])


def test_a_name_means_one_reward(power):
    with pytest.raises(EditrlError, match="reward 'a' is listed twice: give one of them another name, as in other=a"):
        RewardSet([f"a={power}", f"a={power}"])
    with pytest.raises(EditrlError, match="'Power' is listed twice"):
        RewardSet([power, f"Power={power}"])
    with pytest.raises(EditrlError, match="not 'a=b'"):
        register_reward("a=b")


def test_a_folder_may_have_an_equals_sign_in_its_name(power, tmp_path):
    folder = tmp_path / "lr=1"
    folder.mkdir()
    (tmp_path / "mine.py").rename(folder / "mine.py")
    spec = f"{folder}/mine.py:Power"
    assert split_alias(spec) == (None, spec) and reward_name(spec) == "Power"
    assert RewardSet([spec, f"other={spec}"]).names == ["Power", "other"]


def test_a_recipe_gives_arguments_by_name_for_rewards_and_metrics(power):
    arguments = RewardArguments(
        reward_funcs=[f"one={power}", f"two={power}"],
        metric_funcs=[f"three={power}"],
        reward_kwargs={"two": {"exponent": 2}, "three": {"exponent": 3}, "pickscore": {"model": "not asked for"}},
        reward_options={"three": {"batch_size": 1}},
    )
    rewards, metrics = arguments.load([1.0, 1.0])
    assert rewards(CLIPS, {}).tolist() == [[0.25, 0.0625], [0.5, 0.25]]
    assert metrics(CLIPS, {}).tolist() == [[0.015625], [0.125]]


def test_arguments_under_the_name_of_the_kind_would_reach_nobody():
    arguments = RewardArguments(reward_funcs=["quality=pickscore"], reward_kwargs={"pickscore": {"num_frames": 8}})
    with pytest.raises(EditrlError, match=r"reward kwargs for 'pickscore', which is not among the rewards \(quality\)"):
        arguments.load(None)


def test_in_an_expression(power):
    members = {"x": f"first={power}", "y": power}
    expression = Expression("x - y", rewards=members, kwargs={"x": {"exponent": 2}})
    assert RewardSet([expression])(CLIPS, {}).tolist() == [[0.0625 - 0.25], [-0.25]]


def test_rewards_check_takes_one(power, capsys):
    assert main(["rewards", "check", f"mine={power}", "--kwargs", '{"exponent": 2}']) == 0
    assert "runs" in capsys.readouterr().out
    with pytest.raises(EditrlError, match=r"'a\.b' before the = is no name"):
        check_reward(f"a.b={power}")
