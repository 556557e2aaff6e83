import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editrl.data import EditDataset, EditExample
from editrl.errors import EditrlError
from editrl.registry import register_reward
from editrl.reward import COLUMNS, RewardSet, reward_columns


def brightness(videos, **kwargs):
    return [video.mean().item() for video in videos]


def clips(*values: float) -> list[torch.Tensor]:
    return [torch.full((1, 3, 16, 16), float(value)) for value in values]


def example(name: str, **fields) -> EditExample:
    return EditExample(**{"id": name, "instruction": f"edit {name}", "source": torch.zeros(1, 3, 16, 16)} | fields)


def dataset(*rows: dict) -> EditDataset:
    filled = [{"instruction": "make it red", "source": torch.zeros(1, 3, 16, 16)} | row for row in rows]
    return EditDataset(filled)


def message(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- what a reward is offered


def test_columns_carry_every_field_and_every_extra_column():
    source = torch.rand(1, 3, 16, 16)
    examples = [
        example("a", source=source, target_caption="red", extra={"scene": {"n": 1}}),
        example("b", source_caption="blue", extra={"difficulty": 3}),
    ]
    columns = reward_columns(examples)
    assert columns["ids"] == ["a", "b"]
    assert columns["instructions"] == ["edit a", "edit b"]
    assert columns["source_captions"] == [None, "blue"]
    assert columns["target_captions"] == ["red", None]
    assert columns["scene"] == [{"n": 1}, None]
    assert columns["difficulty"] == [None, 3]
    assert columns["source_videos"][0] is source  # not a copy: rewards recognise a repeated source by its identity
    assert set(COLUMNS) <= set(columns)
    assert all(len(values) == 2 for values in columns.values())


@pytest.mark.parametrize("name", ["videos", "cache", "instructions"])
def test_an_extra_column_cannot_take_an_offered_name(name):
    with pytest.raises(EditrlError, match=f"column is called '{name}'.*rename"):
        reward_columns([example("a", extra={name: 1})])
    with pytest.raises(EditrlError, match=f"column is called '{name}'.*rename"):
        RewardSet([brightness]).check(dataset({name: 1}))


def test_a_reward_with_kwargs_gets_everything():
    seen = {}

    def curious(videos, **kwargs):
        seen.update(kwargs)
        return [0.0 for _ in videos]

    RewardSet([curious])(clips(0.5), {"instructions": ["x"], "scene": [7]})
    assert seen == {"instructions": ["x"], "scene": [7], "cache": {}}


def test_a_function_without_kwargs_gets_only_what_it_names():
    def strict(videos, scene):
        return [float(value) for value in scene]

    scores = RewardSet([strict, partial(strict)])  # a partial has no __name__ of its own
    assert scores.names == ["strict", "partial"]
    assert scores(clips(0, 0), {"scene": [1, 2], "instructions": ["x", "y"]})[:, 0].tolist() == [1, 2]


def test_a_module_is_asked_for_what_its_forward_names():
    class Judge(torch.nn.Module):
        def forward(self, videos, scene):
            return torch.tensor(scene, dtype=torch.float32)

    rewards = RewardSet([Judge()])
    assert rewards.requires == {"scene"}
    assert rewards(clips(0, 0), {"scene": [1, 2], "instructions": ["x", "y"]}).tolist() == [[1], [2]]


def test_the_cache_is_shared_by_rewards_and_fresh_for_each_chunk():
    seen = []

    def writes(videos, cache):
        seen.append(dict(cache))
        cache["embedding"] = len(videos)
        return [0.0] * len(videos)

    def reads(videos, cache):
        return [float(cache["embedding"])] * len(videos)

    scores = RewardSet([writes, reads], batch_size=2)(clips(0, 0, 0), {})
    assert seen == [{}, {}]
    assert scores[:, 1].tolist() == [2, 2, 1]


def test_gradients_are_off_inside_a_reward():
    def grad_mode(videos, **kwargs):
        return [float(torch.is_grad_enabled())]

    assert RewardSet([grad_mode])(clips(0), {}).item() == 0


# --- the scores


def test_scores_are_float32_and_none_is_nan():
    def sometimes(videos, **kwargs):
        return [None if video.mean() > 0.5 else 2 for video in videos]

    scores = RewardSet([brightness, sometimes])(clips(0.25, 0.75), {})
    assert scores.dtype == torch.float32 and scores.device.type == "cpu"
    torch.testing.assert_close(scores, torch.tensor([[0.25, 2.0], [0.75, math.nan]]), equal_nan=True)


@pytest.mark.parametrize(
    "result",
    [[1, 0], (1.0, 0.0), [True, False], torch.tensor([1, 0]), np.array([1.0, 0.0]), [torch.tensor(1.0), np.float16(0)]],
)
def test_numbers_come_in_many_types(result):
    assert RewardSet([lambda videos: result])(clips(0, 0), {}).tolist() == [[1], [0]]


def test_no_samples_give_no_rows():
    assert RewardSet([brightness, len_reward])([], {}).shape == (0, 2)


def len_reward(videos):
    return [float(len(video)) for video in videos]


@given(
    values=st.lists(st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False, width=32)), max_size=12),
    batch_size=st.one_of(st.none(), st.integers(1, 14)),
    order=st.randoms(use_true_random=False),
)
def test_scores_do_not_depend_on_batch_size_or_order(values, batch_size, order):
    def given_value(videos, value, cache):
        return list(value)

    given_value.requires = ()
    shuffled = order.sample(range(len(values)), len(values))
    columns = {"value": [values[i] for i in shuffled]}
    scores = RewardSet([given_value], batch_size=batch_size)(clips(*[0] * len(values)), columns)[:, 0]
    wanted = torch.tensor([math.nan if values[i] is None else values[i] for i in shuffled])
    torch.testing.assert_close(scores, wanted, equal_nan=True, atol=0, rtol=0)


