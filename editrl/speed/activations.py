"""Which activations of a block are kept for the backward pass, and which are computed again.

Plain checkpointing keeps the inputs of a block and computes all of it twice. What saves most time for its memory is the
output of attention, whose cost grows with the square of the tokens; next come the products with the weights. What lies
between them is cheap, and is always computed again. So there are levels:

| level | kept in each block, beside its inputs |
|---|---|
| `none` | nothing: plain checkpointing |
| `attention` | the output of attention, and narrow products (the inner ones of LoRA) |
| `hidden` | also products of at most hidden size |
| `all` | also the wide ones of the feed-forward |

`BlockRunner` gives each block a level, so that all of them together stay within a budget.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

aten = torch.ops.aten
ATTENTION = {
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
}
SECOND_FACTOR = {aten.mm.default: 1, aten._scaled_mm.default: 1, aten.addmm.default: 2}
"""Products, and which of their arguments is the second factor [inner, width]."""

LEVELS = {"none": 0.0, "attention": 0.25, "hidden": 1.0, "all": float("inf")}
"""Level -> how wide a product may be to be kept, in hidden sizes."""

CHEAP = 0.25
"""A product over an inner size of less than this many hidden sizes is not worth keeping."""


def is_kept(level: str, hidden_size: int, op, args: Sequence) -> bool:
    """Whether a level keeps the result of an operation for the backward pass."""
    if level == "none":
        return False
    if op in ATTENTION:
        return True
    if op not in SECOND_FACTOR:
        return False
    inner, width = args[SECOND_FACTOR[op]].shape[-2:]
    return inner >= CHEAP * hidden_size and width <= LEVELS[level] * hidden_size


def block_function(level: str, compiled: bool) -> Callable:
    """A function (block, *inputs) -> outputs, with gradient, that keeps what `level` says.

    The last size of the first input is the hidden size. Compiled, one graph serves all blocks of a class.
    """

    def run(block: nn.Module, *inputs):
        hidden_size = inputs[0].shape[-1]

        def policy(context, op, *args, **kwargs):
            kept = is_kept(level, hidden_size, op, args)
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        options = {"use_reentrant": False, "preserve_rng_state": False}
        if level != "none":
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
        # Not `block(...)`: a block that is compiled for sampling would enter that graph.
        return checkpoint(block._call_impl, *inputs, **options)

    return torch.compile(run) if compiled else run


class BlockRunner:
    """Runs the blocks of a transformer with gradient; for diffusers' `enable_gradient_checkpointing(runner)`.

    Args:
        blocks: all blocks that are run, in the order in which they should get a higher level.
        budget: bytes that the blocks' activations may take, or a function that says so when it is asked for the first
            time, or None: every block is checkpointed plainly.
        compiled: compile the blocks, a graph for each level and class of blocks.
    """

    def __init__(self, blocks: Sequence[nn.Module], budget: int | Callable[[], int] | None, compiled: bool):
        self.blocks, self.budget, self.compiled = list(blocks), budget, compiled
        self.functions: dict[str, Callable] = {}
        self.plans: dict[tuple, dict[nn.Module, str]] = {}

    def __call__(self, block: nn.Module, *inputs):
        level = "none" if self.budget is None else self.levels(inputs)[block]
        if level not in self.functions:
            self.functions[level] = block_function(level, self.compiled)
        return self.functions[level](block, *inputs)

    def levels(self, inputs: Sequence) -> dict[nn.Module, str]:
        """Level of every block for inputs of so many tokens; planned once, since another level rounds otherwise."""
        # Of all tokens: some blocks are given video and text apart, others as one sequence.
        hidden = _hidden_states(inputs)
        tokens = (hidden[0].shape[0], sum(state.shape[1] for state in hidden), hidden[0].shape[2])
        if tokens not in self.plans:
            budget = self.budget() if callable(self.budget) else self.budget
            self.plans[tokens] = plan_levels(self.blocks, inputs, budget)
        return self.plans[tokens]


def _hidden_states(inputs: Sequence) -> list[Tensor]:
    """Of a block's inputs the tokens, [B,S,D] each: of video and text, or of both in one."""
    return [state for state in inputs[:2] if state is not None]


def plan_levels(blocks: Sequence[nn.Module], inputs: Sequence, budget: int) -> dict[nn.Module, str]:
    """Each block's level: the highest that all can have within `budget` bytes, and one more for the first blocks.

    What a block needs while it is computed again and differentiated is set aside first.
    """
    by_class = {}
    for block in blocks:
        by_class.setdefault(type(block), block)
    sizes = {kind: footprint(block, inputs) for kind, block in by_class.items()}
    left = budget - max(size["working"] for size in sizes.values())
    left -= sum(sizes[type(block)]["none"] for block in blocks)
    levels = dict.fromkeys(blocks, "none")
    for lower, higher in zip(list(LEVELS), list(LEVELS)[1:], strict=False):
        for block in blocks:
            more = sizes[type(block)][higher] - sizes[type(block)][lower]
            if more > left:
                return levels
            levels[block], left = higher, left - more
    return levels


def footprint(block: nn.Module, inputs: Sequence) -> dict[str, int]:
    """Bytes that a block keeps at each level, its inputs among them, and its `working` memory; nothing is computed."""
    recorder = recorded(block, inputs)
    # Results of a whole forward, were none freed or fused; a backward was seen to need a third of it.
    return recorder.kept | {"working": recorder.results // 2}


def recorded(block: nn.Module, inputs: Sequence) -> Recorder:
    """What a forward of the block would compute; nothing is computed or allocated."""
    hidden = _hidden_states(inputs)
    recorder = Recorder(hidden[0].shape[-1], sum(state.nbytes for state in hidden))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad(), _uncached_autocast():
        arguments = tree_map(lambda leaf: fake.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, inputs)
        with recorder, _AttentionRecorder(recorder):
            block._call_impl(*arguments)
    return recorder


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Or autocast would keep the fake copies of the weights that it casts, and give them to the real forward."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


class Recorder(TorchDispatchMode):
    """Counts what a forward computes.

    Attributes: `results` (bytes of all results), `kept` (level -> bytes kept, inputs among them), `products` and
    `attention` (operations, a multiplication and an addition being two), `products_kept` (level -> of kept products).
    """

    def __init__(self, hidden_size: int, inputs: int):
        super().__init__()
        self.hidden_size, self.results, self.products, self.attention = hidden_size, 0, 0, 0
        self.kept = dict.fromkeys(LEVELS, inputs)
        self.products_kept = dict.fromkeys(LEVELS, 0)

    def count(self, result, op, args: Sequence = ()) -> None:
        size = sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.results += size
        operations = 2 * result.numel() * args[SECOND_FACTOR[op]].shape[-2] if op in SECOND_FACTOR else 0
        self.products += operations
        for level in LEVELS:
            if is_kept(level, self.hidden_size, op, args):
                self.kept[level] += size
                self.products_kept[level] += operations

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if not op.is_view:
            self.count(result, op, args)
        return result


class _AttentionRecorder(TorchFunctionMode):
    """Attention as one operation: without a device, PyTorch would write out its products."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key = args[:2] if args else (kwargs["query"], kwargs["key"])
        with torch._C.DisableTorchFunction():
            result = torch.empty_like(query)
        self.recorder.attention += 4 * query.numel() * key.shape[-2]  # [B, heads, tokens, dim]: scores, and values
        self.recorder.count(result, aten._scaled_dot_product_flash_attention.default)
        return result
