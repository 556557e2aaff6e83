"""Training arguments: transformers' fields, TRL's names where TRL has the thing, diffusers' for flow."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from transformers import TrainingArguments

from editrl.errors import EditrlError, did_you_mean

DEFAULT_EPSILON = {"grpo": 1e-4, "grpo_guard": 2e-6}
"""Clip ranges are this small because a log-prob is a mean over all latent elements (Flow-GRPO, GRPO-Guard)."""


@dataclass
class FlowConfig(TrainingArguments):
    """What both trainers share."""

    shift: float = field(
        default=5.0, metadata={"help": "Timestep shift of the schedule (HunyuanVideo: 5 in training)."}
    )
    ema_decay: float | None = field(
        default=None,
        metadata={"help": "Decay of an exponential moving average of the trained weights; used for evaluation."},
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every this many optimizer steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide non-finite losses. Off: a non-finite loss stops the run."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rewards may ask for any column."})

    def __post_init__(self):
        super().__post_init__()
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
        self.require(
            self.max_steps == -1 or self.max_steps >= 1,
            f"max_steps must be at least 1, or -1 for whole epochs, got {self.max_steps}",
        )
        self.require(
            self.save_strategy != "steps" or self.save_steps > 0, f"save_steps must be above 0, got {self.save_steps}"
        )
        self.require(0 < self.shift < math.inf, f"shift must be a finite number above 0, got {self.shift}")
        self.require(
            self.ema_decay is None or 0 <= self.ema_decay < 1, f"ema_decay must be in [0, 1), got {self.ema_decay}"
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
    timestep_sampling: str = field(
        default="logit_normal",
        metadata={
            "help": "Density of the training timesteps before the shift.",
            "choices": ["logit_normal", "uniform"],
        },
    )
    cache_conditions: bool = field(
        default=False,
        metadata={"help": "Keep encoded examples in host memory, so that each is encoded once. For small data sets."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.require(self.mask_weight >= 0, f"mask_weight must be at least 0, got {self.mask_weight}")


@dataclass
class FlowGRPOConfig(FlowConfig):
    """Arguments of `FlowGRPOTrainer`.

    Sizes, with W = `sde_window_size`: a generation batch of `generation_batch_size` clips gives
    `generation_batch_size * W` (clip, timestep) pairs, cut into `steps_per_generation` micro-batches of
    `per_device_train_batch_size` pairs on each process. `gradient_accumulation_steps` of them make one update; equal to
    `steps_per_generation`, it means one on-policy update a rollout.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})

    num_generations: int = field(default=16, metadata={"help": "Clips a group: samples of one example."})
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Clips a rollout over all processes. Default: from steps_per_generation."}
    )
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Micro-batches a rollout. Default: gradient_accumulation_steps."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Passes over each generation batch (mu of GRPO)."})

    num_inference_steps: int = field(default=20, metadata={"help": "Denoising steps of a rollout."})
    sde_kernel: str = field(
        default="flow_sde",
        metadata={"help": "Transition kernel of the window.", "choices": ["flow_sde", "dance_sde", "cps"]},
    )
    noise_level: float | None = field(
        default=None, metadata={"help": "Noise of the kernel (a of flow_sde and cps, eta of dance_sde)."}
    )
    sde_window_size: int = field(default=4, metadata={"help": "Stochastic, trained steps of a rollout."})
    sde_window_range: list[int] | None = field(
        default=None, metadata={"help": "First step and end of the range of the window. Default: the first half."}
    )
    sde_window: str = field(
        default="random",
        metadata={
            "help": "Place of the window: drawn for each rollout, or at the start.",
            "choices": ["random", "fixed"],
        },
    )
    same_init_noise: bool = field(
        default=False,
        metadata={"help": "Members of a group start from one noise, so rewards differ by the trained steps alone."},
    )

    loss_type: str = field(default="grpo", metadata={"help": "Objective.", "choices": ["grpo", "grpo_guard"]})
    epsilon: float | None = field(
        default=None, metadata={"help": "Clip range of the ratio. Default: 1e-4 for grpo, 2e-6 for grpo_guard."}
    )
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip range. Default: epsilon."})
    beta: float = field(
        default=0.0, metadata={"help": "Weight of the Gaussian KL (mean over elements) to the reference."}
    )
    timestep_weighting: str | None = field(
        default=None,
        metadata={
            "help": "Weight of each window step; uniform_gradient evens out their gradient scale. "
            "Default: uniform_gradient for grpo, none for grpo_guard, whose gradient scale is even by itself.",
            "choices": ["none", "uniform_gradient"],
        },
    )

    reward_weights: list[float] | None = field(default=None, metadata={"help": "One weight a reward. Default: 1 each."})
    multi_objective_aggregation: str = field(
        default="normalize_then_sum",
        metadata={"help": "How rewards are combined.", "choices": ["normalize_then_sum", "sum_then_normalize"]},
    )
    scale_rewards: str = field(
        default="group",
        metadata={"help": "Whose std divides the advantages.", "choices": ["group", "batch", "none"]},
    )
    advantage_clip: float = field(default=5.0, metadata={"help": "Advantages are clipped to +- this."})

    eval_num_inference_steps: int = field(default=50, metadata={"help": "Denoising steps at evaluation (ODE)."})
    eval_shift: float | None = field(default=None, metadata={"help": "Shift at evaluation. Default: shift."})
    eval_seed: int = field(default=1234, metadata={"help": "Seed of the evaluation noise, fixed for the whole run."})

    video_steps: int = field(default=0, metadata={"help": "Write rollout videos every this many updates; 0: never."})
    num_videos: int = field(default=4, metadata={"help": "Clips written each time."})

    def __post_init__(self):
        super().__post_init__()
        require = self.require
        steps = ("num_inference_steps", "eval_num_inference_steps", "sde_window_size", "num_iterations")
        for name in (*steps, "num_generations", "generation_batch_size", "steps_per_generation"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        for name in ("beta", "video_steps", "num_videos"):
            require(getattr(self, name) >= 0, f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("noise_level", "epsilon", "epsilon_high", "eval_shift"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"{name} must be above 0, got {value}")
        require(self.num_generations >= 2, "num_generations must be at least 2: a group of one has no advantage")
        self.epsilon = DEFAULT_EPSILON[self.loss_type] if self.epsilon is None else self.epsilon
        if self.timestep_weighting is None:
            self.timestep_weighting = "none" if self.loss_type == "grpo_guard" else "uniform_gradient"
        self._set_window()
        self._set_batch_sizes()

    def _set_window(self) -> None:
        # The last step is left out: it ends at sigma 0, where cps has no noise to score.
        self.sde_window_range = self.sde_window_range or [0, max(self.num_inference_steps // 2, self.sde_window_size)]
        self.require(
            len(self.sde_window_range) == 2,
            f"sde_window_range {self.sde_window_range} must be two numbers: the first step and the end of the range",
        )
        start, stop = self.sde_window_range
        self.require(
            start >= 0 and stop <= self.num_inference_steps - 1 and stop - start >= self.sde_window_size,
            f"sde_window_range {[start, stop]} must lie within [0, {self.num_inference_steps - 1}] "
            f"(num_inference_steps - 1) and hold sde_window_size {self.sde_window_size} steps",
        )

    def _set_batch_sizes(self) -> None:
        require, window = self.require, self.sde_window_size
        device_batch = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise EditrlError(
                "set generation_batch_size or steps_per_generation, not both: each follows from the other"
            )
        if self.generation_batch_size is None:
            self.steps_per_generation = self.steps_per_generation or self.gradient_accumulation_steps
            pairs = device_batch * self.steps_per_generation
            require(
                pairs % window == 0,
                f"per_device_train_batch_size * processes * steps_per_generation = {pairs} must be a multiple of "
                f"sde_window_size {window}",
            )
            self.generation_batch_size = pairs // window
        require(
            self.generation_batch_size % self.num_generations == 0,
            f"generation_batch_size {self.generation_batch_size} must be a multiple of num_generations "
            f"{self.num_generations}",
        )
        require(
            self.generation_batch_size % device_batch == 0,
            f"generation_batch_size {self.generation_batch_size} must be a multiple of per_device_train_batch_size * "
            f"processes = {device_batch}: a micro-batch replays exactly one batch of the rollout",
        )
        self.steps_per_generation = self.generation_batch_size * window // device_batch
        micro_batches = self.steps_per_generation * self.num_iterations
        require(
            micro_batches % self.gradient_accumulation_steps == 0,
            f"steps_per_generation * num_iterations = {micro_batches} must be a multiple of "
            f"gradient_accumulation_steps {self.gradient_accumulation_steps}",
        )
        require(
            self.save_strategy != "steps" or self.save_steps % self.updates_per_generation == 0,
            f"save_steps {self.save_steps} must be a multiple of the {self.updates_per_generation} updates a rollout: "
            "a checkpoint in the middle of a rollout could not be resumed exactly",
        )
        require(
            self.video_steps % self.updates_per_generation == 0,
            f"video_steps {self.video_steps} must be a multiple of the {self.updates_per_generation} updates a rollout",
        )

    @property
    def updates_per_generation(self) -> int:
        """Optimizer steps made from one generation batch."""
        return self.steps_per_generation * self.num_iterations // self.gradient_accumulation_steps

    @property
    def groups_per_generation(self) -> int:
        """Distinct groups of one generation batch, over all processes."""
        return self.generation_batch_size // self.num_generations
