"""The options of `editrl sft` and `editrl grpo` beside the trainer's own, and how they become objects."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig

from editrl.data import EditDataset
from editrl.errors import EditrlError
from editrl.policy import FlowPolicy
from editrl.registry import load_policy
from editrl.reward import RewardSet


@dataclass
class PolicyArguments:
    """Which editor is trained, and how much of it."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of the editor."})
    policy: str = field(default="hunyuan_video", metadata={"help": "Policy adapter; `editrl policies` lists them."})
    policy_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Further arguments of the adapter's from_pretrained, such as transformer."},
    )
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of the whole transformer."})
    lora_r: int = field(default=64, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(
        default=256, metadata={"help": "LoRA alpha; 4 times the rank learns where 1 times does not (HunyuanVideo)."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Keep 0 in GRPO: dropout changes the replayed log-prob."}
    )
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"], metadata={"help": "Modules that get an adapter."}
    )

    def load_policy(self) -> FlowPolicy:
        """The editor."""
        return load_policy(self.policy, self.model_name_or_path, **self.policy_kwargs)

    def peft_config(self) -> LoraConfig | None:
        """LoRA, or None for full fine-tuning."""
        if not self.use_peft:
            return None
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
        )


@dataclass
class DataArguments:
    """The clips."""

    train_manifest: str = field(metadata={"help": "JSONL manifest of the training examples."})
    eval_manifest: str | None = field(default=None, metadata={"help": "JSONL manifest of held-out examples."})
    num_frames: int | None = field(default=None, metadata={"help": "Frames taken from each clip, 4k+1. Default: all."})
    height: int | None = field(
        default=None, metadata={"help": "Resize and centre-crop to this height. Default: as is."}
    )
    width: int | None = field(default=None, metadata={"help": "Resize and centre-crop to this width. Default: as is."})

    def load(self, policy: FlowPolicy) -> tuple[EditDataset, EditDataset | None]:
        """Training and evaluation set, their media checked before anything is trained."""
        datasets = [
            EditDataset.from_manifest(
                manifest,
                num_frames=self.num_frames,
                height=self.height,
                width=self.width,
                frame_multiple=policy.frame_multiple,
                size_multiple=policy.size_multiple,
            )
            if manifest
            else None
            for manifest in (self.train_manifest, self.eval_manifest)
        ]
        for dataset in filter(None, datasets):
            dataset.check()
        return datasets[0], datasets[1]


@dataclass
class RewardArguments:
    """What is optimised, and what is only watched."""

    reward_funcs: list[str] = field(
        metadata={"help": "Rewards; `editrl rewards` lists the names, any file.py:name works."}
    )
    reward_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Constructor arguments by reward name: {pickscore: {model: ...}}."}
    )
    metric_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Rewards that are logged but never optimised."}
    )

    def load(self, weights: list[float] | None) -> tuple[RewardSet, RewardSet | None]:
        """The rewards that are optimised, and those that are watched."""
        watched = {name.rpartition(":")[2] for name in self.metric_funcs}
        optimised_kwargs = {name: value for name, value in self.reward_kwargs.items() if name not in watched}
        watched_kwargs = {name: value for name, value in self.reward_kwargs.items() if name in watched}
        rewards = RewardSet(self.reward_funcs, weights=weights, kwargs=optimised_kwargs)
        return rewards, RewardSet(self.metric_funcs, kwargs=watched_kwargs) if self.metric_funcs else None


def resumable(output_dir: str) -> bool:
    """Whether a run in `output_dir` has begun."""
    return any(Path(output_dir).glob("checkpoint-*"))


def refuse_to_overwrite(args) -> None:
    """Raise rather than mix a new run into the checkpoints of an old one."""
    if args.resume_from_checkpoint is None and resumable(args.output_dir):
        raise EditrlError(
            f"output_dir '{args.output_dir}' holds the checkpoints of an earlier run; continue it with "
            "--resume_from_checkpoint true, or choose another --output_dir"
        )


def resume_from(args) -> str | bool | None:
    """`--resume_from_checkpoint`: `true` for the newest checkpoint of output_dir, or a folder."""
    value = args.resume_from_checkpoint
    return True if str(value).lower() == "true" else value
