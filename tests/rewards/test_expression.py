import math

import pytest
import torch

from editrl.errors import EditrlError
from editrl.reward import RewardSet
from editrl.rewards.expression import Expression


def one(videos):
    return [video.mean().item() for video in videos]


def two(videos, scene):
    return [float(value) if value is not None else None for value in scene]


two.requires = ()
REWARDS = {"a": one, "b": two}


def value(text: str, a: float, b: float | None) -> float | None:
    used = {name: reward for name, reward in REWARDS.items() if name in text.replace("abs", "").replace("max", "")}
    return Expression(text, rewards=used)([torch.full((1, 3, 2, 2), a)], scene=[b])[0]


@pytest.mark.parametrize(
    ("text", "a", "b", "wanted"),
    [
        ("min(a, 0.25) + 0.5 * (b > 20)", 0.5, 21, 0.75),
        ("min(a, 0.25) + 0.5 * (b > 20)", 0.125, 20, 0.125),
        ("-a ** 2 / (b - 1)", 0.5, 3, -0.125),
        ("clip(b, 0, 1) - max(a, b, 0.75)", 0.5, -2, -0.75),
        ("a if b >= 1 else 0", 0.5, 1, 0.5),
        ("where(not b, a, -a)", 0.5, 0, 0.5),
        ("(0 < a < 1) + (a == b) + (a != b)", 0.5, 0.5, 2),
        ("1 + (a > 0 and b > 0) - (a < 0 or b < 0)", 0.5, -1, 0),
        ("log(exp(abs(b))) + a", 0.5, -2, 2.5),
        # None propagates, but only from what the value depends on
        ("a + b", 0.5, None, None),
        ("min(a, b)", 0.5, None, None),
        ("b > 2", 0.5, None, None),
        ("a or b", 0.5, None, None),
        ("b if a > 0.75 else a", 0.5, None, 0.5),
        ("b if a > 0.25 else a", 0.5, None, None),
        ("where(b > 1, a, a)", 0.5, None, None),
    ],
)
def test_values(text, a, b, wanted):
    assert value(text, a, b) == (None if wanted is None else pytest.approx(wanted))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.real", "holds `a.real`"),
        ("a[0]", r"holds `a\[0\]`"),
        ("(lambda: a)()", r"holds `\(lambda: a\)\(\)`"),
        ("__import__('os').system('x') + a", "holds"),
        ("open(a)", r"calls 'open': there are .*min, max"),
        ("mim(a, 1)", "Did you mean 'min'"),
        ("a + 'text'", "holds `'text'`"),
        ("[a for a in b]", "holds"),
        ("a @ b", "holds `MatMult`|holds `a @ b`"),
        ("a := 2", "cannot be read"),
        ("a +", "cannot be read"),
        ("clip(a, 1)", "clip takes 3 arguments"),
        ("min(a)", "min takes 2 or more arguments"),
        ("min(a, key=b)", "holds"),
        ("min(*a, 1)", "holds"),
        ("1 + 2", "names no reward"),
    ],
)
def test_anything_else_is_refused(text, wanted):
    with pytest.raises(EditrlError, match=wanted):
        Expression(text, rewards=REWARDS)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a / (b - b)", r"of \{'a': 0.5, 'b': 4.0\}: ZeroDivisionError"),
        ("log(a - 1) + b", "ValueError"),
        ("9 ** 9 ** 9 ** 9 + a + b", "OverflowError"),
        ("(a - 1) ** 0.5 + b", "complex number"),
    ],
)
def test_a_value_that_cannot_be_is_an_error_with_the_numbers(text, wanted):
    with pytest.raises(EditrlError, match=wanted):
        value(text, 0.5, 4)


def test_members_are_scored_once_and_bring_their_needs_options_and_arguments():
    calls = []

    def needy(videos, source_captions, scale=1.0):
        calls.append(len(videos))
        return [scale * len(caption) for caption in source_captions]

    needy.groupwise = True
    expression = Expression("x + x * x - x", rewards={"x": needy}, kwargs={"x": {"scale": 2.0}})
    assert (expression.requires, expression.groupwise) == ({"source_captions"}, True)
    scores = RewardSet([expression])(
        [torch.zeros(1, 3, 2, 2)] * 3, {"source_captions": ["a", "bc", "def"]}, group_ids=[0, 1, 0]
    )
    assert scores[:, 0].tolist() == [4, 16, 36]
    assert calls == [2, 1]


def test_a_member_that_fails_is_named():
    def broken(videos):
        return [math.nan] * len(videos)

    with pytest.raises(EditrlError, match=r"reward 'expression' failed.*reward 'broken' returned nan for sample 0"):
        RewardSet([Expression("2 * broken", rewards={"broken": broken})])([torch.zeros(1, 3, 2, 2)], {})


def test_unknown_members_are_named():
    with pytest.raises(EditrlError, match="no reward is called 'clip_instructio'"):
        Expression("clip_instructio + 1")
    with pytest.raises(EditrlError, match=r"kwargs of 'pickscore' has 'pickscor'.*Did you mean 'pickscore'"):
        Expression("pickscore", kwargs={"pickscor": {}})
