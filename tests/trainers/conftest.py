"""Tiny trainers of the real policy: frozen parts loaded once, a fresh transformer each, a second or two a run."""

import copy

import pytest
import torch
from peft import LoraConfig

from editrl.data import EditDataset
from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy
from editrl.recipes.shapes import WEIGHTS
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.world import sample_scenes
from editrl.trainers import FlowGRPOConfig, FlowGRPOTrainer, FlowSFTConfig, FlowSFTTrainer

QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "shift": 3.0, "seed": 7}
GRPO = QUIET | {
    "max_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "num_generations": 4,
    "generation_batch_size": 8,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,  # 8 clips * 2 trained steps / 8: one update a rollout
    "num_inference_steps": 4,
    "sde_window_size": 2,
    "sde_window_range": [0, 3],
    "eval_num_inference_steps": 2,
}
SFT = QUIET | {
    "max_steps": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
}


@pytest.fixture(scope="session")
def editor() -> HunyuanVideoPolicy:
    """The tiny editor as it is shipped; not to be changed."""
    return HunyuanVideoPolicy.from_pretrained(str(WEIGHTS / "sft"))


@pytest.fixture(scope="session")
def fresh_policy(editor):
    """() or (transformer) -> a policy that shares the editor's frozen parts and may be trained."""

    def make(transformer: torch.nn.Module | None = None) -> HunyuanVideoPolicy:
        return HunyuanVideoPolicy(
            copy.deepcopy(editor.transformer) if transformer is None else transformer,
            editor.vae,
            editor.instructor,
            editor.text_encoder,
            editor.tokenizer,
            reference_position=editor.reference_position,
        )

    return make


class LatentColours(HunyuanVideoPolicy):
    """Shows the first latent channels as colours, so that what can be learned does not depend on a tiny VAE."""

    def decode(self, latents):
        return latents[:, :3].sigmoid().transpose(1, 2).float()


@pytest.fixture
def latent_colours(editor) -> LatentColours:
    transformer = copy.deepcopy(editor.transformer)
    return LatentColours(transformer, editor.vae, editor.instructor, editor.text_encoder, editor.tokenizer)


@pytest.fixture(scope="session")
def pairs() -> EditDataset:
    """Eight pairs of 5 frames of 32x32, with masks and captions."""
    return EditDataset(rows(sample_scenes(8, seed=0)))


@pytest.fixture(scope="session")
def lora():
    """() -> a LoRA of rank 4 on the attentions; options change it."""

    def make(**changes) -> LoraConfig:
        return LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": ["to_q", "to_k", "to_v"]} | changes)

    return make


@pytest.fixture(scope="session")
def grpo(fresh_policy, pairs, lora, tmp_path_factory):
    """(reward) -> a FlowGRPOTrainer with LoRA; two groups of four clips a rollout, two updates. Options change it."""

    def make(
        rewards, *, policy=None, dataset=pairs, evaluate=None, peft="lora", callbacks=None, metrics=None, **config
    ) -> FlowGRPOTrainer:
        folder = str(tmp_path_factory.mktemp("grpo"))
        args = FlowGRPOConfig(**{"output_dir": folder} | GRPO | config)
        torch.manual_seed(0)  # a fresh LoRA is drawn from the global generator
        return FlowGRPOTrainer(
            policy or fresh_policy(),
            rewards,
            args,
            dataset,
            evaluate,
            lora() if peft == "lora" else peft,
            callbacks,
            metrics,
        )

    return make


@pytest.fixture(scope="session")
def sft(fresh_policy, pairs, tmp_path_factory):
    """() -> a FlowSFTTrainer of the whole transformer on the eight pairs, three updates. Options change it."""

    def make(*, policy=None, dataset=pairs, evaluate=None, peft=None, callbacks=None, **config) -> FlowSFTTrainer:
        folder = str(tmp_path_factory.mktemp("sft"))
        args = FlowSFTConfig(**{"output_dir": folder} | SFT | config)
        torch.manual_seed(0)
        return FlowSFTTrainer(policy or fresh_policy(), args, dataset, evaluate, peft, callbacks)

    return make


@pytest.fixture(scope="session")
def weights():
    """(trainer) -> a copy of what it trains, by name."""

    def copied(trainer) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    return copied


@pytest.fixture(scope="session")
def updates():
    """(trainer) -> its log, one dict an update."""
    return lambda trainer: [log for log in trainer.state.log_history if "loss" in log]


@pytest.fixture(scope="session")
def equal():
    """Whether two results of `weights` are the same, bit for bit."""

    def compare(one: dict, other: dict) -> bool:
        assert one.keys() == other.keys()
        return all(torch.equal(value, other[name]) for name, value in one.items())

    return compare
