"""A transformer of diffusers, set up to run fast and within a budget of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn

from editrl.errors import EditrlError
from editrl.speed.activations import BlockRunner

logger = logging.getLogger(__name__)

GIB = 2**30
RESERVE = 0.05
"""Share of a device's memory that a budget of "auto" leaves alone: fragments, and what libraries take."""


def repeated_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer, with or without adapters: the modules of its own lists, in order."""
    model = transformer.get_base_model() if isinstance(transformer, PeftModel) else transformer
    return [block for child in model.children() if isinstance(child, nn.ModuleList) for block in child]


def prepare_transformer(
    transformer: nn.Module,
    *,
    compiled: bool = False,
    checkpointed: bool = False,
    activation_memory: float | str | None = None,
    attention_backend: str | None = None,
    bytes_to_come: Callable[[], int] = lambda: 0,
) -> None:
    """Set a transformer up in place; call it when its adapters are attached and before DDP or DeepSpeed wrap it.

    Args:
        compiled: compile the blocks, one by one and with one graph for all of a class (regional compilation).
        checkpointed: compute the activations of the blocks again in the backward pass.
        activation_memory: GiB that the blocks' activations may take in one forward, or "auto": what the device has left
            at the first forward with gradient. Instead of `checkpointed`.
        attention_backend: one of diffusers' attention backends, by name.
        bytes_to_come: what "auto" leaves for others besides.
    """
    model = transformer.get_base_model() if isinstance(transformer, PeftModel) else transformer
    if attention_backend is not None:
        try:
            model.set_attention_backend(attention_backend)
        except (ValueError, ImportError, RuntimeError) as error:
            raise EditrlError(f"attention_backend '{attention_backend}': {str(error).splitlines()[0]}") from error
    blocks = repeated_blocks(transformer)
    if activation_memory is not None or (checkpointed and compiled):
        budget = _budget(transformer, activation_memory, bytes_to_come)
        model.enable_gradient_checkpointing(BlockRunner(blocks, budget, compiled))
    elif checkpointed:
        model.enable_gradient_checkpointing()
    if compiled:
        for block, call in compiled_calls(blocks).items():
            block._compiled_call_impl = call


def compiled_calls(blocks: Sequence[nn.Module]) -> dict[nn.Module, Callable]:
    """Block -> its compiled call, one graph for all of a class; `block.compile()` would put it in place at once."""
    # A graph each for: classes of blocks, levels of activations, with and without gradient, adapter on and off.
    allow_graphs(64)
    # DDP would have its own idea of where to cut a graph.
    torch._dynamo.config.optimize_ddp = False
    return {block: torch.compile(block._call_impl) for block in blocks}


@contextmanager
def calling(calls: Mapping[nn.Module, Callable | None]) -> Iterator[None]:
    """Within the block these modules are called so; None: as they are, not compiled."""
    before = {module: module._compiled_call_impl for module in calls}
    try:
        for module, call in calls.items():
            module._compiled_call_impl = call
        yield
    finally:
        for module, call in before.items():
            module._compiled_call_impl = call


def compile_vae(modules: Iterable[nn.Module], part: str) -> None:
    """Compile the `encoder` or the `decoder` of VAEs, in place.

    A graph for each shape, since convolutions of unknown size would be slower; diffusers' VAEs cut long clips into
    tiles, of which the first and the last may have shapes of their own.
    """
    parts = [getattr(module, part) for module in modules if hasattr(module, part)]
    if not parts:
        raise EditrlError(f"compile_vae: none of the policy's decoding_modules() has a part '{part}'; drop it")
    allow_graphs(64)
    for module in parts:
        module.compile(dynamic=False)


def allow_graphs(count: int) -> None:
    """Let one piece of code have so many compiled graphs; beyond, it would silently run uncompiled."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, count)


def _budget(
    transformer: nn.Module, memory: float | str | None, bytes_to_come: Callable[[], int]
) -> int | Callable[[], int] | None:
    if memory is None:
        return None
    if memory != "auto":
        return int(memory * GIB)
    if not torch.cuda.is_available():
        raise EditrlError('activation_memory "auto" asks a GPU what it has left; give GiB instead')
    return lambda: free_memory(transformer) - bytes_to_come()


def free_memory(transformer: nn.Module) -> int:
    """Bytes of the current GPU that activations may take, once gradients and Adam's two moments (float32) are there."""
    free, total = torch.cuda.mem_get_info()
    reusable = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    to_come = sum(parameter.numel() * (8 + 4 * (parameter.grad is None)) for parameter in trained)
    left = max(int(free + reusable - to_come - RESERVE * total), 0)
    if not left:
        logger.warning("activation_memory auto: this GPU has nothing left, so everything is computed again")
    return left
