"""Trainers whose processes share clips learn what one process does.

Under pytest this file starts itself once, as a program (`python test_context_parallel.py <folder>`). That does the
cases of `CASES` in 1, 2 and 4 processes, which share clips in pairs, and saves what they found; the tests compare it.
"""

import copy
import os
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from editrl.data import EditDataset
from editrl.doctor import diagnose
from editrl.errors import EditrlError
from editrl.flow import group_advantages
from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy
from editrl.policy import FlowPolicy
from editrl.recipes.shapes import WEIGHTS
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.world import sample_scenes
from editrl.trainers import FlowGRPOConfig, FlowGRPOTrainer, FlowSFTConfig, FlowSFTTrainer
from editrl.trainers.scoring import score

TIMEOUT = 300  # seconds after which the processes are killed

# Plain gradient descent without clipping: Adam and a clip would hide a gradient of the wrong size.
SHARED = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "shift": 3.0,
    "seed": 7,
    "max_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1e9,
}
GRPO = SHARED | {
    "num_generations": 4,
    "generation_batch_size": 8,
    "gradient_accumulation_steps": 2,  # 8 clips * 2 trained steps / 8: one update a rollout
    "num_inference_steps": 4,
    "sde_window_size": 2,
    "sde_window_range": [0, 3],
    "eval_num_inference_steps": 2,
    "watchdog": "off",
}


# -- what the processes do ---------------------------------------------------------------------------------------------


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def degree() -> int:
    return min(world(), 2)


def groups() -> int:
    return world() // degree()


@cache
def editor() -> HunyuanVideoPolicy:
    return HunyuanVideoPolicy.from_pretrained(str(WEIGHTS / "sft"))


def policy() -> HunyuanVideoPolicy:
    """The tiny editor with a transformer of its own."""
    parts = editor()
    return HunyuanVideoPolicy(
        copy.deepcopy(parts.transformer), parts.vae, parts.instructor, parts.text_encoder, parts.tokenizer
    )


def pairs(count: int = 8, seed: int = 0) -> EditDataset:
    return EditDataset(rows(sample_scenes(count, seed=seed)))


