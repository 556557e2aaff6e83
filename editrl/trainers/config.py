"""Training arguments: transformers' fields, TRL's names where TRL has the thing, diffusers' for flow."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from editrl.errors import EditrlError, did_you_mean
from editrl.trainers import zero


@dataclass
class FlowConfig(TrainingArguments):
    """What both trainers share."""

    shift: float = field(
        default=5.0, metadata={"help": "Timestep shift of the schedule (HunyuanVideo: 5 in training)."}
    )
    timestep_sampling: str = field(
        default="logit_normal",
        metadata={
            "help": "Density, before the shift, of timesteps at which clean latents are noised for training.",
            "choices": ["logit_normal", "uniform"],
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of an exponential moving average of the trained weights, used for evaluation; ramped up as "
            "(1 + n) / (10 + n) over the updates n."
        },
    )
    compile_blocks: bool = field(
        default=False,
        metadata={
            "help": "Compile the transformer's blocks, one graph for all of a class. The window of a rollout then runs "
            "through the graph that training uses, so that the ratio starts at 1. Under ZeRO-3 only deterministic "
            "steps are compiled, of rollouts and evaluations with gathered weights. Not with context_parallel."
        },
    )
    compile_vae: bool = field(
        default=False,
        metadata={
            "help": "Compile the part of the VAE that each step runs: the decoder in GRPO, the encoder in SFT. About a "
            "minute for each size of clips, which a hundred clips make up for."
        },
    )
    activation_memory: str | None = field(
        default=None,
        metadata={
            "help": "GiB that the blocks' activations may take in training, or auto: what the GPU has left. The rest "
            "is computed again in the backward pass. In place of gradient_checkpointing, which keeps nothing."
        },
    )
    attention_backend: str | None = field(
        default=None, metadata={"help": "Attention backend of diffusers, such as _native_cudnn. Default: PyTorch's."}
    )
    fp8_base: bool = field(
        default=False,
        metadata={"help": "Round the frozen weights under LoRA to FP8, for sampling and training alike (H100 and up)."},
    )
    park_frozen: bool = field(
        default=False,
        metadata={
            "help": "Keep the frozen models (VLM, VAE) in pinned host memory while they are not used. Frees GPU memory "
            "for activations; each use costs a transfer."
        },
    )
    conditions_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder that `editrl precompute` has filled: conditions are read there instead of being computed."
        },
    )
    context_parallel: int = field(
        default=1,
        metadata={
            "help": "Neighbouring processes that share the tokens of each clip (Ulysses), for clips whose activations "
            "do not fit one GPU. Batch sizes count such a group as one process."
        },
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every this many optimizer steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide non-finite losses. Off: a non-finite loss stops the run."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rewards may ask for any column."})
    deepspeed: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "DeepSpeed: zero1, zero2, zero3 or zero3_offload (packaged), the path of a JSON file, or a dict."
        },
    )

    def __post_init__(self):
        self.deepspeed = zero.read_config(self.deepspeed)
        if self.deepspeed and not self.use_cpu:
            zero.stand_alone()
        super().__post_init__()
        zero.require_one_group(self.world_size)
        for option in fields(self):
            value, choices = getattr(self, option.name), option.metadata.get("choices")
            if isinstance(choices, list) and value is not None and value not in choices:
                raise EditrlError(
                    f"{option.name} is {value!r}; use one of {', '.join(choices)}." + did_you_mean(str(value), choices)
                )
        sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        at_least = dict.fromkeys(sizes, 1) | dict.fromkeys(("learning_rate", "seed", "weight_decay"), 0)
        for name, least in at_least.items():
            self.require(getattr(self, name) >= least, f"{name} must be at least {least}, got {getattr(self, name)}")
        self._check_context_parallel()
        self.require(
            self.max_steps == -1 or self.max_steps >= 1,
            f"max_steps must be at least 1, or -1 for whole epochs, got {self.max_steps}",
        )
        self.require(
            self.save_strategy != "steps" or self.save_steps > 0, f"save_steps must be above 0, got {self.save_steps}"
        )
        self.require(
            self.conditions_cache is None or Path(self.conditions_cache).is_dir(),
            f"conditions_cache: there is no folder '{self.conditions_cache}'; fill it with `editrl precompute --config "
            f"RECIPE --conditions_cache {self.conditions_cache}`",
        )
        self._check_speed()
        self.require(0 < self.shift < math.inf, f"shift must be a finite number above 0, got {self.shift}")
        for name, decay in self.average_decays.items():
            self.require(decay is None or 0 <= decay < 1, f"{name}_decay must be in [0, 1), got {decay}")

    def _check_context_parallel(self) -> None:
        degree, world = self.context_parallel, self.world_size
        self.require(degree >= 1, f"context_parallel must be at least 1, got {degree}")
        self.require(
            degree == 1 or not self.compile_blocks,
            "compile_blocks does not go with context_parallel, whose blocks send messages; drop one of them",
        )
        self.require(
            world % degree == 0,
            f"context_parallel {degree} must divide the number of processes, {world}; start a multiple of {degree} "
            f"(torchrun --nproc_per_node {degree}), or set context_parallel to 1",
        )
        self.require(
            degree == 1 or not self.accelerator_config.dispatch_batches,
            "context_parallel deals batches to groups of processes, dispatch_batches of accelerator_config to "
            "processes; drop one of them",
        )

    @property
    def data_world_size(self) -> int:
        """Among how many the clips are divided: groups of `context_parallel` processes."""
        return self.world_size // self.context_parallel

    @property
    def data_rank(self) -> int:
        """The number of this process's group. Groups are of neighbours, which do the same work."""
        return self.process_index // self.context_parallel

    @property
    def average_decays(self) -> dict[str, float | None]:
        """Moving averages of the trained weights that a trainer keeps: name -> decay, None where there is none."""
        return {"ema": self.ema_decay}

    def _check_speed(self) -> None:
        memory = self.activation_memory
        if memory not in (None, "auto"):
            try:
                fits = 0 < float(memory) < math.inf
            except ValueError:
                fits = False
            self.require(fits, f"activation_memory is {memory!r}; give GiB, or auto")
        self.require(
            memory is None or not self.gradient_checkpointing,
            "activation_memory says what is computed again: drop gradient_checkpointing",
        )
        self.require(
            not self.torch_compile, "torch_compile compiles the whole model; use compile_blocks, which fits the rollout"
        )

    def require(self, condition: bool, message: str) -> None:
        """Raise `EditrlError(message)` unless `condition`."""
        if not condition:
            raise EditrlError(message)


@dataclass
class FlowSFTConfig(FlowConfig):
    """Arguments of `FlowSFTTrainer`."""

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate (VIVA: 2e-5)."})
    mask_weight: float = field(
        default=1.0, metadata={"help": "w_m of the loss (1 + w_m * mask) * flow matching; 0 ignores the masks."}
    )
    condition_dropout: float = field(
        default=0.0,
        metadata={"help": "Share of examples that train without their instruction, for true CFG when sampling."},
    )
    cache_conditions: bool = field(
        default=False,
        metadata={"help": "Keep encoded examples in host memory, so that each is encoded once. For small data sets."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.require(self.mask_weight >= 0, f"mask_weight must be at least 0, got {self.mask_weight}")
        self.require(
            0 <= self.condition_dropout < 1, f"condition_dropout must be in [0, 1), got {self.condition_dropout}"
        )
        self.require(
            not (self.condition_dropout and (self.conditions_cache or self.cache_conditions)),
            "cached conditions all have their instruction: drop condition_dropout, or conditions_cache and "
            "cache_conditions",
        )
