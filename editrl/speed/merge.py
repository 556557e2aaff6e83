"""LoRA as one matrix while nobody needs its gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from editrl.errors import EditrlError


class MergedAdapter:
    """Second weights W + s·B·A of all LoRA layers of a model, to be put in the place of W for a while.

    A LoRA that is not merged costs two more products a layer. PEFT's own `merge_adapter` adds to W and later subtracts
    again, and in bfloat16 W does not come back; here it is set aside, and comes back as the same tensor. The price is
    the memory of the merged weights, for as long as this object lives.

    Only for steps that are not scored: merged weights are rounded otherwise than the sum of the two products.

    Args:
        model: with LoRA layers on `nn.Linear`, its weights whole; others (convolutions, DoRA, a bias in LoRA, FP8 base
            weights) are an `EditrlError`.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module):
        self.layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        for layer in self.layers:
            if type(layer.get_base_layer()) is not nn.Linear or layer.lora_variant or any(layer.lora_bias.values()):
                kind = type(layer.get_base_layer()).__name__
                raise EditrlError(f"merge_adapter works for plain LoRA on linear layers, not on a {kind}; drop it")
        self.merged = [merged_weight(layer) for layer in self.layers]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within the block the model computes with the merged weights."""
        bases = [layer.get_base_layer() for layer in self.layers]
        originals = [base.weight.data for base in bases]
        for layer, base, weight in zip(self.layers, bases, self.merged, strict=True):
            base.weight.data = weight
            layer.merged_adapters.extend(layer.active_adapters)  # PEFT then asks the base layer alone
        try:
            yield
        finally:
            for layer, base, weight in zip(self.layers, bases, originals, strict=True):
                base.weight.data = weight
                layer.merged_adapters.clear()


def merged_weight(layer: LoraLayer) -> Tensor:
    """W + sum of s·B·A over the active adapters, in W's dtype."""
    weight = layer.get_base_layer().weight
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + sum(layer.get_delta_weight(name).to(wide) for name in adapters)).to(weight.dtype)
