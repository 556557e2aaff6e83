"""Examples of any sizes -> what a trainer needs of each: conditions, target latents, latent mask."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editrl.data import EditExample
from editrl.policy import Conditions, FlowPolicy


@dataclass
class Encoded:
    """One example; the first dimension of every tensor is 1."""

    conditions: Conditions
    target_latents: Tensor | None = None  # [1,C,f,h,w]; None where the row has no target
    latent_mask: Tensor | None = None  # [1,1,f,h,w]; zeros where the row has a target and no mask

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        tensors = [*self.conditions.tensors.values(), self.target_latents, self.latent_mask]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def to(self, device: torch.device | str) -> Encoded:
        """The same on another device."""
        conditions = self.conditions.to(device)
        if self.target_latents is None:
            return Encoded(conditions)
        return Encoded(conditions, self.target_latents.to(device), self.latent_mask.to(device))


@torch.no_grad()
def encode_examples(
    policy: FlowPolicy, examples: Sequence[EditExample], unconditional: Sequence[bool] | None = None
) -> list[Encoded]:
    """Encode examples, those of one size together, with their targets where they have any.

    `unconditional`: which of them without their instruction; default none.
    """
    unconditional = [False] * len(examples) if unconditional is None else unconditional
    alike: dict[tuple, list[int]] = defaultdict(list)
    for position, example in enumerate(examples):
        alike[tuple(example.source.shape), example.target is not None, unconditional[position]].append(position)
    encoded = {}
    for (_, has_target, without_instruction), positions in alike.items():
        part = [examples[position] for position in positions]
        conditions = policy.encode(part, unconditional=True) if without_instruction else policy.encode(part)
        targets, masks = _encode_targets(policy, part) if has_target else (None, None)
        for row, position in enumerate(positions):
            one = slice(row, row + 1)
            pair = (targets[one], masks[one]) if has_target else ()
            encoded[position] = Encoded(conditions[one], *pair)
    return [encoded[position] for position in range(len(examples))]


def _encode_targets(policy: FlowPolicy, examples: Sequence[EditExample]) -> tuple[Tensor, Tensor]:
    """Target latents [B,C,f,h,w] and latent masks [B,1,f,h,w]."""
    latents = policy.encode_videos(torch.stack([example.target for example in examples]))
    masks = [
        example.mask if example.mask is not None else torch.zeros_like(example.source[:, :1]) for example in examples
    ]
    return latents, policy.latent_mask(torch.stack(masks).to(latents.device))
