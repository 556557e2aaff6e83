"""Kept and recomputed activations: the gradient is the same, and only what a level says is kept."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from editrl.errors import EditrlError
from editrl.speed import BlockRunner, footprint, plan_levels, prepare_transformer, repeated_blocks
from editrl.speed.activations import ATTENTION, LEVELS, SECOND_FACTOR, block_function, is_kept


class Counter(TorchDispatchMode):
    """Counts attentions, and products with the weights by the width of their result."""

    def __init__(self):
        super().__init__()
        self.attentions, self.widths = 0, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in ATTENTION:
            self.attentions += 1
        if op in SECOND_FACTOR:
            self.widths.append(args[SECOND_FACTOR[op]].shape[-1])
        return op(*args, **(kwargs or {}))


def gradients(model, inputs) -> tuple[Tensor, dict[str, Tensor], Counter]:
    """Velocity, gradients, and what the backward pass computed."""
    model.zero_grad(set_to_none=True)
    velocity = model(**inputs)[0]
    with Counter() as counter:
        velocity.square().mean().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return velocity.detach(), found, counter


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
def test_every_level_gives_the_gradient_of_plain_autograd(transformer, inputs, level, lora):
    model = transformer(lora, torch.float64)
    velocity, expected, _ = gradients(model, inputs(torch.float64))
    base = model.get_base_model() if lora else model
    base.enable_gradient_checkpointing(block_function(level, compiled=False))
    same, found, _ = gradients(model, inputs(torch.float64))
    assert torch.equal(same, velocity)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-14)


def test_a_level_computes_again_what_it_does_not_keep(transformer, inputs):
    """Of the four blocks; hidden size 64, LoRA of rank 4."""
    counted = {}
    for level in LEVELS:
        model = transformer()
        model.get_base_model().enable_gradient_checkpointing(block_function(level, compiled=False))
        counted[level] = gradients(model, inputs())[2]
    assert counted["none"].attentions == 4
    assert [counted[level].attentions for level in ("attention", "hidden", "all")] == [0, 0, 0]
    products = {level: len(counter.widths) for level, counter in counted.items()}
    assert products["none"] > products["attention"] > products["hidden"] > products["all"]
    wide = {level: sum(width > 64 for width in counter.widths) for level, counter in counted.items()}
    assert wide["hidden"] == wide["none"] > wide["all"]


def block_inputs(model, tokens=32):
    """What a block is given."""
    hidden = model.config.num_attention_heads * model.config.attention_head_dim
    rope = (torch.ones(tokens, 16), torch.zeros(tokens, 16))
    return [torch.randn(1, tokens, hidden), torch.randn(1, 6, hidden), torch.randn(1, hidden), None, rope, None, 16]


def test_the_footprint_is_what_a_real_forward_keeps(transformer):
    """Counted on real tensors with the same rule; PyTorch's attention on the CPU also returns a logsumexp."""
    model = transformer().get_base_model()
    for block in (model.transformer_blocks[0], model.single_transformer_blocks[0]):
        arguments = block_inputs(model)
        sizes = footprint(block, arguments)
        own = sum(part.nbytes for part in arguments[:2])
        assert sizes["none"] == own
        kept = dict.fromkeys(LEVELS, own)

        class Real(TorchDispatchMode):
            def __torch_dispatch__(self, op, types, args=(), kwargs=None, kept=kept):
                result = op(*args, **(kwargs or {}))
                first = result[0] if isinstance(result, tuple) else result
                for level in LEVELS:
                    if is_kept(level, 64, op, args):
                        kept[level] += first.nbytes
                return result

        with torch.no_grad(), Real():
            block(*arguments)
        assert {level: sizes[level] for level in LEVELS} == kept
        assert sizes["working"] > sizes["all"] / 2


@settings(max_examples=10, deadline=None)
@given(first=st.floats(0, 3), more=st.floats(0, 1))
def test_a_plan_stays_within_its_budget_and_uses_it(first, more):
    model = shared_model()
    blocks, arguments = repeated_blocks(model), block_inputs(model)
    sizes = {block: footprint(block, arguments) for block in blocks}
    working = max(size["working"] for size in sizes.values())
    whole = sum(size["all"] for size in sizes.values())
    order = list(LEVELS)

    def levels(share: float):
        return plan_levels(blocks, arguments, working + int(share * whole))

    lower, higher = levels(first), levels(first + more)
    assert all(order.index(higher[block]) >= order.index(lower[block]) for block in blocks)
    taken = sum(sizes[block][level] for block, level in lower.items())
    least = sum(size["none"] for size in sizes.values())
    assert taken <= max(int(first * whole), least)
    if first >= 1:
        assert set(lower.values()) == {"all"}
    assert max(map(order.index, lower.values())) - min(map(order.index, lower.values())) <= 1


_MODEL = []


def shared_model():
    """hypothesis takes no fixtures of a function's scope."""
    if not _MODEL:
        from editrl.policies.hunyuan_video.transformer import HunyuanVideoEditTransformer3DModel

        shape = {"num_attention_heads": 4, "attention_head_dim": 16, "rope_axes_dim": (4, 6, 6), "num_layers": 2}
        _MODEL.append(HunyuanVideoEditTransformer3DModel(**shape, num_single_layers=3, num_refiner_layers=1))
    return _MODEL[0]


def test_levels_are_planned_once_for_each_shape(transformer):
    model = transformer().get_base_model()
    budgets = iter([10**9, 0])
    runner = BlockRunner(repeated_blocks(model), lambda: next(budgets), compiled=False)
    short, long = block_inputs(model), block_inputs(model, 64)
    assert set(runner.levels(short).values()) == {"all"}
    assert set(runner.levels(long).values()) == {"none"}
    assert set(runner.levels(short).values()) == {"all"}


def test_a_budget_in_gib_reaches_the_blocks(transformer, inputs):
    model, plain = transformer(), transformer()
    prepare_transformer(model, activation_memory=1.0)
    velocity, found, counter = gradients(model, inputs())
    assert counter.attentions == 0
    expected = gradients(plain, inputs())
    torch.testing.assert_close(velocity, expected[0])
    for name, value in expected[1].items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_auto_needs_a_gpu(transformer):
    with pytest.raises(EditrlError, match="asks a GPU what it has left; give GiB"):
        prepare_transformer(transformer(), activation_memory="auto")


def test_an_unknown_attention_backend_is_an_error(transformer):
    with pytest.raises(EditrlError, match="attention_backend 'fastest'"):
        prepare_transformer(transformer(), attention_backend="fastest")


def test_compiled_blocks_give_the_same_gradient(transformer, inputs, quick_compiler):
    plain = transformer()
    velocity, expected, _ = gradients(plain, inputs())
    model = copy.deepcopy(plain)
    prepare_transformer(model, compiled=True, activation_memory=1.0)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs())[0], velocity, rtol=1e-4, atol=1e-5)
    same, found, _ = gradients(model, inputs())
    torch.testing.assert_close(same, velocity, rtol=1e-4, atol=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)
