"""Faster and smaller: compiled blocks, activations within a budget, merged adapters, FP8 base weights."""

from editrl.speed.activations import BlockRunner, block_function, footprint, plan_levels
from editrl.speed.cost import H200, Rates, Work, activation_gib, forward_seconds, training_seconds
from editrl.speed.fp8 import FP8Linear, quantize_blocks
from editrl.speed.merge import MergedAdapter
from editrl.speed.parking import Parked, park_frozen_modules
from editrl.speed.prepare import calling, compile_vae, compiled_calls, prepare_transformer, repeated_blocks

__all__ = [
    "H200",
    "BlockRunner",
    "FP8Linear",
    "MergedAdapter",
    "Parked",
    "Rates",
    "Work",
    "activation_gib",
    "block_function",
    "calling",
    "compile_vae",
    "compiled_calls",
    "footprint",
    "forward_seconds",
    "park_frozen_modules",
    "plan_levels",
    "prepare_transformer",
    "quantize_blocks",
    "repeated_blocks",
    "training_seconds",
]
