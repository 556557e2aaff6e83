"""Frozen models wait in host memory while nobody asks them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from editrl.policy import FlowPolicy


class Parked:
    """Modules whose weights stay in host memory, pinned where there is a GPU, and are on `device` within `awake()`.

    Nothing is ever copied back, since nothing changes them; so waking costs one transfer, parking none. May be nested.
    """

    def __init__(self, modules: Iterable[nn.Module], device: torch.device):
        self.device, self.depth = device, 0
        tensors = {id(tensor): tensor for module in modules for tensor in [*module.parameters(), *module.buffers()]}
        self.tensors = list(tensors.values())
        self.at_home = [self._home(tensor) for tensor in self.tensors]
        self._put(self.at_home)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Within the block the modules are on the device."""
        if not self.depth:
            self._put([tensor.to(self.device, non_blocking=True, copy=True) for tensor in self.at_home])
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if not self.depth:
                self._put(self.at_home)

    def _put(self, data: list[torch.Tensor]) -> None:
        for tensor, value in zip(self.tensors, data, strict=True):
            tensor.data = value

    def _home(self, tensor: torch.Tensor) -> torch.Tensor:
        home = tensor.data.cpu()
        return home.pin_memory() if self.device.type == "cuda" else home


def park_frozen_modules(policy: FlowPolicy, device: torch.device) -> None:
    """Park the frozen modules of a policy: those that decode for `encode_videos` and `decode`, all for `encode`.

    The methods of this object wake what they need, whoever calls them.
    """
    decoding = list(policy.decoding_modules())
    others = [module for module in policy.frozen_modules() if not any(module is other for other in decoding)]
    decoders, encoders = Parked(decoding, device), Parked(others, device)
    policy.encode = _waking(policy.encode, encoders, decoders)
    policy.encode_videos = _waking(policy.encode_videos, decoders)
    policy.decode = _waking(policy.decode, decoders)


def _waking(method: Callable, *parked: Parked) -> Callable:
    @functools.wraps(method)
    def call(*args, **kwargs):
        first, *rest = parked
        with first.awake():
            return _waking(method, *rest)(*args, **kwargs) if rest else method(*args, **kwargs)

    return call
