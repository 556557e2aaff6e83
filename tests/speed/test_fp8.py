"""FP8 base weights: exactly the product of the rounded factors, in both directions."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from editrl.errors import EditrlError
from editrl.speed import FP8Linear, quantize_blocks, repeated_blocks
from editrl.speed.fp8 import E4M3_MAX, quantized


def plain(values: Tensor, scale: Tensor) -> Tensor:
    return values.double() * scale.double()


def layer(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 48, bias=bias).to(torch.bfloat16).requires_grad_(False)


def draw(*shape, seed=1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def test_rows_are_scaled_to_the_largest_value():
    rows = draw(5, 32) * torch.tensor([1e-6, 1e-2, 1.0, 1e3, 0.0]).to(torch.bfloat16)[:, None]
    values, scale = quantized(rows)
    assert values.float().abs().amax(1)[:4].tolist() == [E4M3_MAX] * 4
    assert torch.equal(plain(values, scale)[4], torch.zeros(32, dtype=torch.float64))
    # e4m3 has three bits of mantissa; below 2^-6 of its range (1 / 28,672 of the largest) steps are of one size.
    error = (plain(values, scale) - rows.double()).abs()
    assert (error <= rows.double().abs() / 16 + rows.double().abs().amax(1, keepdim=True) / 448 / 2**9).all()


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_rounded_factors(bias):
    linear = layer(bias)
    fp8, inputs = FP8Linear(linear), draw(3, 7, 64)
    expected = plain(*quantized(inputs.flatten(0, 1))) @ plain(*quantized(linear.weight)).T
    if bias:
        expected = expected + linear.bias.double()
    found = fp8(inputs)
    assert found.shape == (3, 7, 48)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.flatten(0, 1).double(), expected, rtol=2**-7, atol=2**-7)
    error = (found - linear(inputs)).float().norm() / linear(inputs).float().norm()
    assert 0.005 < error < 0.06


def test_the_gradient_of_the_input_is_that_of_the_rounded_factors():
    linear = layer()
    fp8, inputs, upstream = FP8Linear(linear), draw(7, 64).requires_grad_(), draw(7, 48, seed=2)
    fp8(inputs).backward(upstream)
    expected = plain(*quantized(upstream)) @ plain(*quantized(linear.weight.T)).T
    torch.testing.assert_close(inputs.grad.double(), expected, rtol=2**-7, atol=2**-7)


def test_both_layouts_are_those_that_cublas_takes():
    """The second factor by columns, so its transpose is contiguous; the CPU would take any layout."""
    fp8 = FP8Linear(layer())
    assert fp8.weight.is_contiguous()
    assert fp8.transposed.is_contiguous()
    assert fp8.transposed.shape == (64, 48)


def test_blocks_are_quantized_but_for_their_modulations(transformer):
    model = transformer(lora=False, dtype=torch.bfloat16).requires_grad_(False)
    count = quantize_blocks(repeated_blocks(model))
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    fp8 = {name for name, kind in kinds.items() if kind == "FP8Linear"}
    assert len(fp8) == count == 2 * 12 + 2 * 5
    assert all("transformer_blocks" in name and ".norm" not in name for name in fp8)
    assert kinds["proj_out"] == kinds["transformer_blocks.0.norm1.linear"] == "Linear"


def test_lora_learns_on_top(transformer, inputs):
    model = transformer(lora=False, dtype=torch.bfloat16).requires_grad_(False)
    with torch.no_grad():
        expected = model(**inputs(torch.bfloat16))[0].float()
    quantize_blocks(repeated_blocks(model))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["to_q", "proj_mlp", "net.2"]))
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(**inputs(torch.bfloat16))[0]
    assert 0 < (velocity.float() - expected).norm() / expected.norm() < 0.1
    velocity.float().square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora" not in name]


def test_weights_that_are_trained_are_not_quantized(transformer):
    with pytest.raises(EditrlError, match="fp8_base is for frozen weights under LoRA"):
        quantize_blocks(repeated_blocks(transformer(lora=False)))


def test_sizes_that_the_kernel_refuses_are_refused_first(transformer):
    model = transformer(lora=False, num_attention_heads=1, attention_head_dim=24, rope_axes_dim=(8, 8, 8))
    with pytest.raises(EditrlError, match="needs layers of multiples of 16"):
        quantize_blocks(repeated_blocks(model.requires_grad_(False)))


def test_adapters_are_attached_afterwards(transformer):
    with pytest.raises(EditrlError, match="takes weights without an adapter"):
        quantize_blocks(repeated_blocks(transformer(lora=True)))
