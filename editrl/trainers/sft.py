"""Supervised fine-tuning: (masked) flow matching on source -> target pairs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from editrl.cache import Encoded, encode_examples, open_cache
from editrl.data import EditDataset, EditExample
from editrl.errors import EditrlError
from editrl.flow import flow_matching_loss
from editrl.policy import Conditions, FlowPolicy
from editrl.rollout import INITIAL, add_noise, counter_noise, training_sigmas
from editrl.trainers.base import FlowTrainer
from editrl.trainers.config import FlowSFTConfig

DROPPED = 2**32 - 3
"""Under this the condition dropout draws."""

EVALUATION = 2**32 - 2
"""The step under which evaluation draws its noise: the same at every evaluation."""

ENCODED_AT_ONCE = 64
"""Bounds the memory of the frozen models while the cache is filled."""


class NumberedExamples(Dataset):
    """`dataset` as (index, example) pairs; the example is None where the trainer keeps it encoded."""

    def __init__(self, dataset: EditDataset, decode: bool = True):
        self.dataset, self.decode = dataset, decode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, EditExample | None]:
        return index, self.dataset[index] if self.decode else None


class FlowSFTTrainer(FlowTrainer):
    """Trains a policy on pairs with the rectified-flow loss `mean (1 + w_m M) (v - (noise - clean))^2`.

    Examples of different sizes may share a batch (images are one-frame clips): each size is run by itself.
    """

    vae_part = "encoder"

    def __init__(
        self,
        policy: FlowPolicy,
        args: FlowSFTConfig,
        train_dataset: EditDataset,
        eval_dataset: EditDataset | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        for dataset in filter(None, [train_dataset, eval_dataset]):
            for index in range(len(dataset)):
                if dataset.row(index).get("target") is None:
                    raise EditrlError(
                        f"row '{dataset.row(index).get('id', index)}' has no target clip; SFT needs one in every row"
                    )
        if args.compile_blocks and is_deepspeed_zero3_enabled():
            raise EditrlError("under ZeRO-3 compile_blocks compiles rollouts, and SFT has none; use ZeRO-2, or drop it")
        self.cache = open_cache(args.conditions_cache, policy, train_dataset, eval_dataset)
        self._kept: dict[tuple[EditDataset, int], Encoded] = {}
        decode = not args.cache_conditions and self.cache is None
        super().__init__(
            policy,
            args,
            NumberedExamples(train_dataset, decode),
            NumberedExamples(eval_dataset, decode) if eval_dataset is not None else None,
            peft_config,
            callbacks,
        )

    def frozen_modules(self) -> Iterable[nn.Module]:
        return self.policy.frozen_modules() if self.cache is None else ()

    def micro_batch_loss(self, model, inputs) -> Tensor:
        return self._batch_loss(model, inputs, self.train_dataset, self.state.global_step).mean()

    def _batch_loss(
        self, model, batch: Sequence[tuple[int, EditExample | None]], numbered: NumberedExamples, step: int
    ) -> Tensor:
        """Losses [B]; each shape is a forward of its own."""
        by_shape: dict[tuple, list] = defaultdict(list)
        for position, ((index, _), encoded) in enumerate(zip(batch, self._encoded(batch, numbered, step), strict=True)):
            by_shape[encoded.target_latents.shape].append((position, index, encoded))
        losses, order = [], []
        for items in by_shape.values():
            positions, indices, encoded = zip(*items, strict=True)
            order += positions
            conditions = Conditions.concatenate(one.conditions for one in encoded)
            clean = torch.cat([one.target_latents for one in encoded])
            mask = torch.cat([one.latent_mask for one in encoded])
            losses.append(self._shape_loss(model, indices, conditions, clean, mask, step))
        return torch.cat(losses)[torch.tensor(order, device=self.args.device).argsort()]

    def _shape_loss(self, model, indices, conditions: Conditions, clean: Tensor, mask: Tensor, step: int) -> Tensor:
        device = self.args.device
        conditions, clean, mask = self.policy.compact(conditions.to(device)), clean.to(device), mask.to(device)
        shape = clean.shape[1:]
        noise = torch.stack([counter_noise(shape, self.args.seed, step, index) for index in indices]).to(device)
        sigma = self._sigmas(indices, step).to(device)
        latents = add_noise(clean, noise, sigma)
        velocity = self.policy.velocity(model, latents, sigma, conditions)
        return flow_matching_loss(velocity, clean, noise, mask=mask, mask_weight=self.args.mask_weight)

    def _sigmas(self, indices: Sequence[int], step: int) -> Tensor:
        """Training noise levels [B]."""
        normal = torch.cat([counter_noise((1,), self.args.seed, step, index, INITIAL) for index in indices])
        return training_sigmas(normal, self.args.timestep_sampling, self.args.shift)

    def _dropped(self, index: int, step: int) -> bool:
        """Whether an example trains without its instruction in this step; never in an evaluation."""
        if not self.args.condition_dropout or step == EVALUATION:
            return False
        uniform = torch.special.ndtr(counter_noise((1,), self.args.seed, step, index, DROPPED))
        return uniform.item() < self.args.condition_dropout

    def _encoded(
        self, batch: Sequence[tuple[int, EditExample | None]], numbered: NumberedExamples, step: int
    ) -> list[Encoded]:
        dataset = numbered.dataset
        if not self.args.cache_conditions:
            if self.cache is None:
                dropped = [self._dropped(index, step) for index, _ in batch]
                return encode_examples(self.policy, [example for _, example in batch], dropped)
            return self._read(dataset, [index for index, _ in batch])
        missing = list(dict.fromkeys(index for index, _ in batch if (dataset, index) not in self._kept))
        for start in range(0, len(missing), ENCODED_AT_ONCE):
            part = missing[start : start + ENCODED_AT_ONCE]
            for index, encoded in zip(part, self._read(dataset, part), strict=True):
                self._kept[dataset, index] = encoded.to("cpu")
        return [self._kept[dataset, index] for index, _ in batch]

    def _read(self, dataset: EditDataset, indices: Sequence[int]) -> list[Encoded]:
        """From the cache on the disk, else from the clips."""
        if self.cache is not None:
            rows = self.cache.rows(dataset)
            return [rows[index] for index in indices]
        return encode_examples(self.policy, [dataset[index] for index in indices])

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean loss on the evaluation set, with the moving average if there is one, and fixed noise."""
        numbered = self.eval_dataset
        if eval_dataset is not None:
            numbered = NumberedExamples(eval_dataset, self.train_dataset.decode)
        size = self.args.per_device_eval_batch_size
        self.model_wrapped.eval()
        # Every rank makes as many forwards, or ZeRO-3 would wait for ever; what is judged twice counts once.
        world, rank = self.args.data_world_size, self.args.data_rank
        places = [rank + k * world for k in range(math.ceil(len(numbered) / world))]
        mine, counts = [place % len(numbered) for place in places], [place < len(numbered) for place in places]
        losses = []
        with self.averaged_weights():
            for start in range(0, len(mine), size):
                batch = [numbered[index] for index in mine[start : start + size]]
                losses.append(self._batch_loss(self.model_wrapped, batch, numbered, EVALUATION))
        losses = torch.cat(losses)[torch.tensor(counts, device=self.args.device)]
        totals = torch.stack([losses.sum(), torch.tensor(float(len(losses)), device=self.args.device)])
        total, count = self.accelerator.reduce(totals, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": total / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
