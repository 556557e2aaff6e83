"""Frozen models in host memory: awake while they are asked, the same results, the same tensors afterwards."""

import pytest
import torch
from torch import nn

from editrl.data import EditDataset
from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy
from editrl.recipes.shapes import WEIGHTS
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.world import sample_scenes
from editrl.speed import Parked, park_frozen_modules

CPU = torch.device("cpu")
"""Stands for a GPU: what is awake is a copy there too, with an address of its own."""


def address(module: nn.Module) -> int:
    return next(module.parameters()).data_ptr()


def test_weights_and_buffers_are_away_only_within():
    model = nn.BatchNorm1d(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    home = {name: value.data_ptr() for name, value in model.state_dict().items()}
    parked = Parked([model], CPU)
    with parked.awake():
        with parked.awake():
            pass
        assert all(value.data_ptr() != home[name] for name, value in model.state_dict().items())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="on purpose"), parked.awake():
        raise RuntimeError("on purpose")
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == home


def test_a_shared_weight_is_moved_once():
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    parked = Parked([tied, tied[1]], CPU)
    assert len(parked.tensors) == 3
    with parked.awake():
        assert tied[1].weight is tied[0].weight


@pytest.fixture
def policy() -> HunyuanVideoPolicy:
    return HunyuanVideoPolicy.from_pretrained(str(WEIGHTS / "sft"))


def test_each_method_wakes_what_it_needs(policy):
    seen = {}

    def look(name, result):
        def method(*args, **kwargs):
            seen[name] = {kind: address(module) != home[kind] for kind, module in parts.items()}
            return result

        return method

    parts = {"vae": policy.vae, "vlm": policy.instructor.model, "text": policy.text_encoder}
    home = {kind: address(module) for kind, module in parts.items()}
    for name in ("encode", "encode_videos", "decode"):
        setattr(policy, name, look(name, name))
    park_frozen_modules(policy, CPU)
    assert [policy.encode([]), policy.encode_videos(None), policy.decode(None)] == ["encode", "encode_videos", "decode"]
    assert seen["encode"] == {"vae": True, "vlm": True, "text": True}
    assert seen["encode_videos"] == seen["decode"] == {"vae": True, "vlm": False, "text": False}
    assert {kind: address(module) for kind, module in parts.items()} == home


def test_a_parked_policy_is_the_same_policy(policy):
    examples = list(EditDataset(rows(sample_scenes(2, seed=0))))
    expected = policy.encode(examples)
    decoded = policy.decode(expected.source_latents)
    park_frozen_modules(policy, torch.device("cpu"))
    conditions = policy.encode(examples)
    assert all(torch.equal(value, expected.tensors[name]) for name, value in conditions.tensors.items())
    assert torch.equal(policy.decode(conditions.source_latents), decoded)
