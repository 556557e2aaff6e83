"""Group relative policy optimization of a flow-matching editor."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler, disable_dropout_in_model

from editrl.data import EditDataset, EditExample, write_video
from editrl.errors import EditrlError
from editrl.flow import (
    gaussian_kl,
    get_kernel,
    group_advantages,
    grpo_guard_loss,
    grpo_loss,
    sigma_schedule,
    timestep_weights,
    zero_std_groups,
)
from editrl.policy import Conditions, FlowPolicy
from editrl.reward import RewardSet, reward_columns
from editrl.rollout import INITIAL, edit_examples, rollout, sample_noise
from editrl.trainers.base import FlowTrainer
from editrl.trainers.config import FlowGRPOConfig
from editrl.trainers.groups import GroupSchedule

Reward = str | Callable


@dataclass
class MicroBatch:
    """One trained (chunk of clips, window step): everything a replay of that step needs."""

    latents: Tensor  # [B,C,f,h,w]
    next_latents: Tensor  # [B,C,f,h,w]
    old_mean: Tensor  # [B,C,f,h,w]
    old_log_prob: Tensor  # [B]
    advantages: Tensor  # [B]
    conditions: Conditions
    step: int  # index into the schedule
    weight: float  # of this step, mean 1 over the window


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

    Logs: `rewards/<name>/mean|std`, `frac_reward_zero_std` (share of groups that cannot teach), `ratio/mean`,
    `ratio/deviation` (mean |ratio - 1|), `clip_ratio/low|high`, `kl`, `grad_norm`, `seconds/<phase>` a step.
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
        for dataset in filter(None, [train_dataset, eval_dataset]):
            for scorer in filter(None, [self.rewards, self.watched]):
                scorer.check(dataset)
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
        if args.beta and peft_config is None and args.deepspeed:
            raise EditrlError("beta without LoRA needs a second whole model, which DeepSpeed does not hold; use LoRA")
        self._micro_batches: list[MicroBatch] = []
        self._micro_step = 0
        super().__init__(policy, args, train_dataset, eval_dataset, peft_config, callbacks)
        disable_dropout_in_model(self.model)  # the model that is updated must be the one that sampled
        for scorer in filter(None, [self.rewards, self.watched]):
            scorer.to(args.device)
        self.reference = self._full_reference() if args.beta and not isinstance(self.model, PeftModel) else None

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
            batch_size=args.generation_batch_size // args.world_size,
            sampler=sampler,
            collate_fn=lambda numbers: {"numbers": torch.tensor(numbers)},
        )
        return self.accelerator.prepare(loader)

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> MicroBatch:
        """The next micro-batch; a new rollout whenever the last one is used up."""
        per_generation = self.args.steps_per_generation * self.args.num_iterations
        if self._micro_step % per_generation == 0:
            self._micro_batches = self._generate(inputs["numbers"].tolist())
            self._order = self._micro_batch_order()
        micro_batch = self._micro_batches[self._order[self._micro_step % per_generation]]
        self._micro_step += 1
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
        """As `FlowTrainer.train`; always starts with a fresh rollout."""
        self._micro_step = 0
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

    def _generate(self, numbers: list[list[int]]) -> list[MicroBatch]:
        """Sample, decode and score this process's share [(group, example index)] of a generation batch."""
        args, device = self.args, self.args.device
        groups, indices = (list(column) for column in zip(*numbers, strict=True))
        first = args.process_index * len(groups)
        members = [(first + position) % args.num_generations for position in range(len(groups))]

        with self.timed("rollout"):
            distinct = sorted(set(indices))
            examples = {index: self.train_dataset[index] for index in distinct}
            encoded = self.policy.encode([examples[index] for index in distinct]).to(device)
            conditions = encoded[torch.tensor([distinct.index(index) for index in indices], device=device)]
            window = self._window(groups[0] // args.groups_per_generation)
            self.model_wrapped.eval()
            size = args.per_device_train_batch_size
            chunks = [slice(start, start + size) for start in range(0, len(groups), size)]
            trajectories = [self._rollout(conditions[chunk], groups[chunk], members[chunk], window) for chunk in chunks]
        with self.timed("decode"):
            videos = [video for part in trajectories for video in self.policy.decode(part.clean).float()]
        samples = [examples[index] for index in indices]
        with self.timed("reward"):
            advantages = self._advantages(videos, samples, groups)
        self._write_videos(videos, samples, members)
        self._rolled_out(videos, samples)

        weights = timestep_weights(self.kernel, self.sigmas, window, args.timestep_weighting).tolist()
        return [
            MicroBatch(
                part.latents[k],
                part.next_latents[k],
                part.means[k],
                part.log_probs[k],
                advantages[chunk],
                conditions[chunk],
                step,
                weights[k],
            )
            for chunk, part in zip(chunks, trajectories, strict=True)
            for k, step in enumerate(part.steps)
        ]

    def _window(self, generation: int) -> range:
        """The stochastic steps of a rollout; one window for all groups, so that their updates share a noise level."""
        start, stop = self.args.sde_window_range
        if self.args.sde_window == "random":
            places = stop - start - self.args.sde_window_size + 1
            generator = torch.Generator().manual_seed(self.args.seed + generation)
            start += int(torch.randint(places, (1,), generator=generator))
        return range(start, start + self.args.sde_window_size)

    def _rollout(self, conditions: Conditions, groups: list[int], members: list[int], window: range):
        args, shape = self.args, self.policy.latent_shape(conditions)
        starts = [0] * len(members) if args.same_init_noise else members
        return rollout(
            self.policy,
            self.model_wrapped,
            conditions,
            sigmas=self.sigmas,
            kernel=self.kernel,
            window=window,
            initial_noise=sample_noise(shape, args.seed, groups, starts, INITIAL),
            step_noise=lambda step: sample_noise(shape, args.seed, groups, members, step),
        )

    def _advantages(self, videos: list[Tensor], samples: list[EditExample], groups: list[int]) -> Tensor:
        """Score the clips, and compare them within their groups over all processes. Returns this process's [B]."""
        args, device = self.args, self.args.device
        columns = reward_columns(samples)
        scores = self.rewards(videos, columns).to(device)
        rewards = self.accelerator.gather(scores)
        group_ids = self.accelerator.gather(torch.tensor(groups, device=device))
        self._record_scores(self.rewards, rewards)
        for name, share in zip(self.rewards.names, zero_std_groups(rewards, group_ids).tolist(), strict=True):
            self.record(f"rewards/{name}/frac_zero_std", share)
        weights = self.rewards.weights.to(device)
        self.record("reward", (rewards.nanmean(0).nan_to_num() * weights).sum())
        if self.watched is not None:
            watched = self.accelerator.gather(self.watched(videos, columns).to(device))
            self._record_scores(self.watched, watched, "metrics")
        advantages = group_advantages(
            rewards,
            group_ids,
            weights=weights,
            aggregation=args.multi_objective_aggregation,
            scale=args.scale_rewards,
            clip=args.advantage_clip,
        )
        self.record("frac_reward_zero_std", zero_std_groups(advantages.unsqueeze(1), group_ids).mean())
        first = args.process_index * len(groups)
        return advantages[first : first + len(groups)]

    def _record_scores(self, scorer: RewardSet, scores: Tensor, kind: str = "rewards") -> None:
        for name, values in zip(scorer.names, scores.unbind(1), strict=True):
            known = values[~values.isnan()]
            if len(known):  # a reward may apply to no clip of a rollout
                self.record(f"{kind}/{name}/mean", known.mean())
                self.record(f"{kind}/{name}/std", known.std(correction=0))

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
        before = sum(self._seconds.values())
        # The GPU is waited for once an update, with its last micro-batch.
        with self.timed("step", wait=self.accelerator.sync_gradients):
            loss = super().training_step(model, inputs, num_items_in_batch)
        # What a step takes beyond the rollout that it may have begun with is training.
        whole = self._seconds.pop("step")
        self._seconds["train"] += whole - (sum(self._seconds.values()) - before)
        return loss

    def compute_loss(self, model, inputs: MicroBatch, return_outputs=False, num_items_in_batch=None) -> Tensor:
        args, batch = self.args, inputs
        sigma, sigma_next = self.sigmas[batch.step], self.sigmas[batch.step + 1]
        velocity = self.policy.velocity(model, batch.latents, sigma, batch.conditions)
        replay = self.kernel.step(batch.latents, velocity, sigma, sigma_next, next_sample=batch.next_latents)
        shared = {
            "epsilon": args.epsilon,
            "epsilon_high": args.epsilon_high,
            "weights": torch.full_like(batch.advantages, batch.weight),
        }
        if args.loss_type == "grpo_guard":
            objective = grpo_guard_loss(
                replay.log_prob,
                batch.old_log_prob,
                batch.advantages,
                mean=replay.mean,
                old_mean=batch.old_mean,
                std=replay.std,
                dt=sigma_next - sigma,
                **shared,
            )
        else:
            objective = grpo_loss(replay.log_prob, batch.old_log_prob, batch.advantages, **shared)
        loss = objective.loss
        self.record("ratio/mean", objective.ratio.mean())
        self.record("ratio/deviation", (objective.ratio - 1).abs().mean())
        self.record("clip_ratio/low", objective.clipped_low.float().mean())
        self.record("clip_ratio/high", objective.clipped_high.float().mean())
        if args.beta:
            # The reference's own forward needs no gradient; the mean it is compared with does.
            kl = gaussian_kl(replay.mean, self._reference_mean(model, batch, sigma, sigma_next), replay.std)
            self.record("kl", kl.mean())
            loss = loss + args.beta * kl.mean()
        return loss

    @torch.no_grad()
    def _reference_mean(self, model, batch: MicroBatch, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        if self.reference is None:
            switched_off = self.accelerator.unwrap_model(model).disable_adapter()
            reference = model
        else:
            # The policy's forward was wrapped for mixed precision after the copy was made.
            switched_off, reference = self.accelerator.autocast(), self.reference
        with switched_off:
            velocity = self.policy.velocity(reference, batch.latents, sigma, batch.conditions)
        return self.kernel.step(batch.latents, velocity, sigma, sigma_next, next_sample=batch.next_latents).mean

    # Evaluation.

    def sample(self, dataset: EditDataset, indices: Sequence[int]) -> list[Tensor]:
        """Edit examples with the current weights (their moving average, if kept) by the ODE, from noise fixed for each
        example; clips [F,3,H,W]."""
        args = self.args
        self.model_wrapped.eval()
        with self.averaged_weights():
            return edit_examples(
                self.policy,
                self.model_wrapped,
                [dataset[index] for index in indices],
                num_inference_steps=args.eval_num_inference_steps,
                shift=args.eval_shift or args.shift,
                noise_keys=[(args.eval_seed, index) for index in indices],
                batch_size=args.per_device_eval_batch_size,
            )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Means over the evaluation set: `eval_rewards/<name>/mean` and `eval_metrics/<name>/mean`."""
        args, dataset = self.args, eval_dataset or self.eval_dataset
        # Every rank makes as many forwards, or ZeRO-3 would wait for ever; what is sampled twice counts once.
        share = math.ceil(len(dataset) / args.world_size)
        mine = [(args.process_index + k * args.world_size) % len(dataset) for k in range(share)]
        counts = [args.process_index + k * args.world_size < len(dataset) for k in range(share)]
        videos = self.sample(dataset, mine)
        columns = reward_columns([dataset[index] for index in mine])
        metrics = {}
        for kind, scorer in {"rewards": self.rewards, "metrics": self.watched}.items():
            if scorer is None:
                continue
            scores = scorer(videos, columns).to(args.device)
            known = ~scores.isnan() & torch.tensor(counts, device=args.device).unsqueeze(1)
            totals = torch.stack([scores.where(known, 0).sum(0), known.sum(0).float()])
            sums, numbers = self.accelerator.reduce(totals, "sum")
            for name, mean in zip(scorer.names, (sums / numbers).tolist(), strict=True):
                metrics[f"{metric_key_prefix}_{kind}/{name}/mean"] = mean
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def as_reward_set(rewards: Reward | Sequence[Reward] | RewardSet, weights: list[float] | None = None) -> RewardSet:
    """A `RewardSet` of whatever the user gave."""
    if isinstance(rewards, RewardSet):
        if weights is not None and rewards.weights.tolist() != torch.tensor(weights).tolist():
            raise EditrlError(
                f"reward_weights {weights} differ from the RewardSet's {rewards.weights.tolist()}; give one"
            )
        return rewards
    return RewardSet([rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards), weights=weights)
