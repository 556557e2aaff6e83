"""one_pass: the same training with a forward less, because a rollout's own forward is differentiated."""

import gc
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from editrl.data import EditDataset
from editrl.errors import EditrlError
from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy
from editrl.recipes.shapes import WEIGHTS
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.world import sample_scenes
from editrl.trainers import FlowGRPOConfig, FlowGRPOTrainer, one_pass

ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "max_steps": 3}


def brightness(videos, **kwargs):
    return [video.mean().item() for video in videos]


@pytest.mark.parametrize("loss_type", ["grpo", "grpo_guard", "dppo"])
def test_it_trains_what_replaying_trains(grpo, updates, weights, loss_type):
    runs = [grpo([brightness], loss_type=loss_type, one_pass=one_pass, **ONE) for one_pass in (False, True)]
    for trainer in runs:
        trainer.train()
    replayed, once = (weights(trainer) for trainer in runs)
    moved = grpo([brightness], loss_type=loss_type, **ONE)
    for name, value in replayed.items():
        torch.testing.assert_close(once[name], value, rtol=0, atol=2e-5)  # of 3e-3, by Adam
        assert "lora_B" not in name or not torch.equal(value, weights(moved)[name])
    for expected, found in zip(*map(updates, runs), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert found["ratio/deviation"] == 0
        assert found["drift"] == 0


def test_every_step_is_one_forward(grpo):
    forwards = {}
    for once in (False, True):
        trainer = grpo([brightness], one_pass=once, **ONE | {"max_steps": 1})
        calls = []
        trainer.model.get_base_model().register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        forwards[once] = len(calls)
    assert forwards == {True: 8 * 4, False: 8 * 4 + 8 * 2}, "8 clips of 4 steps, 2 of them in the window"


def test_the_gradients_of_a_rollout_are_gone_before_the_next(grpo, monkeypatch):
    held = []
    collect = one_pass.GradientCollector.__init__

    def watched(self, *args):
        held.append(sum(isinstance(thing, one_pass.GradientBatch) for thing in gc.get_objects()))
        collect(self, *args)

    monkeypatch.setattr(one_pass.GradientCollector, "__init__", watched)
    grpo([brightness], one_pass=True, **ONE | {"max_steps": 2}).train()
    assert held == [0] * 16, "8 clips in each of 2 rollouts"


@pytest.mark.slow
def test_with_everything_else_that_is_fast(grpo, updates, quick_compiler):
    """Against the same without compiling and without one_pass."""
    fast = {"compile_blocks": True, "activation_memory": "1", "merge_adapter": True, "one_pass": True}
    runs = [grpo([brightness], **ONE | changes | {"max_steps": 2}) for changes in ({}, fast)]
    for trainer in runs:
        trainer.train()
    for expected, found in zip(*map(updates, runs), strict=True):
        assert found["reward"] == pytest.approx(expected["reward"], abs=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}, "per_device_train_batch_size to 1"),
        ({"gradient_accumulation_steps": 8}, "2 updates"),
        ({"num_iterations": 2}, "2 updates"),
        ({"beta": 0.1}, "beta to 0"),
        ({"num_selected_generations": 2, "gradient_accumulation_steps": 8}, "num_selected_generations to null"),
        ({"loss_type": "nft"}, "no stochastic steps"),
        ({"old_log_prob": "recompute"}, "old_log_prob to rollout"),
        ({"fp16": True}, "set bf16"),
        ({"log_step_grad_norm": True}, "log_step_grad_norm to false"),
    ],
)
def test_what_it_cannot_do_is_refused(grpo, changes, message):
    with pytest.raises(EditrlError, match=message):
        grpo([brightness], one_pass=True, **ONE | changes)


# -- two processes, of this file as a program --------------------------------------------------------------------------


KINDS = ["ddp", "zero2"]
TIMEOUT = 300  # seconds after which they are killed


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_program) -> Path:
    folder = tmp_path_factory.mktemp("one-pass")
    run_program(__file__, folder, TIMEOUT)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_in_two_processes_it_trains_what_one_trains_that_replays(kind, folder):
    one, two = (json.loads((folder / f"{kind}-{processes}" / "logs.json").read_text()) for processes in (1, 2))
    for expected, found in zip(one, two, strict=True):
        for name in ("grad_norm", "reward"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def train(folder: Path, kind: str) -> None:
    """Two updates of 8 clips over all processes."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    args = FlowGRPOConfig(
        str(folder / f"{kind}-{processes}"),
        **{"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "shift": 3.0, "seed": 7},
        use_cpu=kind == "ddp",
        **{"max_steps": 2, "learning_rate": 1e-3, "num_generations": 4, "generation_batch_size": 8},
        **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16 // processes},
        one_pass=processes == 2,
        **{"num_inference_steps": 4, "sde_window_size": 2, "sde_window_range": [0, 3]},
        deepspeed=kind if kind.startswith("zero") else None,
    )
    policy = HunyuanVideoPolicy.from_pretrained(str(WEIGHTS / "sft"))
    torch.manual_seed(0)  # of which a fresh LoRA is drawn
    lora = LoraConfig(r=4, target_modules=["to_q", "to_k"])
    trainer = FlowGRPOTrainer(policy, [brightness], args, EditDataset(rows(sample_scenes(8, seed=0))), peft_config=lora)
    trainer.train()
    if trainer.is_world_process_zero():
        logs = [log for log in trainer.state.log_history if "loss" in log]
        Path(args.output_dir, "logs.json").write_text(json.dumps(logs))


def main(folder: Path) -> None:
    import forked  # beside this file
    import test_zero

    test_zero.let_processes_meet()
    for kind in KINDS:
        for processes in (1, 2):
            forked.run(train, processes, folder, kind)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
