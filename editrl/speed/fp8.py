"""Frozen linear layers in FP8 (e4m3): a scale for each row of the input and for each output channel.

For the base weights under a LoRA: they are never updated, so rounding them once is all the error there is, the same in
rollout and in training. H100 and later multiply FP8 at twice the rate of bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from editrl.errors import EditrlError

SCALING_MULTIPLE = 16
"""`torch._scaled_mm` wants sizes that are multiples of this."""

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


def quantized(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a contiguous [N,K] as e4m3 and their float32 scales [N,1]: values = e4m3 * scale, up to rounding."""
    scale = values.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / E4M3_MAX
    return (values.float() / scale).to(torch.float8_e4m3fn), scale


class _Multiply(torch.autograd.Function):
    """[S,K] x frozen [N,K] -> [S,N], with the gradient of the input alone."""

    @staticmethod
    def forward(ctx, inputs, weight, weight_scale, transposed, transposed_scale):
        ctx.save_for_backward(transposed, transposed_scale)
        rows, scale = quantized(inputs)
        return torch._scaled_mm(rows, weight.t(), scale, weight_scale.t(), out_dtype=inputs.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx, gradient):
        transposed, transposed_scale = ctx.saved_tensors
        rows, scale = quantized(gradient)
        product = torch._scaled_mm(
            rows, transposed.t(), scale, transposed_scale.t(), out_dtype=gradient.dtype, use_fast_accum=True
        )
        return product, None, None, None, None


class FP8Linear(nn.Linear):
    """A frozen linear layer whose weight is e4m3; its transpose is kept too, for the backward pass (2 bytes a weight).

    Inputs [...,K] of any floating dtype, outputs [...,N] of the same.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)  # not `nn.Linear`'s, which would allocate and fill a weight
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight, weight_scale = quantized(linear.weight.detach())
        transposed, transposed_scale = quantized(linear.weight.detach().t().contiguous())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("transposed", transposed, persistent=False)
        self.register_buffer("transposed_scale", transposed_scale, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        product = _Multiply.apply(
            inputs.flatten(0, -2), self.weight, self.weight_scale, self.transposed, self.transposed_scale
        ).unflatten(0, inputs.shape[:-1])
        return product if self.bias is None else product + self.bias


@torch.no_grad()
def quantize_blocks(blocks: Iterable[nn.Module]) -> int:
    """Replace the frozen linear layers of the blocks by `FP8Linear`; returns how many.

    Modulations (`norm*`) stay as they are: they are small, and multiply everything. Before adapters are attached.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise EditrlError(f"fp8_base: {torch.cuda.get_device_name()} multiplies no FP8, an H100 does; drop fp8_base")
    count = 0
    for block in blocks:
        if any(isinstance(layer, LoraLayer) for layer in block.modules()):
            raise EditrlError(
                "fp8_base takes weights without an adapter; load the policy without adapter, or drop fp8_base"
            )
        for name, layer in list(block.named_modules()):
            if type(layer) is not nn.Linear or name.startswith("norm"):
                continue
            if layer.weight.requires_grad:
                raise EditrlError("fp8_base is for frozen weights under LoRA: give lora_r, or drop fp8_base")
            if layer.in_features % SCALING_MULTIPLE or layer.out_features % SCALING_MULTIPLE:
                raise EditrlError(f"fp8_base needs layers of multiples of {SCALING_MULTIPLE}, '{name}' is {layer}")
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, FP8Linear(layer))
            count += 1
    return count
