"""Conditions: named frozen inputs that are picked, moved and joined sample by sample."""

import copy
import pickle

import pytest
import torch

from editrl.errors import EditrlError
from editrl.policy import Conditions, FlowPolicy

SEQUENCES = frozenset({"tokens", "mask"})


def conditions(count=3, length=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Conditions(
        {
            "tokens": torch.randn(count, length, 5, generator=generator),
            "mask": torch.ones(count, length, dtype=torch.int64),
            "latents": torch.randn(count, 2, 3, 3, generator=generator),
        },
        SEQUENCES,
    )


# -- access ------------------------------------------------------------------------------------------------------------


def test_tensors_are_attributes_and_the_length_is_the_number_of_samples():
    given = conditions()
    assert given.tokens is given.tensors["tokens"]
    assert len(given) == 3
    with pytest.raises(AttributeError, match="colour"):
        _ = given.colour


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (slice(1, 3), [1, 2]),
        ([2, 0], [2, 0]),
        (torch.tensor([1, 1, 0, 2, 2, 2]), [1, 1, 0, 2, 2, 2]),  # a group repeats its example
        (slice(0, 1), [0]),
    ],
)
def test_an_index_selects_the_same_samples_of_every_tensor(index, rows):
    given = conditions()
    picked = given[index]
    assert len(picked) == len(rows)
    assert picked.sequences == SEQUENCES
    for name, tensor in given.tensors.items():
        assert torch.equal(picked.tensors[name], torch.stack([tensor[row] for row in rows]))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))])
def test_conditions_can_be_copied_and_pickled(duplicate):
    given = conditions()
    again = duplicate(given)
    assert again.sequences == SEQUENCES
    assert torch.equal(again.latents, given.latents)


# -- moving ------------------------------------------------------------------------------------------------------------


def test_a_dtype_is_for_floating_point_tensors_only():
    # 2**24 + 1 and 257 are integers that neither float32 nor bfloat16 holds: a detour would change them.
    given = Conditions({"tokens": torch.randn(2, 3), "ids": torch.tensor([257, 2**24 + 1]), "valid": torch.ones(2) > 0})
    moved = given.to(torch.bfloat16)
    assert moved.tokens.dtype == torch.bfloat16
    assert torch.equal(moved.ids, given.ids)
    assert moved.ids.dtype == torch.int64
    assert moved.valid.dtype == torch.bool


def test_a_device_is_for_all_tensors():
    moved = conditions().to("meta")
    assert {tensor.device.type for tensor in moved.tensors.values()} == {"meta"}
    assert moved.sequences == SEQUENCES


# -- joining -----------------------------------------------------------------------------------------------------------


def test_joining_keeps_the_order_of_samples():
    one, other = conditions(2, seed=1), conditions(3, seed=2)
    joined = Conditions.concatenate([one, other])
    assert len(joined) == 5
    assert joined.sequences == SEQUENCES
    for name in one.tensors:
        assert torch.equal(joined.tensors[name], torch.cat([one.tensors[name], other.tensors[name]]))


def test_joining_pads_sequences_with_zeros_at_the_end():
    short, long = conditions(1, length=2, seed=1), conditions(2, length=6, seed=2)
    for parts, first_short in (([short, long], 0), ([long, short], 2)):
        joined = Conditions.concatenate(parts)
        assert joined.tokens.shape == (3, 6, 5)
        assert torch.equal(joined.tokens[first_short, :2], short.tokens[0])
        assert not joined.tokens[first_short, 2:].any()
        assert joined.mask[first_short].tolist() == [1, 1, 0, 0, 0, 0]
        assert joined.mask.dtype == torch.int64


def test_joining_what_was_split_restores_it():
    given = conditions()
    joined = Conditions.concatenate(given[[row]] for row in range(3))  # any iterable
    for name, tensor in given.tensors.items():
        assert torch.equal(joined.tensors[name], tensor)


def test_joining_refuses_sizes_that_differ_elsewhere():
    one, other = conditions(), conditions()
    other.tensors["latents"] = torch.zeros(3, 2, 3, 4)
    with pytest.raises(EditrlError, match=r"'latents' \[\(2, 3, 3\), \(2, 3, 4\)\]; give the data set one size"):
        Conditions.concatenate([one, other])


def test_joining_refuses_sequences_whose_tokens_differ():
    one, other = conditions(), conditions()
    other.tensors["tokens"] = torch.zeros(3, 4, 6)
    with pytest.raises(EditrlError, match="'tokens'"):
        Conditions.concatenate([one, other])


# -- the policy's own part ---------------------------------------------------------------------------------------------


def test_a_policy_lives_where_its_transformer_is_and_moves_with_its_frozen_modules():
    class Policy(FlowPolicy):
        def __init__(self):
            self.transformer, self.frozen = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)

        def frozen_modules(self):
            return [self.frozen]

    policy = Policy()
    assert policy.device.type == "cpu"
    assert policy.to("meta") is policy
    assert policy.device.type == "meta"
    assert policy.frozen.weight.is_meta
