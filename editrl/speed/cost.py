"""What sampling and training cost, predicted: work is counted on the model's shapes, and divided by measured rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from editrl.speed.activations import LEVELS, recorded

GIB = 2**30


@dataclass(frozen=True)
class Rates:
    """How fast a GPU works: operations a second in products and attention, bytes of other results a second.

    Those of other results count every result of an operation once, and hold for what is left between products and
    attention when blocks are compiled, or not.
    """

    products: float
    attention: float
    attention_backward: float
    compiled: float
    compiled_backward: float
    eager: float
    eager_backward: float

    def scaled(self, tflops: float) -> Rates:
        """Of a GPU whose bfloat16 product of 8192 cubed runs at `tflops`; all else is taken to be as much faster."""
        factor = tflops * 1e12 / self.products
        return Rates(*(factor * value for value in vars(self).values()))


# benchmarks/results/throughput/steps-full-h200.json: 719 TFLOP/s in products; attention of 14,440 tokens 634 TFLOP/s
# forward, 538 backward; what the compiled and the eager steps take beyond these is set against the bytes of results.
H200 = Rates(719e12, 634e12, 538e12, 3.6e12, 6.4e12, 1.22e12, 0.98e12)


@dataclass(frozen=True)
class Work:
    """Counted work of all blocks of a transformer for one clip."""

    products: float
    attention: float
    results: float
    products_kept: dict[str, float]
    kept: dict[str, int]
    working: int

    @classmethod
    def of(cls, blocks: Sequence[nn.Module], inputs: Sequence) -> Work:
        """Of blocks on any device, the meta device too; `inputs` are those of a block."""
        by_class, count = {}, {}
        for block in blocks:
            count[type(block)] = count.get(type(block), 0) + 1
            if type(block) not in by_class:
                by_class[type(block)] = recorded(block, inputs)

        def total(value) -> float:
            return sum(number * value(by_class[kind]) for kind, number in count.items())

        return cls(
            total(lambda found: found.products),
            total(lambda found: found.attention),
            total(lambda found: found.results),
            {level: total(lambda found, level=level: found.products_kept[level]) for level in LEVELS},
            {level: total(lambda found, level=level: found.kept[level]) for level in LEVELS},
            max(found.results for found in by_class.values()) // 2,
        )


def forward_seconds(work: Work, rates: Rates, compiled: bool) -> float:
    """Of one forward without gradient."""
    between = work.results / (rates.compiled if compiled else rates.eager)
    return work.products / rates.products + work.attention / rates.attention + between


def training_seconds(work: Work, rates: Rates, compiled: bool, level: str | None) -> float:
    """Of one forward and backward of LoRA: gradients of the inputs through all frozen weights, none of those.

    `level` of kept activations; None: nothing is computed again.
    """
    between = work.results / (rates.compiled if compiled else rates.eager)
    # The gradient of the scores needs the scores again: five products where the forward has two.
    backward = work.products / rates.products + 2.5 * work.attention / rates.attention_backward
    backward += work.results / (rates.compiled_backward if compiled else rates.eager_backward)
    again = 0.0
    if level is not None:
        again = between + (work.products - work.products_kept[level]) / rates.products
        if level == "none":
            again += work.attention / rates.attention
    return forward_seconds(work, rates, compiled) + again + backward


def activation_gib(work: Work, level: str) -> float:
    """Peak of kept activations and of what a block needs while it is computed again."""
    return (work.kept[level] + work.working) / GIB
