"""A run that is killed and resumed is the run that was never killed, bit for bit.

As a script, `python test_resume.py KIND FOLDER UPDATE` is a run that kills itself in the middle of an update.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

import editrl.trainers.base
from editrl.data import EditDataset
from editrl.errors import EditrlError
from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy
from editrl.policies.hunyuan_video.transformer import HunyuanVideoEditTransformer3DModel
from editrl.recipes.shapes import WEIGHTS
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.world import sample_scenes
from editrl.trainers import FlowGRPOConfig, FlowGRPOTrainer, FlowSFTConfig, FlowSFTTrainer
from editrl.trainers.base import newest_checkpoint

SHARED = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "shift": 3.0,
    "seed": 7,
    "learning_rate": 1e-2,
    "ema_decay": 0.9,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
}
GRPO = SHARED | {
    "max_steps": 6,
    "save_steps": 2,
    "num_generations": 4,
    "generation_batch_size": 8,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "num_iterations": 2,  # two updates a rollout, so that a kill can fall between them
    "num_inference_steps": 4,
    "sde_window_size": 2,
    "beta": 0.1,
    "eval_num_inference_steps": 2,
}
NFT = GRPO | {"loss_type": "nft", "old_policy_decay": 0.9, "beta": 0.0}
SFT = SHARED | {"max_steps": 7, "save_steps": 1, "per_device_train_batch_size": 2}  # six pairs: three updates an epoch


def brightness(videos, **kwargs):
    return [video.mean().item() for video in videos]


def lora(dropout: float) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=16, lora_dropout=dropout, target_modules=["to_q", "to_k", "proj_out"])


def tiny_policy() -> HunyuanVideoPolicy:
    policy = HunyuanVideoPolicy.from_pretrained(str(WEIGHTS / "sft"))
    torch.manual_seed(0)
    policy.transformer = HunyuanVideoEditTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        rope_axes_dim=(4, 6, 6),
        text_embed_dim=policy.transformer.config.text_embed_dim,
        pooled_projection_dim=policy.transformer.config.pooled_projection_dim,
    )
    return policy


def make(kind: str, folder: Path, callbacks=(), **changes):
    """A trainer of a kind: "grpo" or "nft" (LoRA), "sft" (the whole transformer), "sft-lora" (with dropout)."""
    policy = tiny_policy()
    train = EditDataset(rows(sample_scenes(6, seed=0)))
    evaluate = EditDataset(rows(sample_scenes(2, seed=1)))
    output = {"output_dir": str(folder)}
    if kind in ("grpo", "nft"):
        args = FlowGRPOConfig(**output | (GRPO if kind == "grpo" else NFT) | changes)
        return FlowGRPOTrainer(policy, [brightness], args, train, evaluate, lora(0.0), list(callbacks))
    peft = lora(0.5) if kind == "sft-lora" else None
    return FlowSFTTrainer(policy, FlowSFTConfig(**output | SFT | changes), train, evaluate, peft, list(callbacks))


class Kill(TrainerCallback):
    """SIGKILL in the middle of an update: gradients are there, the optimizer has not stepped."""

    def __init__(self, update: int):
        self.update = update

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.update:
            os.kill(os.getpid(), signal.SIGKILL)


def saved(checkpoint: Path) -> dict:
    """Everything of a checkpoint that the rest of a run depends on."""
    weights = next(checkpoint.rglob("*model*.safetensors"))
    averages = [name for name in ("ema.pt", "old_policy.pt") if (checkpoint / name).exists()]
    return {
        "weights": load_file(weights),
        "optimizer": torch.load(checkpoint / "optimizer.pt", weights_only=True),
        "scheduler": torch.load(checkpoint / "scheduler.pt", weights_only=True),
        "averages": {name: torch.load(checkpoint / name, weights_only=True) for name in averages},
    }


def course(log_history: list[dict]) -> list[dict]:
    """The log without what a clock said."""
    return [
        {key: value for key, value in log.items() if not key.startswith(("seconds/", "train_", "total_flos"))}
        for log in log_history
    ]


def assert_identical(one, other, where=""):
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_identical(value, other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, (value, other_value) in enumerate(zip(one, other, strict=True)):
            assert_identical(value, other_value, f"{where}/{index}")
    else:
        assert one == other, where


def assert_same_run(resumed, uninterrupted):
    last = f"checkpoint-{uninterrupted.state.max_steps}"
    folders = [Path(trainer.args.output_dir) / last for trainer in (resumed, uninterrupted)]
    assert_identical(saved(folders[0]), saved(folders[1]))
    assert_identical(course(resumed.state.log_history), course(uninterrupted.state.log_history))
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in folders]
    assert course(states[0]["log_history"]) == course(states[1]["log_history"])
    for parameter, other in zip(resumed.trained_parameters(), uninterrupted.trained_parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """kind -> a finished run, made once."""
    finished = {}

    def run(kind):
        if kind not in finished:
            finished[kind] = make(kind, tmp_path_factory.mktemp(kind))
            finished[kind].train()
        return finished[kind]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "killed_in", "resumes_at"), [("grpo", 6, 4), ("nft", 6, 4), ("sft", 3, 2)])
def test_a_killed_run_resumes_as_if_nothing_had_happened(uninterrupted, tmp_path, kind, killed_in, resumes_at):
    killed = subprocess.run([sys.executable, __file__, kind, tmp_path, str(killed_in)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert newest_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{resumes_at}")
    # Killed again, this time while a checkpoint is being written.
    cut_off = tmp_path / f"checkpoint-{resumes_at + 2}"
    shutil.copytree(tmp_path / f"checkpoint-{resumes_at}", cut_off)
    (cut_off / "complete").unlink()
    (cut_off / "optimizer.pt").write_bytes(b"")
    resumed = make(kind, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == resumed.args.max_steps
    assert_same_run(resumed, uninterrupted(kind))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "step"), [("sft", 3), ("sft-lora", 2), ("grpo", 2)], ids=["at the end of an epoch", "dropout", "grpo"]
)
def test_a_run_resumes_from_any_of_its_checkpoints(uninterrupted, tmp_path, kind, step):
    resumed = make(kind, tmp_path)
    resumed.train(resume_from_checkpoint=str(Path(uninterrupted(kind).args.output_dir) / f"checkpoint-{step}"))
    assert_same_run(resumed, uninterrupted(kind))


@pytest.mark.slow
def test_the_reference_of_a_resumed_run_is_still_the_start(tmp_path):
    """Of a whole transformer, whose weights the checkpoint replaces; the reference must not follow."""
    changes = {"max_steps": 4, "save_steps": 2, "eval_strategy": "no"}
    policy = tiny_policy()
    args = [FlowGRPOConfig(output_dir=str(tmp_path), **GRPO | changes) for _ in range(2)]
    train = EditDataset(rows(sample_scenes(6, seed=0)))
    first = FlowGRPOTrainer(policy, [brightness], args[0], train)
    first.train()
    second = FlowGRPOTrainer(tiny_policy(), [brightness], args[1], train)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert course(second.state.log_history) == course(first.state.log_history)
    for name, value in tiny_policy().transformer.state_dict().items():
        assert torch.equal(second.reference.state_dict()[name], value), name


# -- which checkpoints count -------------------------------------------------------------------------------------------


def folder_with(tmp_path: Path, complete=(), cut_off=()) -> Path:
    for step in (*complete, *cut_off):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in complete:
        (tmp_path / f"checkpoint-{step}" / "complete").touch()
    return tmp_path


def test_the_newest_complete_checkpoint_is_that_of_the_highest_step(tmp_path):
    folder = folder_with(tmp_path, complete=[900, 1000, 50], cut_off=[1100])
    assert newest_checkpoint(folder) == str(folder / "checkpoint-1000")


@pytest.mark.parametrize("cut_off", [[], [2, 4]], ids=["none", "cut off"])
def test_without_a_complete_checkpoint_resuming_is_an_error(tmp_path, cut_off):
    folder_with(tmp_path, cut_off=cut_off)
    trainer = make("sft", tmp_path)
    with pytest.raises(EditrlError, match=f"no complete checkpoint in '{tmp_path}' to resume from; start without"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_that_was_cut_off_is_refused_by_name(tmp_path):
    folder_with(tmp_path, complete=[2], cut_off=[4])
    trainer = make("sft", tmp_path)
    with pytest.raises(EditrlError, match=r"'.*checkpoint-4' is no complete checkpoint .*resume from an earlier one"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.fixture
def power_cut(monkeypatch):
    """(step) -> from now on, writing the checkpoint of that step ends before its last file."""

    def at(step):
        save = torch.save

        def cut(value, path, *args, **kwargs):
            if Path(path).name == "ema.pt" and Path(path).parent.name == f"checkpoint-{step}":
                raise KeyboardInterrupt
            save(value, path, *args, **kwargs)

        monkeypatch.setattr(editrl.trainers.base.torch, "save", cut)

    return at


def test_the_last_checkpoint_stays_until_the_next_one_is_complete(tmp_path, power_cut):
    power_cut(2)
    trainer = make("sft", tmp_path, save_total_limit=1, eval_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_a_checkpoint_that_is_written_once_more_is_not_complete_meanwhile(tmp_path, power_cut):
    make("sft", tmp_path, max_steps=2, eval_strategy="no").train()
    power_cut(2)
    again = make("sft", tmp_path, max_steps=2, eval_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_old_checkpoints_are_removed_beyond_the_limit(tmp_path):
    make("sft", tmp_path, max_steps=4, save_total_limit=2, eval_strategy="no").train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]), [Kill(int(sys.argv[3]))]).train()
