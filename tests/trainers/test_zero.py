"""ZeRO-2 and ZeRO-3 on two processes compute what one process does, and their runs go on after anything.

Under pytest this file starts itself as a program (`python test_zero.py FOLDER PART...`): each part is one process or
two, which make several runs and leave what the tests compare in FOLDER.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from editrl.data import EditDataset
from editrl.errors import EditrlError
from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy
from editrl.recipes.shapes import WEIGHTS
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.world import sample_scenes
from editrl.trainers import FlowGRPOConfig, FlowGRPOTrainer, FlowSFTConfig, FlowSFTTrainer, zero
from editrl.trainers.base import newest_checkpoint

pytestmark = pytest.mark.slow

TIMEOUT = 500  # seconds after which the processes are killed

SHARED = {
    "report_to": "none",
    "disable_tqdm": True,
    "shift": 3.0,
    "seed": 7,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant_with_warmup",  # so that a shorter run is the beginning of a longer one
    "warmup_steps": 3,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
}
GRPO = SHARED | {
    "num_generations": 4,
    "generation_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "num_iterations": 2,  # two updates a rollout: the second has a loss that is not 0
    "num_inference_steps": 4,
    "sde_window_size": 2,
    "beta": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_num_inference_steps": 2,
    "watchdog": "off",
}
# Norms and biases have no weight decay, so that the optimizer has two groups of parameters.
SFT = SHARED | {"learning_rate": 1e-5, "weight_decay": 50.0}


def brightness(videos, **kwargs):
    return [video.mean().item() for video in videos]


def make(folder, deepspeed, kind="grpo", callbacks=(), **changes):
    """A trainer of a kind: "grpo" (LoRA) or "sft" (the whole transformer), with a global batch of 4."""
    unset_hf_deepspeed_config()  # that of an earlier run; the policy would be sharded while it is loaded
    policy = HunyuanVideoPolicy.from_pretrained(str(WEIGHTS / "sft"))
    train, evaluate = (EditDataset(rows(sample_scenes(count, seed=count))) for count in (8, 2))
    batch = {"per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", 1)), "per_device_eval_batch_size": 1}
    where = {"output_dir": str(folder), "deepspeed": deepspeed, "use_cpu": deepspeed is None}
    torch.manual_seed(0)  # a fresh LoRA is drawn from the global generator
    if kind == "sft":
        return FlowSFTTrainer(policy, FlowSFTConfig(**where | SFT | batch | changes), train, None, None, [*callbacks])
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=r".*transformer_blocks\.\d+\.attn\.to_[qkv]")
    args = FlowGRPOConfig(**where | GRPO | batch | changes)
    return FlowGRPOTrainer(policy, [brightness], args, train, evaluate, lora, [*callbacks])


def finish(trainer, resume=None) -> None:
    """Train to the end and export; the log is written beside the weights."""
    for callback in trainer.callback_handler.callbacks:
        callback.sampler = getattr(trainer, "sampler", None)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        Path(trainer.args.output_dir, "log.json").write_text(json.dumps(trainer.state.log_history))


class Kill(TrainerCallback):
    """SIGKILL of the last process in the middle of update 4: gradients are there, the optimizer has not stepped."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step + 1 == 4:
            Path(args.output_dir, "killed_at").write_text(str(time.monotonic()))  # a clock that processes share
            os.kill(os.getpid(), signal.SIGKILL)


# -- what the processes do ---------------------------------------------------------------------------------------------


def plain(folder: Path) -> None:
    """One process without DeepSpeed."""
    finish(make(folder / "plain", None, max_steps=6))
    finish(make(folder / "plain-sft", None, "sft"))


def alone(folder: Path) -> None:
    """One process without a launcher."""
    for stage in (2, 3):
        finish(make(folder / f"alone-zero{stage}", f"zero{stage}", max_steps=2))
    finish(make(folder / "alone-whole", "zero2", "sft", max_steps=2))
    finish(make(folder / "alone-sft", "zero3", "sft", max_steps=2))


