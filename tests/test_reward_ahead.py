"""Background rewards get clips as they come, and give the scores that they would give for all of them at once."""

import contextlib
import math
import threading

import pytest
import torch

from editrl.errors import EditrlError, OutageError
from editrl.reward import RewardSet
from editrl.reward_ahead import RewardThread
from editrl.rewards.expression import Expression

COLUMNS = {"ids": list("abcdef"), "value": [0, 1, 2, 3, None, 5]}
GROUPS = [7, 8, 7, 8, 9, 7]  # complete with clips 5, 3 and 4


def clips(*values: float, frames: int = 1) -> list[torch.Tensor]:
    return [torch.full((frames, 3, 4, 4), float(value)) for value in values]


CLIPS = clips(0.1, 0.6, 0.2, 0.3, 0.4, 0.15)


def means(videos) -> list[float]:
    return [round(video.mean().item(), 3) for video in videos]


@contextlib.contextmanager
def taken(rewards: RewardSet, *parts: int, videos=CLIPS):
    """An `Ahead` that has got the clips in parts of these sizes."""
    thread, rest = RewardThread(), list(videos)
    ahead = rewards.ahead(thread, COLUMNS, GROUPS)
    for size in parts:
        ahead.add(rest[:size])
        del rest[:size]
    try:
        yield ahead
    finally:
        thread.close()


def scored(rewards: RewardSet, *parts: int) -> torch.Tensor:
    with taken(rewards, *parts) as ahead:
        return rewards(CLIPS, COLUMNS, GROUPS, ahead=ahead)


def reward(**attributes):
    """A background reward that notes which clips each call had."""

    def noting(videos, value=None):
        noting.calls.append(means(videos))
        return [None if v is None else v + video.mean().item() for v, video in zip(value, videos, strict=True)]

    noting.calls = []
    for name, attribute in ({"background": True} | attributes).items():
        setattr(noting, name, attribute)
    return noting


def rank(videos):
    order = sorted(means(videos))
    return [float(order.index(value)) for value in means(videos)]


@pytest.mark.parametrize("parts", [(6,), (1, 1, 1, 1, 1, 1), (2, 2, 2), (4, 2), (1, 5)])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_scores_are_those_of_one_call(parts, batch_size):
    def here(videos):
        return [value * 2 for value in means(videos)]

    options = {"rank": {"groupwise": True, "background": True}}
    rewards = RewardSet([reward(), here, rank], options=options, batch_size=batch_size)
    assert rewards.background == ["noting", "rank"]
    apart, together = scored(rewards, *parts), rewards(CLIPS, COLUMNS, GROUPS)
    assert torch.equal(apart.nan_to_num(-1), together.nan_to_num(-1))
    assert apart[4, 0].isnan() and apart[:, 2].tolist() == [0, 1, 2, 0, 0, 1]


def test_it_is_asked_for_what_is_there_in_its_batches():
    small, set_of_two = reward(batch_size=2), reward()
    scored(RewardSet([small]), 3, 3)
    assert small.calls == [[0.1, 0.6], [0.2], [0.3, 0.4], [0.15]]
    scored(RewardSet([set_of_two], batch_size=2), 3, 3)
    assert set_of_two.calls == small.calls


def test_a_groupwise_reward_gets_a_group_when_it_is_complete():
    groupwise = reward(groupwise=True)
    with taken(RewardSet([groupwise]), 4) as ahead:
        list(ahead.scores("noting"))
        assert groupwise.calls == [[0.6, 0.3]]
        ahead.add(CLIPS[4:])
        assert [part for part, _ in ahead.scores("noting")] == [[1, 3], [0, 2, 5], [4]]
    assert groupwise.calls[1:] == [[0.1, 0.2, 0.15], [0.4]]


def test_it_is_shown_the_frames_it_wants():
    seen = []

    def looks(videos):
        seen.extend(map(len, videos))
        return [0.0] * len(videos)

    rewards = RewardSet([looks], options={"looks": {"frames": 2, "background": True}})
    with taken(rewards, 3, 3, videos=clips(*[0] * 6, frames=5)) as ahead:
        list(ahead.scores("looks"))
    assert seen == [2] * 6


@pytest.mark.parametrize(
    ("result", "wanted"),
    [
        ([0.0, math.nan], r"reward 'culprit' returned nan for sample 3 \(id 'd'\)"),
        ([0.0], r"reward 'culprit' returned 1 values for 2 videos \(sample 2 \(id 'c'\) to sample 3 \(id 'd'\)\)"),
        (KeyError("face"), r"reward 'culprit' failed on sample 2 \(id 'c'\) to sample 3 \(id 'd'\): KeyError: 'face'"),
        (OutageError("no answer"), r"reward 'culprit' failed on sample 2 .*: OutageError: no answer"),
    ],
)
def test_a_failure_comes_out_with_reward_and_sample_and_ends_the_asking(result, wanted):
    asked = []

    def culprit(videos):
        asked.append(means(videos))
        if len(asked) < 2:
            return [0.0] * len(videos)
        if isinstance(result, Exception):
            raise result
        return result

    innocent = reward()
    rewards = RewardSet([innocent, culprit], options={"culprit": {"background": True}})
    with pytest.raises(EditrlError, match=wanted) as caught:
        scored(rewards, 2, 2, 2)
    assert isinstance(caught.value, OutageError) == isinstance(result, OutageError)
    assert asked == [[0.1, 0.6], [0.2, 0.3]] and len(innocent.calls) == 2


def test_closing_drops_what_has_not_begun_and_waits_for_nothing():
    began, go_on, calls = threading.Event(), threading.Event(), []

    def slow(videos):
        calls.append(means(videos))
        began.set()
        assert go_on.wait(10)
        return means(videos)

    with taken(RewardSet([slow], options={"slow": {"background": True}}), 2, 2, 2):
        assert began.wait(10)
    assert not go_on.is_set()  # the block is left, and the call still runs
    go_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("rewards"):
            thread.join(10)
    assert calls == [[0.1, 0.6]]


def test_scores_of_other_clips_are_not_taken():
    rewards = RewardSet([reward()])
    with taken(rewards, 4) as ahead, pytest.raises(EditrlError, match="4 clips were taken ahead, but 6 are scored"):
        rewards(CLIPS, COLUMNS, GROUPS, ahead=ahead)


def test_an_expression_of_background_rewards_is_one_and_passes_a_cancel_on():
    waits = reward(cancel=lambda: cancelled.append(True))
    cancelled = []

    def here(videos):
        return means(videos)

    alone = Expression("2 * x", rewards={"x": waits})
    assert alone.background and not Expression("x + y", rewards={"x": waits, "y": here}).background
    rewards = RewardSet([alone, here])
    assert rewards.background == ["expression"]
    rewards.cancel()
    assert cancelled == [True]
