"""The options of `editrl sft` and `editrl grpo` beside the trainer's own, and how they become objects."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import LoraConfig

from editrl.data import EditDataset
from editrl.errors import EditrlError
from editrl.policy import FlowPolicy
from editrl.registry import list_rewards, load_policy, policies, reward_name, split_alias
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

    def find(self) -> type[FlowPolicy]:
        """The policy's class, which knows the geometry of clips, and a look at the folder. Reads no weights."""
        find_model(self.model_name_or_path, "model_name_or_path")
        return policies.find(self.policy)

    def load(self) -> FlowPolicy:
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

    def load(self, policy: type[FlowPolicy]) -> list[EditDataset]:
        """Training set and, if there is one, evaluation set; their media are checked."""
        datasets = [
            EditDataset.from_manifest(
                manifest,
                num_frames=self.num_frames,
                height=self.height,
                width=self.width,
                frame_multiple=policy.frame_multiple,
                size_multiple=policy.size_multiple,
            )
            for manifest in (self.train_manifest, self.eval_manifest)
            if manifest is not None
        ]
        for dataset in datasets:
            dataset.check()
        return datasets


@dataclass
class RewardArguments:
    """What is optimised, and what is only watched."""

    reward_funcs: list[str] = field(
        metadata={
            "help": "Rewards; `editrl rewards` lists the names, any file.py:name works; of one kind twice: "
            "quality=remote alignment=remote."
        }
    )
    reward_kwargs: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Constructor arguments by reward name: {pickscore: {model: ...}}."}
    )
    reward_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "How rewards are asked, by reward name, in place of what they say themselves: "
            "{pickscore: {batch_size: 16, frames: 8, keep_on: between}}."
        },
    )
    metric_funcs: list[str] = field(
        default_factory=list, metadata={"help": "Rewards that are logged but never optimised."}
    )

    def load(self, weights: list | None) -> list[RewardSet]:
        """The rewards that are optimised and, if there are any, those that are watched."""
        reward_sets = [RewardSet(self.reward_funcs, weights=weights, **self._settings(self.reward_funcs))]
        if self.metric_funcs:
            reward_sets.append(RewardSet(self.metric_funcs, **self._settings(self.metric_funcs)))
        return reward_sets

    def _settings(self, specs: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Arguments and options of `specs`, and those of a name that nobody knows: the RewardSet refuses them.

        A recipe's arguments of a reward that the command line left out are no mistake; those of one that goes by
        another name here are.
        """
        names, everything = set(map(reward_name, specs)), [*self.reward_funcs, *self.metric_funcs]
        renamed = {reward_name(spec) for alias, spec in map(split_alias, everything) if alias is not None}
        elsewhere = {entry.name for entry in list_rewards()} - renamed
        elsewhere = (elsewhere | set(map(reward_name, everything))) - names
        return {
            kind: {name: value for name, value in given.items() if name not in elsewhere}
            for kind, given in (("kwargs", self.reward_kwargs), ("options", self.reward_options))
        }


def find_model(name_or_path: str, option: str) -> None:
    """EditrlError for what is neither a folder nor can be a Hub id (`name` or `owner/name`)."""
    try:
        if not Path(name_or_path).is_dir():
            validate_repo_id(name_or_path)
    except HFValidationError as error:
        raise EditrlError(f"{option}: there is no folder '{name_or_path}', and a Hub id is `owner/name`") from error