def pair(folder: Path) -> None:
    """Two processes: whole runs, resumed runs, and those that one process began.

    Those of ZeRO-3 come last: it replaces torch's `linear` for the rest of the process, which rounds another way.
    """
    finish(make(folder / "pair-zero2", "zero2", max_steps=6))
    finish(make(folder / "resumed-zero2", "zero2"), folder / "pair-zero2" / "checkpoint-2")
    finish(make(folder / "grown-zero2", "zero2"), begun_alone(folder, "zero2"))
    finish(make(folder / "pair-zero1", "zero1", max_steps=2))
    finish(make(folder / "pair-zero3", sharded(), max_steps=6))
    finish(
        make(folder / "resumed-zero3", sharded(), callbacks=[FailAmongWeights()]), folder / "pair-zero3/checkpoint-2"
    )
    finish(make(folder / "grown-zero3", sharded()), begun_alone(folder, "zero3"))
    finish(make(folder / "each-forward", sharded(), ds3_gather_for_rollout=False, max_steps=2))
    finish(make(folder / "pair-sft", sharded(), "sft"))
    finish(make(folder / "resumed-sft", sharded(), "sft"), folder / "pair-sft" / "checkpoint-2")
    finish(make(folder / "grown-sft", sharded(), "sft"), begun_alone(folder, "sft"))
    finish(make(folder / "pair-zero3_offload", sharded("zero3_offload"), max_steps=2))
    changes = {"loss_type": "nft", "max_steps": 2, "beta": 0.0, "save_strategy": "no", "eval_strategy": "no"}
    finish(make(folder / "nft-gathered", sharded(), **changes))
    finish(make(folder / "nft-each-forward", sharded(), ds3_gather_for_rollout=False, **changes))
    inspect(folder)


def sharded(name: str = "zero3") -> dict:
    """A packaged ZeRO-3, which would keep weights as small as these whole."""
    config = zero.read_config(name)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def begun_alone(folder: Path, name: str) -> str:
    """A copy of what one process left: a conversion writes into it."""
    return shutil.copytree(folder / f"alone-{name}" / "checkpoint-2", folder / f"start-{name}", dirs_exist_ok=True)


class FailAmongWeights(TrainerCallback):
    """An error while the weights are gathered, that somebody catches; the run goes on."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        with contextlib.suppress(KeyError), self.sampler.gathered():
            raise KeyError("in the middle")


def inspect(folder: Path) -> None:
    """What there is of hooks and weights around a gathered rollout, after two updates."""
    trainer = make(folder / "inspected", sharded(), max_steps=2, save_strategy="no", eval_strategy="no")
    trainer.train()
    engine = trainer.model_wrapped

    def look() -> dict:
        parameters = list(engine.module.parameters())
        return {
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.module.modules()),
            "whole": sum(parameter.numel() == parameter.ds_numel for parameter in parameters),
            "parameters": len(parameters),
        }

    offload = engine.optimizer.parameter_offload
    seen = {"before": look(), "deepspeed's": len(offload.forward_hooks) + len(offload.backward_hooks) + 1}
    with trainer.sampler.gathered():
        seen |= {"within": look(), "bare": trainer.sampler.model is engine.module}
        with trainer.sampler.gathered():  # evaluation of a callback in the middle of a rollout
            seen["nested"] = look()
        seen["still"] = look()
    seen |= {"after": look(), "wrapped": trainer.sampler.model is engine}
    blocks = [*trainer.model.get_base_model().transformer_blocks]
    seen["leaves"] = [block._z3_leaf for block in [*blocks, *trainer.model.get_base_model().single_transformer_blocks]]
    frozen = [p for module in trainer.policy.frozen_modules() for p in module.parameters()]
    seen["frozen sharded"] = any(hasattr(parameter, "ds_id") for parameter in frozen)
    if trainer.is_world_process_zero():
        (folder / "seen.json").write_text(json.dumps(seen))


def shrunk(folder: Path) -> None:
    """One process goes on with what two began, or may not."""
    refusals = {}
    for name, deepspeed, checkpoint in (
        ("without deepspeed", None, "pair-zero2"),  # first: accelerate does not let go of DeepSpeed in a process
        ("of another stage", "zero3", "pair-zero2"),
        ("and the other way round", "zero2", "pair-zero3"),
        ("saved without deepspeed", "zero2", "plain"),
    ):
        try:
            make(folder / "refused", deepspeed).train(str(folder / checkpoint / "checkpoint-2"))
        except EditrlError as error:
            refusals[name] = str(error)
    (folder / "refusals.json").write_text(json.dumps(refusals))
    for stage in (2, 3):
        begun = folder / f"pair-zero{stage}" / "checkpoint-2"
        finish(make(folder / f"shrunk-zero{stage}", f"zero{stage}"), begun)
    finish(make(folder / "shrunk-sft", "zero3", "sft"), folder / "pair-sft" / "checkpoint-2")


def killed(folder: Path) -> None:
    finish(make(folder / "killed", sharded(), callbacks=[Kill()]))


def revived(folder: Path) -> None:
    finish(make(folder / "killed", sharded()), True)


def let_processes_meet() -> None:
    """DeepSpeed on the CPU; accelerate has no process group for that: give it gloo. Before `import deepspeed`."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing here calls it; a minute to compile
    prepare = PartialState._prepare_backend

    def with_gloo(self, *args, **kwargs):
        if "LOCAL_RANK" in os.environ:
            return "gloo", DistributedType.MULTI_CPU
        return prepare(self, *args, **kwargs)

    PartialState._prepare_backend = with_gloo


