"""What SFT and GRPO share on top of `transformers.Trainer`: metrics, EMA, and checkpoints that are whole or absent."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from huggingface_hub import save_torch_state_dict
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from editrl.cache import ConditionsCache
from editrl.data import EditDataset
from editrl.errors import EditrlError
from editrl.policy import FlowPolicy
from editrl.speed import compile_vae, park_frozen_modules, prepare_transformer, quantize_blocks, repeated_blocks
from editrl.trainers import zero, zero_checkpoint
from editrl.trainers.config import FlowConfig

COMPLETE = "complete"
"""Last file of a checkpoint: a folder without it was cut off while being written."""


class FlowTrainer(Trainer):
    """Base of the trainers; trains `policy.transformer`, whole or through PEFT adapters."""

    cache: ConditionsCache | None = None
    """Where conditions are read instead of being computed; subclasses open it."""

    vae_part = "decoder"
    """What `compile_vae` compiles: the part that each step runs."""

    def __init__(
        self,
        policy: FlowPolicy,
        args: FlowConfig,
        train_dataset=None,
        eval_dataset=None,
        peft_config: PeftConfig | None = None,
        callbacks=None,
    ):
        self.policy = policy
        if args.deepspeed and args.use_cpu:
            raise EditrlError(
                "use_cpu turns DeepSpeed off; drop use_cpu (without a GPU it runs on the CPU), or deepspeed"
            )
        if isinstance(policy.transformer, PeftModel):
            if peft_config is not None:
                raise EditrlError("the transformer has an adapter already; drop peft_config, or merge_and_unload() it")
        else:
            policy.transformer.requires_grad_(peft_config is None)
        if args.fp8_base and is_deepspeed_zero3_enabled():
            raise EditrlError(
                "fp8_base keeps every block's weights whole, and ZeRO-3 does not shard them; use ZeRO-2, or drop it"
            )
        if args.fp8_base:
            quantize_blocks(repeated_blocks(policy.transformer))
        if peft_config is not None:
            policy.transformer = get_peft_model(policy.transformer, peft_config)
        memory = args.activation_memory
        if memory is not None and (is_deepspeed_zero3_enabled() or args.context_parallel > 1):
            raise EditrlError(
                "activation_memory plans with whole weights and whole clips, so neither with ZeRO-3 nor with "
                "context_parallel; use gradient_checkpointing"
            )
        prepare_transformer(
            policy.transformer,
            compiled=args.compile_blocks and not is_deepspeed_zero3_enabled(),  # whose Sampler compiles
            checkpointed=args.gradient_checkpointing,
            activation_memory=memory if memory in (None, "auto") else float(memory),
            attention_backend=args.attention_backend,
            bytes_to_come=self.bytes_to_come,
        )
        # Under its old name and its new one: transformers would call a method that diffusers' models do not have.
        args.gradient_checkpointing = args.activation_checkpointing = False
        share_clips(policy, args.context_parallel)
        super().__init__(
            model=policy.transformer,
            args=args,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        if is_deepspeed_zero3_enabled():
            zero.require_whole(self.frozen_modules())
            zero.mark_leaf_blocks(self.model)
        if args.compile_vae:
            compile_vae(policy.decoding_modules(), self.vae_part)
        if args.park_frozen:
            park_frozen_modules(policy, args.device)
        else:
            for module in self.frozen_modules():
                module.to(args.device)
        self.model_accepts_loss_kwargs = False  # losses are means over a micro-batch
        self._means: dict[str, list] = defaultdict(list)
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner_seconds: list[float] = []  # of the phases that are under way: what those within took
        self._logged_step = 0
        if not self.is_deepspeed_enabled and any(p.dtype != torch.float32 for p in self.trained_parameters()):
            raise EditrlError(
                "the trained weights are not float32, so small updates would be rounded away; load the policy with "
                "dtype float32, train LoRA adapters, or use DeepSpeed, which keeps float32 copies"
            )
        self.averages: dict[str, EMAModel] = {}
        for name, decay in args.average_decays.items():
            if not decay:
                continue
            if is_deepspeed_zero3_enabled():
                raise EditrlError(
                    f"{name}_decay does not work with ZeRO-3, which shards the weights; use ZeRO-2, or drop it"
                )
            self.averages[name] = EMAModel(self.trained_parameters(), decay=decay)
            self.averages[name].to(args.device, torch.float32)  # in bfloat16 a slow average would never move

    def bytes_to_come(self) -> int:
        """Of GPU memory that this trainer will still take, beside activations, gradients and the optimizer's state."""
        return 0

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that the optimizer sees."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    # Context parallelism: the processes of a group do the same work on the same clips.

    def get_train_dataloader(self) -> DataLoader:
        return self.dealt_to_groups(super().get_train_dataloader())

    def dealt_to_groups(self, loader: DataLoader) -> DataLoader:
        """A loader that accelerate deals to processes, dealt to groups of them: all of a group get the same batches."""
        if self.args.context_parallel == 1:
            return loader
        dealer = loader.batch_sampler
        dealer.num_processes, dealer.process_index = self.args.data_world_size, self.args.data_rank
        if self.args.data_world_size == 1:
            dealer.even_batches = False  # a last batch may be short, as on one process
        return loader

    def get_cp_size(self) -> int:
        """What `transformers.Trainer` divides the batch size that it reports by."""
        return self.args.context_parallel

    def gather_clips(self, values: Tensor) -> Tensor:
        """What every clip of a rollout has: [B,...] on each process -> [N,...], in order.

        Of processes that share clips the first one's: their scores may differ, if a reward is not deterministic.
        """
        by_process = self.accelerator.gather(values).unflatten(0, (-1, len(values)))
        return by_process[:: self.args.context_parallel].flatten(0, 1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Tensor:
        loss = self.micro_batch_loss(model, inputs)
        if self.args.context_parallel > 1 and loss.requires_grad:
            # A process has its tokens' share of the gradient: a sum is due where DDP and DeepSpeed take the mean.
            loss.register_hook(lambda gradient: gradient * self.args.context_parallel)
        return loss

    def micro_batch_loss(self, model, inputs) -> Tensor:
        """Loss of a micro-batch, the same on all processes that share its clips; subclasses say what it is."""
        raise NotImplementedError

    # Conditions that were computed beforehand.

    def frozen_modules(self) -> Iterable[torch.nn.Module]:
        """Modules that are never trained and have to be on the device."""
        return self.policy.frozen_modules()

    def encoder(self, dataset: EditDataset) -> FlowPolicy:
        """The policy, to encode examples of this data set, or in its place the cache."""
        return self.policy if self.cache is None else self.cache.rows(dataset).standing_in(self.policy)

    # Metrics. Tensors stay on their device until they are logged, so that no step waits for the GPU.

    def record(self, name: str, value: Tensor | float) -> None:
        """Add a value to the mean that is logged under `name` next."""
        self._means[name].append(value.detach().float() if isinstance(value, Tensor) else value)

    @contextlib.contextmanager
    def timed(self, phase: str, wait: bool = True):
        """Add the seconds of a block to `seconds/<phase>`, logged a step, without those of phases within it.
        `wait`: for the GPU to finish the block."""
        wait = wait and torch.cuda.is_available()
        if wait and self._inner_seconds:
            torch.cuda.synchronize()  # what the outer phase has begun is not of this one
        start = time.perf_counter()
        self._inner_seconds.append(0.0)
        try:
            yield
            if wait:
                torch.cuda.synchronize()
        finally:
            whole, inner = time.perf_counter() - start, self._inner_seconds.pop()
            if self._inner_seconds:
                self._inner_seconds[-1] += whole
            self._seconds[phase] += whole - inner

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._drain_metrics()
        super().log(logs, start_time)

    def _drain_metrics(self) -> dict[str, float]:
        steps = max(self.state.global_step - self._logged_step, 1)
        means = {name: float(torch.as_tensor(values).float().nanmean()) for name, values in self._means.items()}
        means |= {f"seconds/{phase}": seconds / steps for phase, seconds in self._seconds.items()}
        self._means.clear()
        self._seconds.clear()
        self._logged_step = self.state.global_step
        if self.accelerator.num_processes > 1:
            values = torch.tensor(list(means.values()), device=self.args.device)
            means = dict(zip(means, self.accelerator.reduce(values, "mean").tolist(), strict=True))
        return means

    # Exponential moving averages.

    @property
    def ema(self) -> EMAModel | None:
        """The moving average that evaluation and the saved editor use."""
        return self.averages.get("ema")

    @contextlib.contextmanager
    def averaged_weights(self, name: str = "ema"):
        """Within the block the model holds the moving average `name`, if there is one."""
        average = self.averages.get(name)
        if average is None:
            yield
            return
        parameters = self.trained_parameters()
        average.store(parameters)
        average.copy_to(parameters)
        try:
            yield
        finally:
            average.restore(parameters)

    def _maybe_log_save_evaluate(self, tr_loss, *args, **kwargs) -> None:
        # Runs once after each optimizer step, before that step is logged, evaluated or saved.
        control = self.control
        if control.should_log or control.should_save or control.should_training_stop:
            self._require_finite(float(tr_loss))
        for average in self.averages.values():
            if average.optimization_step < self.state.global_step:
                average.step(self.trained_parameters())
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _require_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise EditrlError(
                f"the loss is {loss} at step {self.state.global_step}; lower learning_rate, or check the data"
            )

    # Checkpoints.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `transformers.Trainer.save_model`, with fewer copies: under ZeRO-1 and ZeRO-2 it would have every process
        copy the whole model to the host, the frozen part of a LoRA run included."""
        if self.is_deepspeed_enabled and not zero.is_sharded(self.model_wrapped) and not self.args.push_to_hub:
            if self.args.should_save:
                self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PeftModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir) / "transformer"
            model.save_config(folder)
            state_dict = state_dict or model.state_dict()
            # DeepSpeed keeps weights as parts of long buffers, which safetensors does not take.
            save_torch_state_dict(
                {name: value if _is_whole(value) else _copy(value) for name, value in state_dict.items()},
                folder,
                filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        model = self.accelerator.unwrap_model(model or self.model)
        if isinstance(model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            saved = type(model).from_pretrained(resume_from_checkpoint, subfolder="transformer")
            model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel) or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_checkpoint(self, model, trial) -> None:
        run, limit = Path(self._get_output_dir(trial)), self.args.save_total_limit
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / COMPLETE).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        self.args.save_total_limit = None  # older checkpoints may go only once this one is whole
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for name, average in self.averages.items():
                torch.save(average.state_dict(), folder / f"{name}.pt")
            (folder / COMPLETE).touch()
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled and zero_checkpoint.is_universal(self):
            zero_checkpoint.restore_groups(self, checkpoint)
        for name, average in self.averages.items():
            file = Path(checkpoint) / f"{name}.pt"
            if not file.exists():
                raise EditrlError(f"'{checkpoint}' was saved without a moving average; resume it without {name}_decay")
            average.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            average.to(self.args.device, torch.float32)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `transformers.Trainer.train`; `True` resumes from the newest complete checkpoint of `output_dir`."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint and not (Path(resume_from_checkpoint) / COMPLETE).exists():
            raise EditrlError(
                f"'{resume_from_checkpoint}' is no complete checkpoint (it has no file '{COMPLETE}'); "
                "resume from an earlier one"
            )
        if resume_from_checkpoint:
            zero_checkpoint.prepare_resume(self, resume_from_checkpoint)
        return super().train(resume_from_checkpoint, **kwargs)


def share_clips(policy: FlowPolicy, degree: int) -> None:
    """Make the policy context-parallel, unless it is already; EditrlError if it is of another degree."""
    if policy.context_parallel not in (1, degree):
        raise EditrlError(
            f"{policy.context_parallel} processes share each clip of this policy already; set context_parallel to "
            f"{policy.context_parallel}, not {degree}, or load the policy anew"
        )
    if policy.context_parallel != degree:
        policy.enable_context_parallel(degree)


def _is_whole(value: Tensor) -> bool:
    """Whether a tensor has its memory to itself."""
    return value.untyped_storage().nbytes() == value.nbytes


def _copy(value: Tensor) -> Tensor:
    """On the host, with memory of its own."""
    return torch.empty_like(value, device="cpu").copy_(value)


def newest_checkpoint(output_dir: str | os.PathLike) -> str:
    """The complete checkpoint of `output_dir` with the highest step; `EditrlError` where there is none."""
    folders = [marker.parent for marker in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    if not folders:
        raise EditrlError(f"no complete checkpoint in '{output_dir}' to resume from; start without resuming")
    return str(max(folders, key=lambda folder: int(folder.name.rpartition("-")[2])))
