"""Rewards that are asked while the rest of a rollout is still being sampled."""

import math
import threading
from pathlib import Path

import pytest

from editrl.errors import EditrlError, OutageError
from editrl.reward import RewardSet
from editrl.trainers import sampling

FOUR_PARTS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}  # of two clips; groups have four


def brightness(videos, **kwargs):
    return [video.mean().item() for video in videos]


def redness(videos, **kwargs):
    return [(video[:, 0] - video[:, 1:].mean(1)).mean().item() for video in videos]


def rank(videos):
    order = sorted(brightness(videos))
    return [float(order.index(value)) for value in brightness(videos)]


def in_background(reward, **options) -> RewardSet:
    return RewardSet([reward], options={reward.__name__: {"background": True} | options})


@pytest.fixture
def watched(monkeypatch):
    """(before) -> notes each micro-batch that is sampled; `before` is called with the number of those before it."""

    def watch(before) -> list[int]:
        sampled, rollout = [], sampling.rollout

        def noting(*args, **kwargs):
            before(len(sampled))
            sampled.append(len(sampled))
            return rollout(*args, **kwargs)

        monkeypatch.setattr(sampling, "rollout", noting)
        return sampled

    return watch


def test_it_is_asked_for_the_first_clips_before_the_last_are_sampled(grpo, watched):
    asked = threading.Event()
    when, sampled = [], watched(lambda number: number == 3 and asked.wait(10))

    def slow(videos):
        when.append(len(sampled))
        asked.set()
        return brightness(videos)

    grpo(in_background(slow), max_steps=1, **FOUR_PARTS).train()
    assert len(sampled) == 4 and len(when) == 4
    assert when[0] < 4


def test_others_are_asked_when_all_are_sampled(grpo, watched):
    when, sampled = [], watched(lambda number: None)

    def slow(videos):
        when.append(len(sampled))
        return brightness(videos)

    grpo([slow], max_steps=1, **FOUR_PARTS).train()
    assert when == [4]


def test_a_run_is_the_same_with_and_without(grpo, updates, weights, equal):
    runs = []
    for background in (False, True):
        options = {"brightness": {"background": background}, "rank": {"background": background, "groupwise": True}}
        metrics = RewardSet([rank], options={"rank": options["rank"]})
        rewards = RewardSet([brightness, redness, rank], options=options)
        trainer = grpo(rewards, metrics=metrics, **FOUR_PARTS)
        trainer.train()
        runs.append((trainer, [{k: v for k, v in log.items() if "seconds" not in k} for log in updates(trainer)]))
    (plain, plain_logs), (ahead, ahead_logs) = runs
    assert plain_logs == ahead_logs and ahead_logs[0]["rewards/rank/mean"] == ahead_logs[0]["metrics/rank/mean"] == 1.5
    assert equal(weights(plain), weights(ahead))
    for log in updates(ahead):
        phases = [log[f"seconds/{phase}"] for phase in ("rollout", "decode", "reward", "train")]
        assert min(phases) > 0
        names = ("brightness", "redness", "rank")
        assert 0 < sum(log[f"seconds/reward/{name}"] for name in names) <= log["seconds/reward"]


@pytest.mark.parametrize(
    ("wrong", "wanted"),
    [
        ([0.0, math.nan], r"reward 'culprit' returned nan for sample 5 \(id '[\w-]+'\)"),
        ([0.0], r"reward 'culprit' returned 1 values for 2 videos \(sample 4 .* to sample 5"),
        (
            RuntimeError("out of luck"),
            r"reward 'culprit' failed on sample 4 .* to sample 5 .*RuntimeError: out of luck",
        ),
    ],
)
def test_what_goes_wrong_in_the_background_stops_the_run(grpo, wrong, wanted):
    calls = []

    def culprit(videos):
        calls.append(len(videos))
        if len(calls) < 3:
            return brightness(videos)
        if isinstance(wrong, Exception):
            raise wrong
        return wrong

    with pytest.raises(EditrlError, match=wanted):
        grpo(in_background(culprit), **FOUR_PARTS).train()
    assert calls == [2, 2, 2]


def test_an_outage_leaves_a_checkpoint(grpo):
    calls = []

    def away(videos):
        calls.append(len(videos))
        if len(calls) == 6:  # of four a rollout
            raise OutageError("no answer for 600 s")
        return brightness(videos)

    trainer = grpo(in_background(away), **FOUR_PARTS)
    with pytest.raises(OutageError, match=r"sample 2 .*no answer for 600 s; the run stops with .*checkpoint-1; go on"):
        trainer.train()
    assert [path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_rollout_that_fails_waits_for_nothing(grpo, watched, error):
    asked, go_on, calls, cancelled = threading.Event(), threading.Event(), [], []

    def fails(number: int) -> None:
        if number == 3:
            assert asked.wait(10)
            raise error("in the rollout")

    def slow(videos):
        calls.append(len(videos))
        asked.set()
        assert go_on.wait(10)
        return brightness(videos)

    slow.cancel = lambda: cancelled.append(go_on.is_set())
    watched(fails)
    with pytest.raises(error, match="in the rollout"):
        grpo(in_background(slow), **FOUR_PARTS).train()
    assert cancelled == [False]  # while the first call still ran
    go_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("rewards"):
            thread.join(10)
    assert calls == [2]


def test_a_phase_within_another_counts_by_itself_only(grpo, monkeypatch):
    """As decoding within a rollout does."""
    trainer, now = grpo([brightness]), 100.0
    monkeypatch.setattr("editrl.trainers.base.time.perf_counter", lambda: now)
    with trainer.timed("rollout"):
        now += 1
        with trainer.timed("decode"):
            now += 2
        now += 4
    assert trainer._seconds == {"rollout": 5, "decode": 2}