PARTS = {plain: 1, alone: 1, pair: 2, shrunk: 1, revived: 2}


def main(folder: Path, *parts: str) -> None:
    import forked  # beside this file

    let_processes_meet()
    if "killed" in parts:  # one of a launcher's processes
        killed(folder)
    for part, processes in PARTS.items():
        if part.__name__ in parts:
            forked.run(part, processes, folder)


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_program) -> Path:
    """The folder of all runs."""
    folder = tmp_path_factory.mktemp("zero")
    run_program(__file__, folder, TIMEOUT, "plain", "alone", "pair", "shrunk")
    return folder


def course(folder: Path) -> list[dict]:
    """The log without what a clock said."""
    log = json.loads((folder / "log.json").read_text())
    clock = ("seconds/", "train_", "total_flos", "epoch")  # the epoch is the share of the run
    return [{key: value for key, value in entry.items() if not key.startswith(clock)} for entry in log]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors"), None) or next(folder.glob("transformer/*.safetensors")))


def assert_identical(one: Path, other: Path) -> None:
    """Bit for bit; `one` may be the beginning of `other`."""
    log = course(one)
    assert log[:-1] == course(other)[: len(log) - 1]  # the last entry sums up the run
    exported = other if len(log) == len(course(other)) else other / f"checkpoint-{log[-1]['step']}"
    assert weights(one).keys() == weights(exported).keys()
    for name, value in weights(one).items():
        assert torch.equal(value, weights(exported)[name]), name


def assert_close(one: Path, other: Path) -> None:
    """To float32 rounding, which Adam widens where a gradient is near 0; `one` may be the beginning of `other`."""
    log, longer = ([entry for entry in course(folder) if "loss" in entry] for folder in (one, other))
    assert len(log) >= 2
    for entry, expected in zip(log, longer, strict=False):
        for name in ("loss", "grad_norm", "reward", "drift", "kl"):
            if name in expected:
                assert entry[name] == pytest.approx(expected[name], rel=2e-3, abs=2e-6), (entry["step"], name)
    exported = other / f"checkpoint-{log[-1]['step']}"
    for name, value in weights(exported).items():
        torch.testing.assert_close(weights(one)[name], value, rtol=1e-4, atol=2e-4, msg=lambda text, n=name: n + text)


PAIRS = ["pair-zero1", "pair-zero2", "pair-zero3", "pair-zero3_offload"]


@pytest.mark.parametrize("name", ["alone-zero2", "alone-zero3", *PAIRS])
def test_zero_trains_as_one_process_without_it(runs, name):
    assert_close(runs / name, runs / "plain")


def test_a_whole_transformer_trains_and_is_exported(runs):
    for name in ("pair-sft", "alone-sft", "alone-whole"):
        assert_close(runs / name, runs / "plain-sft")
    loaded = HunyuanVideoPolicy.from_pretrained(
        str(WEIGHTS / "sft"), transformer=str(runs / "pair-sft" / "transformer")
    )
    for name, value in loaded.transformer.state_dict().items():
        assert torch.equal(value, weights(runs / "pair-sft")[name])


@pytest.mark.parametrize("stage", [2, 3])
def test_the_adapter_of_the_last_checkpoint_is_the_exported_one(runs, stage):
    folder = runs / f"pair-zero{stage}"
    assert weights(folder).keys() == weights(runs / "plain").keys()
    for name, value in weights(folder).items():
        assert torch.equal(value, weights(folder / "checkpoint-6")[name])


@pytest.mark.parametrize("name", ["zero2", "zero3", "sft"])  # zero3 after errors among gathered weights
def test_a_run_resumed_on_as_many_processes_is_the_uninterrupted_one(runs, name):
    assert_identical(runs / f"resumed-{name}", runs / f"pair-{name}")


@pytest.mark.parametrize("name", ["zero2", "zero3", "sft"])
@pytest.mark.parametrize("kind", ["shrunk", "grown"])
def test_a_run_goes_on_with_another_number_of_processes(runs, kind, name):
    """Two processes are followed by one, or one by two: with a fresh optimizer the next update would be another."""
    assert_close(runs / f"{kind}-{name}", runs / f"pair-{name}")


def test_a_rollout_with_gathered_weights_is_the_rollout_without(runs):
    assert_identical(runs / "each-forward", runs / "pair-zero3")


def test_old_velocities_with_gathered_weights_are_those_without(runs):
    assert_identical(runs / "nft-gathered", runs / "nft-each-forward")


def test_gathering_takes_the_hooks_away_and_puts_them_back(runs):
    seen = json.loads((runs / "seen.json").read_text())
    assert seen["within"]["whole"] == seen["within"]["parameters"] > seen["before"]["whole"]
    assert seen["within"]["hooks"] == seen["before"]["hooks"] - seen["deepspeed's"] < seen["before"]["hooks"] / 10
    assert seen["nested"] == seen["still"] == seen["within"]
    assert seen["after"]["hooks"] == seen["before"]["hooks"]
    assert seen["after"]["whole"] < seen["after"]["parameters"]
    assert seen["bare"]
    assert seen["wrapped"]


def test_the_blocks_after_the_first_trained_one_are_leaves(runs):
    leaves = json.loads((runs / "seen.json").read_text())["leaves"]
    assert len(leaves) > 1
    assert leaves == [False] + [True] * (len(leaves) - 1)


def test_the_frozen_models_are_not_sharded(runs):
    assert json.loads((runs / "seen.json").read_text())["frozen sharded"] is False


def test_a_checkpoint_that_would_lose_its_optimizer_is_refused(runs):
    refusals = json.loads((runs / "refusals.json").read_text())
    assert "was saved under DeepSpeed; resume it with the same deepspeed" in refusals["without deepspeed"]
    assert "was saved under ZeRO-1 or ZeRO-2 and this run has ZeRO-3" in refusals["of another stage"]
    assert "was saved under ZeRO-3 and this run has ZeRO-2" in refusals["and the other way round"]
    assert "holds no state of DeepSpeed's optimizer" in refusals["saved without deepspeed"]


def test_a_killed_process_ends_the_run_which_then_resumes(runs, run_program, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, __file__, str(tmp_path), "killed"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    now = time.monotonic()
    assert ended.returncode != 0
    assert "SIGKILL" in ended.stderr
    assert now - float((tmp_path / "killed" / "killed_at").read_text()) < 60
    assert newest_checkpoint(tmp_path / "killed").endswith("checkpoint-2")
    shutil.copytree(tmp_path / "killed" / "checkpoint-2", tmp_path / "killed" / "checkpoint-4")
    (tmp_path / "killed" / "checkpoint-4" / "complete").unlink()  # cut off while it was written
    run_program(__file__, tmp_path, TIMEOUT, "revived")
    assert_identical(tmp_path / "killed", runs / "pair-zero3")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