def test_seconds_add_up_over_the_chunks_of_one_call(monkeypatch):
    now = 100.0
    monkeypatch.setattr("editrl.reward.time.perf_counter", lambda: now)

    def slow(videos, **kwargs):
        nonlocal now
        now += 2
        return [0.0] * len(videos)

    rewards = RewardSet([slow, brightness], batch_size=1)
    for _ in range(2):
        rewards(clips(0, 0, 0), {})
        assert rewards.seconds == {"slow": 6, "brightness": 0}


# --- failures: every one names the reward and the sample

COLUMNS_OF_THREE = {"ids": ["a", "b", "c"]}


def failing(result):
    def culprit(videos, **kwargs):
        if isinstance(result, Exception):
            raise result
        return result

    return RewardSet([brightness, culprit])


@pytest.mark.parametrize(
    ("result", "wanted"),
    [
        ([0.0, math.nan, 0.0], "reward 'culprit' returned nan for sample 1 (id 'b')"),
        ([0.0, 0.0, math.inf], "reward 'culprit' returned inf for sample 2 (id 'c')"),
        (torch.tensor([-math.inf, 0.0, 0.0]), "reward 'culprit' returned -inf for sample 0 (id 'a')"),
        ([1e300, 0.0, 0.0], "reward 'culprit' returned 1e+300 for sample 0 (id 'a')"),
        ([0.0, "0.5", 0.0], "reward 'culprit' returned str for sample 1 (id 'b')"),
        ([0.0, [0.5], 0.0], "reward 'culprit' returned list for sample 1 (id 'b')"),
        (torch.zeros(3, 2), "reward 'culprit' returned list for sample 0 (id 'a')"),
        ([0.0, torch.zeros(2), 0.0], "reward 'culprit' returned Tensor for sample 1 (id 'b')"),
        ([0.0, 0.0], "reward 'culprit' returned 2 values for 3 videos (sample 0 (id 'a') to sample 2 (id 'c'))"),
        (0.5, "reward 'culprit' returned float for sample 0 (id 'a') to sample 2 (id 'c'): return a list"),
        (None, "reward 'culprit' returned NoneType for sample 0 (id 'a') to sample 2 (id 'c'): return a list"),
        (torch.tensor(0.5), "reward 'culprit' returned Tensor for sample 0 (id 'a') to sample 2 (id 'c')"),
        (
            RuntimeError("no\n   network"),
            "reward 'culprit' failed on sample 0 (id 'a') to sample 2 (id 'c'): RuntimeError: no network",
        ),
    ],
)
def test_a_bad_result_is_an_error(result, wanted):
    with pytest.raises(EditrlError) as caught:
        failing(result)(clips(0, 0, 0), COLUMNS_OF_THREE)
    assert wanted in message(caught)
    assert caught.value.__cause__ is (result if isinstance(result, Exception) else None)


def test_a_sample_is_numbered_within_the_whole_call_not_within_its_chunk():
    def fails_on_bright(videos, **kwargs):
        return [math.nan if video.mean() > 0.5 else 0.0 for video in videos]

    rewards = RewardSet([fails_on_bright], batch_size=2)
    with pytest.raises(EditrlError, match=r"returned nan for sample 3:"):
        rewards(clips(0, 0, 0, 1, 0), {})


def test_a_missing_column_is_an_error_at_call_time_too():
    def captioned(videos, target_captions, style="any"):
        return [0.0] * len(videos)

    rewards = RewardSet([captioned])
    with pytest.raises(EditrlError) as caught:
        rewards(clips(0, 0), {"ids": ["a", "b"], "target_captions": ["x", None]})
    assert "reward 'captioned' needs 'target_captions', which sample 1 (id 'b') does not have" in message(caught)
    assert "add 'target_caption' to its row" in message(caught)
    with pytest.raises(EditrlError, match="Did you mean 'target_caption'"):
        rewards(clips(0), {"target_caption": ["x"]})


def test_columns_are_as_long_as_the_videos():
    with pytest.raises(EditrlError, match="column 'scene' has 1 values for 2 videos"):
        RewardSet([brightness])(clips(0, 0), {"scene": [1]})


