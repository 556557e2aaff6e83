"""LoRA merged for a while: the same function, and afterwards the same weights to the bit."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from editrl.errors import EditrlError
from editrl.speed import MergedAdapter


def bases(model) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if "base_layer.weight" in name}


@torch.no_grad()
def test_merged_and_unmerged_are_one_function(transformer, inputs):
    model = transformer(dtype=torch.float64)
    expected = model(**inputs(torch.float64))[0]
    merged = MergedAdapter(model)
    for _ in range(2):
        with merged():
            found = model(**inputs(torch.float64))[0]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(model(**inputs(torch.float64))[0], expected)
    with model.disable_adapter():
        assert not torch.allclose(model(**inputs(torch.float64))[0], expected, atol=1e-3)


def test_the_base_comes_back_to_the_bit_whatever_happens(transformer, inputs):
    """PEFT's merge_adapter and unmerge_adapter do not bring bfloat16 weights back."""
    model = transformer(dtype=torch.bfloat16)
    before = {name: weight.clone() for name, weight in bases(model).items()}
    storages = {name: weight.data_ptr() for name, weight in bases(model).items()}
    merged = MergedAdapter(model)
    with pytest.raises(RuntimeError, match="on purpose"), merged():
        assert not any(torch.equal(weight, before[name]) for name, weight in bases(model).items())
        raise RuntimeError("on purpose")
    assert all(torch.equal(weight, before[name]) for name, weight in bases(model).items())
    assert {name: weight.data_ptr() for name, weight in bases(model).items()} == storages
    model.merge_adapter()
    model.unmerge_adapter()
    assert not all(torch.equal(weight, before[name]) for name, weight in bases(model).items())


def test_it_takes_a_copy_of_the_adapted_weights(transformer):
    model = transformer(dtype=torch.bfloat16)
    taken = sum(weight.nbytes for weight in MergedAdapter(model).merged)
    assert taken == sum(weight.nbytes for weight in bases(model).values())


def test_what_is_no_plain_lora_is_refused():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(EditrlError, match="merge_adapter works for plain LoRA on linear layers"):
        MergedAdapter(get_peft_model(layers, LoraConfig(r=2, target_modules=["0"], use_dora=True)))
    with pytest.raises(EditrlError, match="merge_adapter works for plain LoRA"):
        biased = LoraConfig(r=2, target_modules=["0"], lora_bias=True)
        MergedAdapter(get_peft_model(nn.Sequential(nn.Linear(4, 4)), biased))
    with pytest.raises(EditrlError, match="not on a Conv1d"):
        MergedAdapter(get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 1)), LoraConfig(r=2, target_modules=["0"])))
