"""Arguments of GRPO and its relatives; see `config` for what they share with SFT."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from editrl.errors import EditrlError
from editrl.trainers.config import FlowConfig

WINDOW_LOSSES = ("grpo", "grpo_guard", "dppo")
"""Policy gradients on the stochastic steps of a rollout, which are replayed."""

MATCHING_LOSSES = ("nft", "awm", "rwr")
"""Regressions on the clean samples of an ODE rollout, noised anew at drawn timesteps."""

DEFAULT_EPSILON = {"grpo": 1e-4, "grpo_guard": 2e-6, "awm": 1e-2}
"""Clip ranges of the losses that clip. They are this small because a log-prob is a mean over all latent elements
(Flow-GRPO, GRPO-Guard); that of awm is a squared error of order 1."""


@dataclass
class FlowGRPOConfig(FlowConfig):
    """Arguments of `FlowGRPOTrainer`.

    Sizes: each trained clip gives `pairs_per_clip` (clip, timestep) pairs: one for each of the `sde_window_size`
    stochastic steps (grpo, grpo_guard, dppo), or `timesteps_per_sample` (nft, awm, rwr). The pairs of a generation
    batch are cut into `steps_per_generation` micro-batches of `per_device_train_batch_size` on each process;
    `gradient_accumulation_steps` of them make one update. Equal to `steps_per_generation`, it means one on-policy
    update a rollout. The `context_parallel` processes that share clips count as one.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})

    num_generations: int = field(default=16, metadata={"help": "Clips a group: samples of one example."})
    num_selected_generations: int | None = field(
        default=None,
        metadata={"help": "Best of N: train on this many clips of a group only, the best half and the worst half."},
    )
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Clips a rollout over all processes. Default: from steps_per_generation."}
    )
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Micro-batches a rollout. Default: gradient_accumulation_steps."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Passes over each generation batch (mu of GRPO)."})

    num_inference_steps: int = field(default=20, metadata={"help": "Denoising steps of a rollout."})
    ode_solver: str = field(
        default="euler",
        metadata={
            "help": "Solver of the deterministic steps: Euler, or the second-order DPM-Solver++(2M), one forward each.",
            "choices": ["euler", "dpm2"],
        },
    )
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
            "help": "Place of the window: drawn for each rollout, at the start of the range, or sliding through it "
            "from noise to detail (MixGRPO).",
            "choices": ["random", "fixed", "sliding"],
        },
    )
    sde_window_interval: int = field(
        default=25, metadata={"help": "Rollouts after which a sliding window moves on by one step."}
    )
    same_init_noise: bool = field(
        default=False,
        metadata={"help": "Members of a group start from one noise, so rewards differ by the trained steps alone."},
    )
    shared_prefix: bool = field(
        default=True,
        metadata={"help": "With same_init_noise, compute the steps before the window once a group, not once a clip."},
    )

    ds3_gather_for_rollout: bool | None = field(
        default=None,
        metadata={
            "help": "Under ZeRO-3, gather the weights once a rollout and not in every forward. Default: where they fit."
        },
    )

    merge_adapter: bool = field(
        default=False,
        metadata={
            "help": "Merge LoRA into a second copy of its weights for the deterministic steps of a rollout: faster, "
            "for the memory of that copy while sampling. Under ZeRO-3 where the weights are gathered for a rollout."
        },
    )

    loss_type: str = field(
        default="grpo",
        metadata={
            "help": "Objective. On the window: grpo, grpo_guard, dppo. On noised samples of an ODE: nft, awm, rwr.",
            "choices": [*WINDOW_LOSSES, *MATCHING_LOSSES],
        },
    )
    old_log_prob: str = field(
        default="rollout",
        metadata={
            "help": "Where the old log-prob comes from: kept from the rollout, or recomputed as training computes the "
            "new one. Where sampling and training differ numerically, recompute keeps the ratio at 1.",
            "choices": ["rollout", "recompute"],
        },
    )
    one_pass: bool = field(
        default=False,
        metadata={
            "help": "Compute the gradient of a stochastic step when it is sampled and weigh it by the advantage later, "
            "instead of replaying the step: a forward less. For one update a rollout; takes the memory of a gradient "
            "for each clip."
        },
    )
    epsilon: float | None = field(
        default=None, metadata={"help": "Clip range of the ratio. Default: 1e-4 for grpo, 2e-6 grpo_guard, 1e-2 awm."}
    )
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip range. Default: epsilon."})
    dppo_threshold: float = field(
        default=1e-5, metadata={"help": "dppo: KL of a step to the old policy from which on it may not move further."}
    )
    beta: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the KL to the reference: Gaussian (mean over elements) on a window, squared difference "
            "of the velocities for nft, awm, rwr."
        },
    )
    timestep_weighting: str | None = field(
        default=None,
        metadata={
            "help": "Weight of each window step; uniform_gradient evens out their gradient scale. Default: "
            "uniform_gradient for grpo and dppo, none for grpo_guard, whose gradient scale is even by itself.",
            "choices": ["none", "uniform_gradient"],
        },
    )
    timesteps_per_sample: int = field(
        default=2, metadata={"help": "nft, awm, rwr: timesteps at which each clip is noised and trained."}
    )
    nft_beta: float = field(
        default=1.0, metadata={"help": "nft: how far the implicit positive and negative policies lie from the old one."}
    )
    old_policy_decay: float | None = field(
        default=None,
        metadata={
            "help": "nft, awm, rwr: sample from, and compare with, a moving average of the weights with this decay, "
            "ramped up as (1 + n) / (10 + n) over the updates n. Default: the current weights."
        },
    )
    rwr_temperature: float = field(
        default=1.0, metadata={"help": "rwr: samples are weighted by exp(advantage / temperature)."}
    )

    reward_weights: list[Any] | None = field(
        default=None,
        metadata={
            "help": "One weight a reward: a number, a schedule over updates such as {start: 1.0, end: 0.2, steps: 200} "
            "(shape: linear or cosine), or points [[update, value], ...]. Default: 1 each."
        },
    )
    multi_objective_aggregation: str = field(
        default="normalize_then_sum",
        metadata={"help": "How rewards are combined.", "choices": ["normalize_then_sum", "sum_then_normalize"]},
    )
    scale_rewards: str = field(
        default="group",
        metadata={"help": "Whose std divides the advantages.", "choices": ["group", "batch", "none"]},
    )
    advantage_clip: float = field(
        default=5.0, metadata={"help": "Advantages are clipped to +- this; for nft, where they become 0 and 1."}
    )

    eval_num_inference_steps: int = field(default=50, metadata={"help": "Denoising steps at evaluation (ODE)."})
    eval_ode_solver: str | None = field(
        default=None, metadata={"help": "Solver at evaluation. Default: ode_solver.", "choices": ["euler", "dpm2"]}
    )
    eval_shift: float | None = field(default=None, metadata={"help": "Shift at evaluation. Default: shift."})
    eval_seed: int = field(default=1234, metadata={"help": "Seed of the evaluation noise, fixed for the whole run."})

    watchdog: str = field(
        default="warn",
        metadata={
            "help": "What to do when a measure that no reward optimises (edges, colours, exposure, flicker, similarity "
            "to the source) leaves the band of the first evaluation.",
            "choices": ["off", "warn", "stop"],
        },
    )
    log_step_grad_norm: bool = field(
        default=False,
        metadata={"help": "Log the gradient norm of each denoising step; takes a copy of the gradients."},
    )
    video_steps: int = field(default=0, metadata={"help": "Write rollout videos every this many updates; 0: never."})
    num_videos: int = field(default=4, metadata={"help": "Clips written each time."})

    def __post_init__(self):
        super().__post_init__()
        require = self.require
        for name in (
            *("num_inference_steps", "eval_num_inference_steps", "sde_window_size", "sde_window_interval"),
            *("timesteps_per_sample", "num_iterations", "num_generations", "generation_batch_size"),
            "steps_per_generation",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        for name in ("beta", "video_steps", "num_videos"):
            require(getattr(self, name) >= 0, f"{name} must be at least 0, got {getattr(self, name)}")
        for name in (
            *("noise_level", "epsilon", "epsilon_high", "dppo_threshold", "nft_beta", "rwr_temperature"),
            *("advantage_clip", "eval_shift"),
        ):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"{name} must be above 0, got {value}")
        require(self.num_generations >= 2, "num_generations must be at least 2: a group of one has no advantage")
        require(
            not self.log_step_grad_norm or self.context_parallel == 1,
            f"log_step_grad_norm needs the gradient of a micro-batch, of which each of the {self.context_parallel} "
            "context_parallel processes has a share only; drop it",
        )
        self._check_loss()
        require(
            not (self.merge_adapter and self.fp8_base), "FP8 weights take no adapter: drop merge_adapter or fp8_base"
        )
        require(
            not (self.compile_blocks and self.old_log_prob == "recompute"),
            "with compile_blocks the rollout's window runs through the graph of training already: drop old_log_prob",
        )
        if self.epsilon is None:
            self.epsilon = DEFAULT_EPSILON.get(self.loss_type)
        if self.timestep_weighting is None:
            self.timestep_weighting = "uniform_gradient" if self.loss_type in ("grpo", "dppo") else "none"
        if self.on_window:
            self._set_window()
        self._set_batch_sizes()
        if self.one_pass:
            self._check_one_pass()

    @property
    def on_window(self) -> bool:
        """Whether the loss replays stochastic steps, or noises clean samples anew."""
        return self.loss_type in WINDOW_LOSSES

    @property
    def average_decays(self) -> dict[str, float | None]:
        return super().average_decays | {"old_policy": self.old_policy_decay}

    def _check_loss(self) -> None:
        """What contradicts a loss is an error; options of the other losses are not read."""
        loss, require = self.loss_type, self.require
        if loss not in DEFAULT_EPSILON:
            given = self.epsilon is not None or self.epsilon_high is not None
            require(not given, f"loss_type {loss} has no clip range: drop epsilon and epsilon_high")
        if self.on_window:
            require(
                self.old_policy_decay is None,
                f"loss_type {loss} takes its steps from the policy that sampled: old_policy_decay is for "
                f"{', '.join(MATCHING_LOSSES)}",
            )
            return
        why = f"loss_type {loss} samples by the ODE and has no log-prob"
        require(self.old_log_prob == "rollout", f"{why}: drop old_log_prob")
        require(self.timestep_weighting in (None, "none"), f"{why}: drop timestep_weighting")
        require(not self.log_step_grad_norm, f"{why}: its timesteps are drawn anew; drop log_step_grad_norm")
        require(not self.same_init_noise, f"{why}: with same_init_noise all clips of a group would be one")

    def _check_one_pass(self) -> None:
        """A gradient that is the advantage times a known one: of a clip by itself, at a ratio of 1."""
        for fits, message in (
            (self.on_window, f"loss_type {self.loss_type} has no stochastic steps; use {', '.join(WINDOW_LOSSES)}"),
            (self.per_device_train_batch_size == 1, "a gradient is of one clip; set per_device_train_batch_size to 1"),
            (
                self.updates_per_generation == 1,
                f"a rollout makes {self.updates_per_generation} updates and only the first has a ratio of 1; set "
                "gradient_accumulation_steps to steps_per_generation and num_iterations to 1",
            ),
            (not self.beta, "the gradient of the KL is not weighed by the advantage; set beta to 0"),
            (not self.num_selected_generations, "all clips are differentiated; set num_selected_generations to null"),
            (not self.log_step_grad_norm, "steps have no gradients of their own; set log_step_grad_norm to false"),
            (self.old_log_prob == "rollout", "nothing is replayed; set old_log_prob to rollout"),
            (not self.fp16, "losses are differentiated without fp16's scale; set bf16"),
            (self.context_parallel == 1, "processes that share a clip have a part each; set context_parallel to 1"),
        ):
            self.require(fits, f"one_pass: {message}, or drop one_pass")

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
        require, pairs_per_clip = self.require, self.pairs_per_clip
        what = "sde_window_size" if self.on_window else "timesteps_per_sample"
        device_batch = self.per_device_train_batch_size * self.data_world_size
        processes = "processes" + (f" / context_parallel {self.context_parallel}" if self.context_parallel > 1 else "")
        each = f"each of the {self.data_world_size} {processes}"
        selected = self.num_selected_generations
        require(
            selected is None or (2 <= selected < self.num_generations and selected % 2 == 0),
            f"num_selected_generations must be an even number below num_generations {self.num_generations}, got "
            f"{selected}: half of it are a group's best clips, half its worst",
        )
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise EditrlError(
                "set generation_batch_size or steps_per_generation, not both: each follows from the other"
            )
        if self.generation_batch_size is None:
            self.steps_per_generation = self.steps_per_generation or self.gradient_accumulation_steps
            pairs = device_batch * self.steps_per_generation
            require(
                pairs % (pairs_per_clip * (selected or 1)) == 0,
                f"per_device_train_batch_size * {processes} * steps_per_generation = {pairs} must be a multiple of "
                f"{what} {pairs_per_clip}" + (f" * num_selected_generations {selected}" if selected else ""),
            )
            self.generation_batch_size = pairs // pairs_per_clip
            if selected:
                self.generation_batch_size = self.generation_batch_size // selected * self.num_generations
        require(
            self.generation_batch_size % self.num_generations == 0,
            f"generation_batch_size {self.generation_batch_size} must be a multiple of num_generations "
            f"{self.num_generations}",
        )
        if selected:
            require(
                self.groups_per_generation % self.data_world_size == 0,
                f"num_selected_generations needs whole groups on {each}: "
                f"generation_batch_size / num_generations is {self.groups_per_generation}",
            )
        if self.same_init_noise and self.shared_prefix:
            require(
                self.groups_per_generation % self.data_world_size == 0,
                f"shared_prefix needs whole groups on {each}, but "
                f"generation_batch_size / num_generations is {self.groups_per_generation}; set shared_prefix to false",
            )
        trained = "the selected clips of a rollout, " if selected else "generation_batch_size "
        require(
            self.trained_clips % device_batch == 0,
            f"{trained}{self.trained_clips} must be a multiple of per_device_train_batch_size * {processes} = "
            f"{device_batch}: a micro-batch replays exactly one batch of the rollout",
        )
        self.steps_per_generation = self.trained_clips * pairs_per_clip // device_batch
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
        evaluates = self.watchdog == "stop" and self.eval_strategy == "steps" and self.eval_steps
        require(
            not evaluates or self.eval_steps % self.updates_per_generation == 0,
            f"eval_steps {self.eval_steps} must be a multiple of the {self.updates_per_generation} updates a rollout: "
            "the checkpoint with which the watchdog stops a run could not be resumed otherwise",
        )

    @property
    def pairs_per_clip(self) -> int:
        """Timesteps at which each trained clip is trained."""
        return self.sde_window_size if self.on_window else self.timesteps_per_sample

    @property
    def trained_clips(self) -> int:
        """Clips of a generation batch that are trained on, over all processes."""
        return self.groups_per_generation * (self.num_selected_generations or self.num_generations)

    @property
    def updates_per_generation(self) -> int:
        """Optimizer steps made from one generation batch."""
        return self.steps_per_generation * self.num_iterations // self.gradient_accumulation_steps

    @property
    def groups_per_generation(self) -> int:
        """Distinct groups of one generation batch, over all processes."""
        return self.generation_batch_size // self.num_generations