def sft(folder: Path, batch: int = 4, **changes) -> FlowSFTTrainer:
    """`batch`: examples of all processes."""
    sizes = {"per_device_train_batch_size": batch // groups(), "context_parallel": degree()}
    args = FlowSFTConfig(**{"output_dir": str(folder)} | SHARED | sizes | changes)
    return FlowSFTTrainer(policy(), args, pairs(), pairs(3, seed=1))


def grpo(folder: Path, reward=None, peft: bool = True, shared: FlowPolicy | None = None, **changes) -> FlowGRPOTrainer:
    sizes = {"per_device_train_batch_size": 8 // groups(), "context_parallel": degree()}
    args = FlowGRPOConfig(**{"output_dir": str(folder)} | GRPO | sizes | changes)
    torch.manual_seed(0)  # a fresh LoRA is drawn from the global generator
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_v", "proj_out"], init_lora_weights=False)
    return FlowGRPOTrainer(
        shared or policy(), reward or brightness, args, pairs(), pairs(3, seed=1), lora if peft else None
    )


def brightness(videos, **kwargs):
    return [video.mean().item() for video in videos]


def moody(videos, **kwargs):
    """Other scores in each process."""
    return torch.rand(len(videos), generator=torch.Generator().manual_seed(os.getpid())).tolist()


def weights(trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def trained(make, folder: Path, **changes) -> dict:
    trainer = make(folder, **changes)
    before = weights(trainer)
    trainer.train()
    return {
        "updates": [log for log in trainer.state.log_history if "loss" in log],
        "evaluated": trainer.evaluate(),
        "moved": {name: value - before[name] for name, value in weights(trainer).items()},
        "batch": trainer.get_total_train_batch_size(trainer.args),
    }


def resumed(folder: Path) -> dict:
    """The weights after two updates, and those of the same run resumed after the first."""
    settings = {"save_strategy": "steps", "save_steps": 1, "ema_decay": 0.5, "optim": "adamw_torch"}
    whole, again = grpo(folder, **settings), grpo(folder, **settings)
    whole.train()
    again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    return {"whole": weights(whole), "again": weights(again)}


def compared(folder: Path) -> dict:
    """A rollout with scores that no two processes agree on."""
    trainer = grpo(folder, moody, max_steps=1)
    found = {}

    def noted(trainer, videos, samples, groups, ahead):
        found.update(scores=moody(videos), groups=groups)
        found["advantages"] = score(trainer, videos, samples, groups, ahead)
        return found["advantages"]

    with mock.patch("editrl.trainers.grpo.score", noted):
        trainer.train()
    return found | {"mean": trainer.state.log_history[0]["rewards/moody/mean"]}


def doctor(folder: Path) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in diagnose(grpo(folder))}


class Lonely(HunyuanVideoPolicy):
    """A policy without context parallelism."""

    context_parallel = 1
    enable_context_parallel = FlowPolicy.enable_context_parallel


def refused(folder: Path) -> dict[str, str]:
    shared, again, lonely = policy(), policy(), policy()
    shared.enable_context_parallel(2)
    again.enable_context_parallel(2)
    lonely.__class__ = Lonely
    cases = {
        "no divisor": lambda: sft(folder, context_parallel=3),
        "zero": lambda: sft(folder, context_parallel=0),
        "dispatched": lambda: sft(folder, accelerator_config={"dispatch_batches": True}),
        "step norms": lambda: grpo(folder, log_step_grad_norm=True),
        "reference": lambda: grpo(folder, beta=0.1, peft=False),
        "lonely": lambda: grpo(folder, shared=lonely),
        "shared before": lambda: grpo(folder, shared=shared, context_parallel=1, per_device_train_batch_size=4),
        "shared as asked": lambda: grpo(folder, shared=again),
        "sizes": lambda: grpo(folder, per_device_train_batch_size=3),
    }
    return {name: refusal_of(case) for name, case in cases.items()}


def refusal_of(action) -> str:
    try:
        action()
    except EditrlError as error:
        return str(error)
    return "not refused"


TRAINED = {
    "sft": (sft, {}),
    "sft, a short last batch": (sft, {"batch": 3, "max_steps": 4, "ema_decay": 0.5}),
    "grpo": (grpo, {"beta": 0.1}),
    "nft": (grpo, {"loss_type": "nft", "learning_rate": 0.01}),
    "best of rwr": (grpo, {"loss_type": "rwr", "num_selected_generations": 2, "per_device_train_batch_size": 4}),
}
OF_FOUR = ["sft", "grpo"]
CASES = {
    1: [*TRAINED, doctor],
    2: [*TRAINED, doctor, resumed, refused],
    4: [*OF_FOUR, compared],
}


def do_cases(folder: Path) -> None:
    found = {}
    # diffusers divides the rank by the number of GPUs, to note a device that nothing here uses.
    with mock.patch("torch.accelerator.device_count", lambda: 1):
        for case in CASES[world()]:
            output = folder / f"output {len(found)} of {world()}"
            if case in TRAINED:
                make, settings = TRAINED[case]
                found[case] = trained(make, output, **settings)
            else:
                found[case.__name__] = case(output)
    torch.save(found, folder / f"{os.environ.get('RANK', 0)} of {world()}.pt")


def main(folder: Path) -> None:
    import forked  # beside this file, which is a program here

    editor()  # which they then need not load
    for processes in CASES:
        forked.run(do_cases, processes, folder)


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory, run_program) -> dict[int, list[dict]]:
    """What each rank of each world found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_program(__file__, folder, TIMEOUT)
    return {world: [torch.load(folder / f"{rank} of {world}.pt") for rank in range(world)] for world in CASES}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), [*((2, case) for case in TRAINED), *((4, case) for case in OF_FOUR)])
def test_processes_that_share_clips_learn_what_one_does(world, case, found):
    """Two share every clip; of four, each two share the clips that the other two do not have."""
    expected = found[1][0][case]
    for rank in found[world]:
        assert len(rank[case]["updates"]) == len(expected["updates"]) >= 2
        for log, one in zip(rank[case]["updates"], expected["updates"], strict=True):
            assert timeless(log) == pytest.approx(timeless(one), rel=1e-4, abs=1e-6)
        assert rank[case]["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-4)
        assert rank[case]["batch"] == expected["batch"]
        for name, moved in expected["moved"].items():
            torch.testing.assert_close(rank[case]["moved"][name], moved, rtol=1e-3, atol=2e-6, msg=name)


def timeless(log: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in log.items() if not name.startswith("seconds")}


@pytest.mark.slow
def test_what_is_compared_does_move(found):
    for case in TRAINED:
        assert max(moved.abs().max() for moved in found[1][0][case]["moved"].values()) > 1e-3


@pytest.mark.slow
def test_the_ratio_is_exactly_one_while_a_rollout_is_on_policy(found):
    assert [log["ratio/deviation"] for rank in found[2] for log in rank["grpo"]["updates"]] == [0] * 4


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_was_not_cut(found):
    for rank in found[2]:
        whole, again = rank["resumed"]["whole"], rank["resumed"]["again"]
        assert all(torch.equal(value, again[name]) for name, value in whole.items())


@pytest.mark.slow
def test_the_scores_of_the_first_count_for_all_that_share_a_clip(found):
    """With scores that differ between processes."""
    ranks = [rank["compared"] for rank in found[4]]
    assert ranks[0]["scores"] != ranks[1]["scores"] and ranks[2]["scores"] != ranks[3]["scores"]
    scores = torch.tensor(ranks[0]["scores"] + ranks[2]["scores"])
    expected = group_advantages(scores[:, None], torch.tensor(ranks[0]["groups"] + ranks[2]["groups"]), clip=5.0)
    for rank, found_there in enumerate(ranks):
        torch.testing.assert_close(found_there["advantages"], expected.split(4)[rank // 2])
        assert found_there["mean"] == pytest.approx(scores.mean().item())


@pytest.mark.slow
def test_the_doctor_says_what_it_says_of_one_process_but_does_not_measure_shares_of_a_gradient(found):
    expected = found[1][0]["doctor"]
    assert expected["gradient"] == "ok"
    for rank in found[2]:
        assert rank["doctor"] == expected | {"gradient": "info"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("no divisor", ["context_parallel 3 must divide the number of processes, 2", "--nproc_per_node 3"]),
        ("zero", ["context_parallel must be at least 1, got 0"]),
        ("dispatched", ["context_parallel deals batches", "dispatch_batches"]),
        ("step norms", ["log_step_grad_norm", "each of the 2 context_parallel processes", "drop it"]),
        ("reference", ["beta without LoRA", "use LoRA"]),
        ("lonely", ["Lonely has no context parallelism; set context_parallel to 1"]),
        ("shared before", ["2 processes share each clip of this policy already; set context_parallel to 2, not 1"]),
        ("sizes", ["per_device_train_batch_size * processes / context_parallel 2 = 3"]),
        ("shared as asked", ["not refused"]),
    ],
)
def test_what_cannot_be_shared_is_refused(what, parts, found):
    for rank in found[2]:
        message = rank["refused"][what]
        assert not [part for part in parts if part not in message], message
        assert "\n" not in message


if __name__ == "__main__":
    main(Path(sys.argv[1]))
