"""Group relative policy optimization of a flow-matching editor."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.utils import RepeatSampler, disable_dropout_in_model

from editrl.cache import open_cache
from editrl.data import EditDataset, EditExample, write_video
from editrl.errors import EditrlError
from editrl.flow import PolicyLoss, get_kernel, sigma_schedule
from editrl.policy import Conditions, FlowPolicy
from editrl.reward import RewardSet, reward_columns
from editrl.rollout import Trajectory, edit_examples
from editrl.trainers import outage, zero
from editrl.trainers.base import FlowTrainer
from editrl.trainers.chunk import Chunk, best_and_worst, select
from editrl.trainers.groups import GroupSchedule
from editrl.trainers.grpo_config import FlowGRPOConfig
from editrl.trainers.matching import NoisedBatch, matching_loss, noised_batches
from editrl.trainers.one_pass import GradientBatch, gradient_batches, gradient_loss
from editrl.trainers.sampling import sample_groups, stochastic_steps
from editrl.trainers.scoring import Reward, as_reward_set, asked_ahead, refuse_split_groups, score
from editrl.trainers.watchdog import Watchdog
from editrl.trainers.window import WindowBatch, window_batches, window_loss
from editrl.watchdog import measure

MicroBatch = WindowBatch | NoisedBatch | GradientBatch


class FlowGRPOTrainer(FlowTrainer):
    """Samples groups of edits, scores them, and raises the probability of those that beat their group.

    Args:
        policy: the editor; its transformer is trained whole, or through LoRA when `peft_config` is given.
        reward_funcs: names, specs or callables (see `editrl.reward`), or a ready `RewardSet`.
        args: see `FlowGRPOConfig`.
        train_dataset, eval_dataset: `EditDataset`s; targets are not used.
        peft_config: LoRA. The reference policy of the KL is then the model with its adapter switched off.
        callbacks: as in transformers; one with `on_rollout(args, state, control, videos, samples)` sees every rollout.
        metric_funcs: rewards that are logged beside the others, in training and evaluation, and never optimised.

    The objective is `args.loss_type`; `window` and `matching` hold the two families. Logs: `rewards/<name>/mean|std`,
    `rewards/<name>/share` (of the advantages), `rewards/<name>/weight` (where it changes), `frac_reward_zero_std`
    (share of groups that cannot teach), `ratio/mean`, `ratio/deviation` (mean |ratio - 1|), `clip_ratio/low|high`,
    `drift` (how far the mean of a step moved, in its std; for nft and awm the velocity), each of these also as
    `<name>/step_<k>` for denoising step k; `kl`, `grad_norm`, `watchdog/<measure>`, `seconds/<phase>`,
    `seconds/reward/<name>` (part of `seconds/reward`; of a background reward what was waited for it at the end).
    """

    def __init__(
        self,
        policy: FlowPolicy,
        reward_funcs: Reward | Sequence[Reward] | RewardSet,
        args: FlowGRPOConfig,
        train_dataset: EditDataset,
        eval_dataset: EditDataset | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        metric_funcs: Sequence[Reward] | RewardSet | None = None,
    ):
        self.rewards = as_reward_set(reward_funcs, args.reward_weights)
        self.watched = as_reward_set(metric_funcs) if metric_funcs is not None else None
        self.scorers = list(filter(None, [self.rewards, self.watched]))
        for dataset in filter(None, [train_dataset, eval_dataset]):
            for scorer in self.scorers:
                scorer.check(dataset)
        for scorer in self.scorers:
            refuse_split_groups(scorer, args)
        self.cache = open_cache(args.conditions_cache, policy, train_dataset, eval_dataset)
        self.sigmas = sigma_schedule(args.num_inference_steps, args.shift)
        noise = (
            {}
            if args.noise_level is None
            else {"eta" if args.sde_kernel == "dance_sde" else "noise_level": args.noise_level}
        )
        self.kernel = get_kernel(args.sde_kernel, **noise)
        if args.max_steps <= 0:
            # The whole run is one pass of the loader, whose groups are numbered through.
            generations = math.ceil(args.num_train_epochs * len(train_dataset) / args.groups_per_generation)
            args.max_steps = generations * args.updates_per_generation
        adapted = peft_config is not None or isinstance(policy.transformer, PeftModel)
        if args.merge_adapter and not adapted:
            raise EditrlError("merge_adapter needs LoRA; set use_peft (in Python: give peft_config), or drop it")
        if args.beta and not adapted and args.deepspeed:
            raise EditrlError("beta without LoRA needs a second whole model, which DeepSpeed does not hold; use LoRA")
        if args.beta and not adapted and args.context_parallel > 1:
            raise EditrlError("beta without LoRA needs a copy of the model, and context_parallel allows none; use LoRA")
        if args.one_pass and is_deepspeed_zero3_enabled():
            raise EditrlError("one_pass needs whole weights, which ZeRO-3 does not keep; use ZeRO-2, or drop it")
        if args.log_step_grad_norm and args.deepspeed:
            raise EditrlError("log_step_grad_norm needs the gradients, which DeepSpeed keeps to itself; drop it")
        self._micro_batches: list[MicroBatch] = []
        self._micro_step = 0
        self._collected = 0  # clips of this rollout whose gradients are held
        self.sampler = zero.Sampler(self, args.ds3_gather_for_rollout)
        if args.watchdog != "off":
            callbacks = [*(callbacks or []), Watchdog(args.watchdog)]
        super().__init__(policy, args, train_dataset, eval_dataset, peft_config, callbacks)
        disable_dropout_in_model(self.model)  # the model that is updated must be the one that sampled
        for scorer in self.scorers:
            scorer.to(args.device)
        self.reference = self._full_reference() if args.beta and not isinstance(self.model, PeftModel) else None

    def bytes_to_come(self) -> int:
        """Gradients of the clips that this rollout has still to collect, in `one_pass`."""
        clips = self.args.generation_batch_size // self.args.data_world_size - self._collected
        return clips * sum(parameter.nbytes for parameter in self.trained_parameters()) if self.args.one_pass else 0

    def _full_reference(self):
        """A frozen copy: without an adapter to switch off, the reference needs weights of its own."""
        return copy.deepcopy(self.model).requires_grad_(False)

    # Data: the loader yields (group, example) numbers only; clips are read when a rollout needs them.

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        generations = math.ceil(args.max_steps / args.updates_per_generation)
        groups = GroupSchedule(len(self.train_dataset), generations * args.groups_per_generation, args.seed)
        sampler = RepeatSampler(
            groups,
            mini_repeat_count=args.num_generations,
            batch_size=args.groups_per_generation,
            repeat_count=args.steps_per_generation * args.num_iterations,
            shuffle=False,
        )
        loader = DataLoader(
            groups,
            batch_size=args.generation_batch_size // args.data_world_size,
            sampler=sampler,
            collate_fn=lambda numbers: {"numbers": torch.tensor(numbers)},
        )
        return self.dealt_to_groups(self.accelerator.prepare(loader))

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> MicroBatch:
        """The next micro-batch; a new rollout whenever the last one is used up."""
        per_generation = self.args.steps_per_generation * self.args.num_iterations
        if self._micro_step % per_generation == 0:
            self._micro_batches, self._collected = [], 0  # the last rollout's go first
            self._micro_batches = self.generate(inputs["numbers"].tolist())
            self._order = self._micro_batch_order()
        micro_batch = self._micro_batches[self._order[self._micro_step % per_generation]]
        self._micro_step += 1
        self._current_step = micro_batch.step
        return micro_batch

    def _micro_batch_order(self) -> list[int]:
        """In which order each iteration goes through the micro-batches of a rollout.

        Shuffled when a rollout makes several updates, since neighbours are members of one group. A function of the seed
        and the update's number, so a resumed run repeats it.
        """
        args = self.args
        order = list(range(args.steps_per_generation))
        shuffled = []
        for iteration in range(args.num_iterations):
            if args.updates_per_generation > 1:
                random.Random(f"{args.seed}-{self.state.global_step}-{iteration}").shuffle(order)
            shuffled += order
        return shuffled

    def train(self, *args, **kwargs):
        """As `FlowTrainer.train`; starts with a fresh rollout. An `OutageError` of a reward leaves a checkpoint."""
        self._micro_step = 0
        with outage.saving(self):
            return super().train(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        updates = self.args.updates_per_generation
        if checkpoint is not None and self.state.global_step % updates:
            raise EditrlError(
                f"'{checkpoint}' was saved in the middle of a rollout of {updates} updates and cannot be continued "
                f"exactly; resume from a checkpoint whose number is a multiple of {updates}"
            )

    # Rollout.

    def generate(self, numbers: list[list[int]]) -> list[MicroBatch]:
        """Sample, decode and score a rollout: this process's share of a generation batch, as micro-batches to train.

        One after the other; but where a reward is asked in the background, clips are decoded as soon as they are
        sampled, and it gets them while the next ones are.

        `numbers`: [group, example index] of each clip; the members of a group are neighbours.
        """
        args, device = self.args, self.args.device
        groups, indices = (list(column) for column in zip(*numbers, strict=True))
        first = args.data_rank * len(groups)
        members = [(first + position) % args.num_generations for position in range(len(groups))]

        with self.timed("rollout"):
            distinct = sorted(set(indices))
            examples = {index: self.train_dataset[index] for index in distinct}
            encoded = self.encoder(self.train_dataset).encode([examples[index] for index in distinct]).to(device)
            conditions = encoded[torch.tensor([distinct.index(index) for index in indices], device=device)]
            window = stochastic_steps(args, groups[0] // args.groups_per_generation)
            size = min(args.per_device_train_batch_size, len(groups))
        samples = [examples[index] for index in indices]
        with asked_ahead(self, samples, groups) as ahead:
            trajectories, videos = [], []
            with self.timed("rollout"), self.averaged_weights("old_policy"), self.sampler.gathered():
                # Dropout is off in both modes, of which compiled blocks would have a graph each.
                self.model_wrapped.train(self.args.compile_blocks)
                for trajectory in sample_groups(self, conditions, groups, members, window, size):
                    trajectories.append(trajectory)
                    if ahead:
                        clips = self._clips([trajectory])
                        videos += clips
                        in_memory = [clip.cpu() for clip in clips]
                        for asked in ahead.values():
                            asked.add(in_memory)
            if not ahead:
                videos = self._clips(trajectories)
            with self.timed("reward"):
                advantages = score(self, videos, samples, groups, ahead)
        self._write_videos(videos, samples, members)
        self._rolled_out(videos, samples)

        slices = [slice(start, start + size) for start in range(0, len(groups), size)]
        chunks = [
            Chunk(trajectory, conditions[part], groups[part], members[part], advantages[part])
            for part, trajectory in zip(slices, trajectories, strict=True)
        ]
        if args.num_selected_generations:
            chunks = select(chunks, best_and_worst(advantages, groups, args.num_selected_generations), size)
        for chunk in chunks:
            chunk.conditions = self.policy.compact(chunk.conditions)
        with self.timed("rollout"), self.averaged_weights("old_policy"):
            if args.one_pass:
                return gradient_batches(chunks)
            return window_batches(self, chunks) if args.on_window else noised_batches(self, chunks)

    def _clips(self, trajectories: list[Trajectory]) -> list[Tensor]:
        """Their decoded clips, each [F,3,H,W] float32 in [0,1]."""
        with self.timed("decode"):
            return [clip for trajectory in trajectories for clip in self.policy.decode(trajectory.clean).float()]

    def _write_videos(self, videos: list[Tensor], samples: list[EditExample], members: list[int]) -> None:
        args, step = self.args, self.state.global_step
        if not (args.video_steps and step % args.video_steps == 0 and self.is_world_process_zero()):
            return
        folder = Path(args.output_dir) / "videos" / f"step-{step:06d}"
        for video, sample, member in list(zip(videos, samples, members, strict=True))[: args.num_videos]:
            name = quote(sample.id, safe="")  # an id may hold slashes
            if member == 0:
                write_video(folder / f"{name}-source.mp4", sample.source, sample.fps)
            write_video(folder / f"{name}-{member}.mp4", video, sample.fps)

    def _rolled_out(self, videos: list[Tensor], samples: list[EditExample]) -> None:
        """Show freshly sampled clips to the callbacks that define `on_rollout`."""
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_rollout"):
                callback.on_rollout(self.args, self.state, self.control, videos=videos, samples=samples)

    # Update.

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        # The GPU is waited for once an update, with its last micro-batch.
        with self.timed("train", wait=self.accelerator.sync_gradients):
            gradients = self._gradients() if self.args.log_step_grad_norm else None
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.args.one_pass and self.accelerator.sync_gradients:
                self._micro_batches = []  # all are used up, and evaluation or a checkpoint may follow
            if gradients is not None:
                self._record_step_grad_norm(gradients)
        return loss

    def micro_batch_loss(self, model, inputs: MicroBatch) -> Tensor:
        if self.args.one_pass:
            return gradient_loss(self, model, inputs)
        return window_loss(self, model, inputs) if self.args.on_window else matching_loss(self, model, inputs)

    def reference_velocity(self, model, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Velocity of the reference policy: the adapter switched off, or a copy of the first weights. No gradient."""
        if self.reference is None:
            switched_off = self.accelerator.unwrap_model(model).disable_adapter()
            reference = model
        else:
            # The policy's forward was wrapped for mixed precision after the copy was made.
            switched_off, reference = self.accelerator.autocast(), self.reference
        with torch.no_grad(), switched_off:
            return self.policy.velocity(reference, latents, sigma, conditions)

    def record_ratio(self, objective: PolicyLoss, step: int | None = None) -> None:
        """Record what a policy loss tells about its ratio."""
        self.record("ratio/mean", objective.ratio.mean(), step)
        self.record("ratio/deviation", (objective.ratio - 1).abs().mean(), step)
        self.record("clip_ratio/low", objective.clipped_low.float().mean(), step)
        self.record("clip_ratio/high", objective.clipped_high.float().mean(), step)

    def record(self, name: str, value: Tensor | float, step: int | None = None) -> None:
        """As `FlowTrainer.record`; with a denoising step, also under `<name>/step_<step>`."""
        super().record(name, value)
        if step is not None:
            super().record(f"{name}/step_{step}", value)

    def _gradients(self) -> list[Tensor]:
        """What earlier micro-batches of this update have accumulated."""
        return [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            for parameter in self.trained_parameters()
        ]

    def _record_step_grad_norm(self, before: list[Tensor]) -> None:
        """Gradient norm of the last micro-batch by itself."""
        added = [
            parameter.grad - earlier
            for parameter, earlier in zip(self.trained_parameters(), before, strict=True)
            if parameter.grad is not None
        ]
        # Accumulated gradients are divided by the number of micro-batches.
        norm = torch.nn.utils.get_total_norm(added) * self.args.gradient_accumulation_steps
        FlowTrainer.record(self, f"grad_norm/step_{self._current_step}", norm)

    # Evaluation.

    def sample(self, dataset: EditDataset, indices: Sequence[int]) -> list[Tensor]:
        """Edit examples with the current weights (their moving average, if kept) by the ODE, from noise fixed for each
        example; clips [F,3,H,W]."""
        args = self.args
        self.model_wrapped.eval()
        with self.averaged_weights(), self.sampler.gathered():
            return edit_examples(
                self.encoder(dataset),
                self.sampler.model,
                [dataset[index] for index in indices],
                num_inference_steps=args.eval_num_inference_steps,
                shift=args.eval_shift or args.shift,
                noise_keys=[(args.eval_seed, index) for index in indices],
                batch_size=args.per_device_eval_batch_size,
                ode_solver=args.eval_ode_solver or args.ode_solver,
            )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Means over the evaluation set: `eval_rewards/<name>/mean` and `eval_metrics/<name>/mean`."""
        args, dataset = self.args, eval_dataset or self.eval_dataset
        # Every rank makes as many forwards, or ZeRO-3 would wait for ever; what is sampled twice counts once.
        world, rank = args.data_world_size, args.data_rank
        places = [rank + k * world for k in range(math.ceil(len(dataset) / world))]
        mine, counts = [place % len(dataset) for place in places], [place < len(dataset) for place in places]
        videos = self.sample(dataset, mine)
        samples = [dataset[index] for index in mine]
        columns = reward_columns(samples)
        scores = {}
        for kind, scorer in (("rewards", self.rewards), ("metrics", self.watched)):
            if scorer is not None:  # an evaluated clip is a group by itself
                values = outage.score(self, scorer, videos, columns, places)
                scores[kind] = dict(zip(scorer.names, values.unbind(1), strict=True))
        if args.watchdog != "off":
            scores["watchdog"] = measure(videos, [sample.source for sample in samples])
        metrics = {}
        for kind, columns in scores.items():
            for name, values in columns.items():
                mean, std = self._mean_and_std(values, counts)
                metrics[f"{metric_key_prefix}_{kind}/{name}/mean"] = mean
                if kind == "watchdog":
                    metrics[f"{metric_key_prefix}_{kind}/{name}/std"] = std
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _mean_and_std(self, values: Tensor, counts: Sequence[bool]) -> tuple[float, float]:
        """Over all processes, of the known values [B] that count; population std, NaN where there is none."""
        values = values.cpu().double().where(torch.tensor(counts), torch.nan)
        moments = torch.stack([(~values.isnan()).sum(), values.nansum(), values.square().nansum()])
        wide = torch.float32 if self.args.device.type == "mps" else torch.float64
        number, total, squares = self.accelerator.reduce(moments.to(self.args.device, wide), "sum").tolist()
        if not number:
            return math.nan, math.nan
        mean = total / number
        return mean, math.sqrt(max(squares / number - mean**2, 0))
