"""`editrl rewards check`: each fault that a reward may have is found, and a sound one passes."""

import random
import textwrap
import time

import pytest
import torch

from editrl.cli import main
from editrl.reward_check import check_reward
from editrl.rewards.preservation import preservation

SOUND = """
    def mine(videos, **kwargs):
        return [video.mean().item() for video in videos]
"""


@pytest.fixture
def check(tmp_path, capsys):
    """(code of `mine`, arguments) -> (exit code, verdict and text by check)"""

    def run(code: str, *arguments: str):
        (tmp_path / "my_file.py").write_text(textwrap.dedent(code))
        exit_code = main(["rewards", "check", f"{tmp_path / 'my_file.py'}:mine", *arguments])
        *lines, summary = capsys.readouterr().out.splitlines()
        assert summary.startswith(f"{len(lines)} checks: ")
        split = [line.split("  ", 1) for line in lines]
        return exit_code, {check: tuple(rest.split(maxsplit=1)) for check, rest in split}

    return run


def test_a_sound_reward_passes(check):
    code, findings = check(SOUND)
    assert code == 0
    assert {verdict for verdict, _ in findings.values()} == {"ok"}
    checks = ("runs", "scores", "inputs", "spread", "deterministic", "batch", "order", "images", "speed")
    assert set(checks) <= set(findings)


def verdicts(reward, **options):
    return {finding.check: finding.verdict for finding in check_reward(reward, **options)}


def bad(verdict_by_check):
    return {check: verdict for check, verdict in verdict_by_check.items() if verdict in ("fail", "warn")}


def means(videos):
    return [video.mean().item() for video in videos]


@pytest.mark.parametrize(
    ("result", "name", "wanted"),
    [
        ("[0.5]", "scores", "returned 1 values for 4 videos"),
        ("[float('nan')] * len(videos)", "scores", "returned nan for sample 0"),
        ("[float('inf')] * len(videos)", "scores", "returned inf"),
        ("['good'] * len(videos)", "scores", "returned str"),
        ("0.5", "scores", "returned float"),
        ("1 / 0", "runs", "ZeroDivisionError"),
    ],
)
def test_what_is_no_list_of_numbers_fails(check, result, name, wanted):
    code, findings = check(f"def mine(videos, **kwargs):\n    return {result}\n")
    assert code == 1
    [(found, (verdict, text))] = findings.items()
    assert (found, verdict) == (name, "fail")
    assert wanted in text


def test_a_constant_fails():
    assert bad(verdicts(lambda videos: [0.5] * len(videos))) == {"spread": "fail", "whole clip": "warn"}


def test_a_reward_that_is_not_deterministic_fails():
    drawn = random.Random(0)
    found = verdicts(lambda videos: [value + drawn.random() for value in means(videos)])
    assert found["deterministic"] == "fail"


def test_a_reward_that_depends_on_its_batch_fails():
    found = bad(verdicts(lambda videos: [value - max(means(videos)) for value in means(videos)]))
    assert found == {"batch": "fail"}


def test_a_reward_that_depends_on_the_order_fails():
    found = bad(verdicts(lambda videos: [value + i for i, value in enumerate(means(videos))]))
    assert found == {"batch": "fail", "order": "fail"}


def test_a_groupwise_reward_may_compare_the_clips_of_its_group():
    def ranked(videos):
        return [float(sorted(means(videos)).index(value)) for value in means(videos)]

    assert "batch" in bad(verdicts(ranked))
    ranked.groupwise = True
    assert bad(verdicts(ranked)).keys() <= {"whole clip"}


def test_a_background_reward_is_checked_like_any_other():
    def waits(videos):
        return means(videos)

    waits.background = True
    assert bad(verdicts(waits)) == {}


@pytest.mark.parametrize("column", ["videos", "source_videos", "masks"])
def test_a_reward_that_changes_its_inputs_fails(column):
    def careless(videos, **columns):
        for clip in ({"videos": videos} | columns)[column]:
            clip.mul_(0.5)
        return means(videos)

    findings = {finding.check: finding for finding in check_reward(careless)}
    assert findings["inputs"].verdict == "fail"
    assert f"changes {column}," in findings["inputs"].text


def test_a_slow_reward_is_warned_about():
    def slow(videos):
        time.sleep(0.02 * len(videos))
        return means(videos)

    assert bad(verdicts(slow, slow=0.01)) == {"speed": "warn"}
    assert bad(verdicts(slow, slow=5)) == {}


def test_a_reward_that_raises_on_images_fails_and_one_that_says_none_does_not():
    def motion(videos):
        if any(len(video) < 2 for video in videos):
            raise ValueError("no motion in one frame")
        return [video.diff(dim=0).abs().mean().item() for video in videos]

    def careful(videos):
        return [motion([video])[0] if len(video) > 1 else None for video in videos]

    assert bad(verdicts(motion)) == {"images": "fail"}
    assert bad(verdicts(careful)) == {}
    assert verdicts(careful)["images"] == "info"


def test_a_reward_that_raises_without_a_mask_fails_unless_it_requires_one():
    def lazy(videos, masks=None):
        return [(video * mask).mean().item() for video, mask in zip(videos, masks, strict=True)]

    assert bad(verdicts(lazy)) == {"optional columns": "fail"}

    def strict(videos, masks):
        return lazy(videos, masks)

    assert bad(verdicts(strict)) == {}
    assert bad(verdicts(preservation)) == {}


def test_a_reward_that_sees_one_frame_is_warned_about():
    assert bad(verdicts(lambda videos: [video[0].mean().item() for video in videos])) == {"whole clip": "warn"}


def test_arguments_and_columns_are_passed_on(check):
    code = """
        def mine(videos, scene, gain=0.0):
            return [gain * s * v.mean().item() for v, s in zip(videos, scene)]
    """
    assert check(code, "--kwargs", '{"gain": 2}', "--columns", '{"scene": 3}')[0] == 0
    assert check(code, "--columns", '{"scene": 3}')[1]["spread"][0] == "fail"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["nowhere.py:mine"], "there is no file"),
        (["pickscor"], "Did you mean 'pickscore'"),
        (["pickscore", "--kwargs", "[1]"], "invalid JSON object value: '[1]'"),
        (["pickscore", "--kwargs", '{"mode": 1}'], "mode"),
        ([], "the following arguments are required: reward"),
    ],
)
def test_what_cannot_be_checked_is_an_error(arguments, wanted, capsys):
    assert main(["rewards", "check", *arguments]) == 2
    assert wanted in capsys.readouterr().err


def test_a_column_that_the_samples_do_not_have_is_asked_for(tmp_path, capsys):
    (tmp_path / "needs.py").write_text("def mine(videos, scene):\n    return [1.0] * len(videos)\n")
    assert main(["rewards", "check", f"{tmp_path / 'needs.py'}:mine"]) == 2
    assert "needs the column 'scene'" in capsys.readouterr().err


def test_samples_are_the_same_every_time():
    from editrl.reward_check import SIZES, sample

    for i in range(len(SIZES)):
        one, other = sample(i), sample(i)
        assert torch.equal(one[0], other[0]) and torch.equal(one[1].source, other[1].source)
        assert one[0].shape == one[1].source.shape and one[1].mask.any()
        assert one[0].min() >= 0 and one[0].max() <= 1