# --- needs, checked before training


def test_parameters_without_a_default_are_required():
    def needy(videos, target_captions, scene, cache, ids, fps, masks=None, *, power=2, **kwargs):
        return []

    assert RewardSet([needy, brightness]).requires == {"target_captions", "scene"}


@pytest.mark.parametrize("declared", [("scene",), {"scene"}, "scene"])
def test_requires_overrides_the_signature(declared):
    class Declares:
        requires = declared

        def __call__(self, videos, target_captions=None, **kwargs):
            return []

    assert RewardSet([Declares()]).requires == {"scene"}


def test_check_passes_when_every_row_has_what_is_needed():
    def captioned(videos, instructions, source_videos, target_captions, scene, **kwargs):
        return []

    rows = dataset({"target_caption": "x", "scene": 0}, {"target_caption": "y", "scene": {}})
    assert RewardSet([captioned]).check(rows) is None


def test_check_names_reward_column_row_and_remedy():
    def captioned(videos, target_captions):
        return []

    data = dataset({"id": "good", "target_caption": "x"}, {"id": "bad", "target_capton": "y"})
    with pytest.raises(EditrlError) as caught:
        RewardSet([brightness, captioned]).check(data)
    assert "reward 'captioned' needs 'target_captions', but row 1 (id 'bad') has no 'target_caption'" in message(caught)
    assert message(caught).endswith("leave the reward out. Did you mean 'target_capton'?")


def test_check_decodes_nothing():
    def masked(videos, masks):
        return []

    assert RewardSet([masked]).check(dataset({"source": "nowhere.mp4", "mask": "nowhere.png"})) is None


# --- construction


def test_weights_are_one_by_default():
    assert RewardSet([brightness, len_reward]).weights.tolist() == [1, 1]
    weights = RewardSet([brightness, len_reward], weights=[0.5, -2]).weights
    assert weights.dtype == torch.float32 and weights.tolist() == [0.5, -2]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"rewards": []}, "at least one reward"),
        ({"rewards": "brightness"}, "give a list"),
        ({"rewards": [3]}, "cannot be called"),
        ({"rewards": [brightness], "weights": [1, 2]}, r"2 reward weights for 1 rewards \(brightness\)"),
        ({"rewards": [brightness], "weights": [math.nan]}, "weight of reward 'brightness' is nan"),
        ({"rewards": [brightness], "batch_size": 0}, "batch_size is 0"),
        ({"rewards": [brightness, brightness]}, "reward 'brightness' is listed twice"),
        (
            {"rewards": [brightness], "kwargs": {"brihtness": {}}},
            r"kwargs for 'brihtness'.*Did you mean 'brightness'\?",
        ),
        ({"rewards": ["no_such_reward"]}, "no_such_reward"),
    ],
)
def test_nonsense_is_refused(arguments, wanted):
    with pytest.raises(EditrlError, match=wanted):
        RewardSet(**arguments)


def test_a_reward_is_called_what_it_was_asked_for_by():
    @register_reward("a_registered_class")
    class Registered:
        def __call__(self, videos):
            return [1.0] * len(videos)

    class Named:
        name = "its_own_name"

        def __call__(self, videos):
            return [1.0] * len(videos)

    assert RewardSet(["a_registered_class", Named(), Registered, brightness]).names == [
        "a_registered_class",
        "its_own_name",
        "Registered",
        "brightness",
    ]


def test_kwargs_reach_classes_and_functions():
    class Power:
        def __init__(self, exponent=1):
            self.exponent = exponent

        def __call__(self, videos):
            return [video.mean().item() ** self.exponent for video in videos]

    def scaled(videos, scale=1.0):
        return [video.mean().item() * scale for video in videos]

    rewards = RewardSet([Power, scaled], kwargs={"Power": {"exponent": 3}, "scaled": {"scale": 10}})
    assert rewards.names == ["Power", "scaled"]
    assert rewards(clips(0.5), {}).tolist() == [[0.125, 5.0]]


def test_to_reaches_every_reward_that_has_one():
    class Movable:
        device = None

        def to(self, device):
            self.device = device

        def __call__(self, videos):
            return [0.0] * len(videos)

    movable = Movable()
    rewards = RewardSet([brightness, movable])
    assert rewards.to("meta") is rewards
    assert movable.device == "meta"


def test_five_lines_in_a_file_are_a_reward(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import editrl\n\n"
        '@editrl.register_reward("sharpness_of_mine")\n'
        "def sharpness(videos, **kwargs):\n"
        "    return [v.diff(dim=-1).abs().mean().item() for v in videos]\n"
    )
    rewards = RewardSet([f"{tmp_path / 'mine.py'}:sharpness"])
    assert rewards.names == ["sharpness"]
    stripes = torch.tensor([0.0, 1.0]).repeat(8).expand(1, 3, 16, 16)
    assert rewards([stripes, *clips(0.5)], {}).tolist() == [[1], [0]]
    assert RewardSet(["sharpness_of_mine"]).names == ["sharpness_of_mine"]
