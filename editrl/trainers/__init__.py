"""The trainers: `transformers.Trainer` plus what SFT and RL of a flow-matching editor add."""

from editrl.trainers.config import FlowSFTConfig
from editrl.trainers.grpo import FlowGRPOTrainer
from editrl.trainers.grpo_config import FlowGRPOConfig
from editrl.trainers.sft import FlowSFTTrainer

__all__ = ["FlowGRPOConfig", "FlowGRPOTrainer", "FlowSFTConfig", "FlowSFTTrainer"]
