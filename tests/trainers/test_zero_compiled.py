"""compile_blocks and merge_adapter under ZeRO-3, on two processes: the same training, compiled where weights stay.

Under pytest this file starts itself as a program (`python test_zero_compiled.py FOLDER`), whose two processes make
several runs and leave what the tests compare in FOLDER. Blocks are compiled to ATen operations: a C++ compiler takes
minutes.
"""

import copy
import logging
import os
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import TrainerCallback

from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy

pytestmark = pytest.mark.slow

TIMEOUT = 300  # seconds after which the processes are killed

FAST = {"compile_blocks": True, "merge_adapter": True}
# Steps: shared by the group, stochastic, stochastic, of each clip.
RUN = {
    "max_steps": 4,  # two rollouts of two updates
    "beta": 0.0,
    "save_strategy": "no",
    "eval_strategy": "no",
    "same_init_noise": True,
    "sde_window_range": [1, 3],
    "warmup_steps": 0,
}
BLOCKS = 4
CALLS = BLOCKS * (1 + 2)  # compiled ones of a rollout: the shared step, and the last one of two chunks


# -- what the processes do ---------------------------------------------------------------------------------------------


class Compiler:
    """Stands in for `torch.compile`: counts graphs, and looks around at every call of a compiled block."""

    def __init__(self):
        self.graphs, self.calls, self.compile = CompileCounterWithBackend("aot_eager"), [], torch.compile

    def __call__(self, function=None, **options):
        block = getattr(function, "__self__", None)
        if not isinstance(block, torch.nn.Module):  # somebody else's
            return self.compile(function, **options)
        compiled = self.compile(function, backend=self.graphs, dynamic=False)

        def call(*inputs):
            assert not torch.is_grad_enabled()
            assert all(parameter.numel() == parameter.ds_numel for parameter in block.parameters())
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
            self.calls.append(any(layer.merged for layer in block.modules() if isinstance(layer, LoraLayer)))
            return compiled(*inputs)

        return call

    def so_far(self) -> dict:
        return {
            "graphs": self.graphs.frame_count,
            "merged": self.calls.count(True),
            "unmerged": self.calls.count(False),
        }


class Note(TrainerCallback):
    """Keeps the clips of every rollout, and what was compiled by then."""

    def __init__(self):
        self.seen = {"videos": [], "compiler": []}

    def on_rollout(self, args, state, control, videos, samples, **kwargs):
        self.seen["videos"].append(torch.stack(list(videos)))
        self.seen["compiler"].append(torch.compile.so_far())


def run(folder: Path, name: str, **changes):
    """A trainer after its run, and what there is to see of it."""
    import test_zero  # beside this file, which is a program here

    config = test_zero.sharded()
    config["zero_optimization"]["enable_sanity_checks"] = True  # DeepSpeed looks whether gathered weights were changed
    note = Note()
    torch.compile.calls.clear()
    trainer = test_zero.make(folder / name, config, callbacks=[note], **RUN | changes)
    encode, one = trainer.policy.encode, trainer.train_dataset[0]
    trainer.policy.encode = lambda examples: encode([one] * len(examples))  # other texts would be other shapes
    trainer.train()
    log = [log for log in trainer.state.log_history if "loss" in log]
    edits = torch.stack(trainer.sample(trainer.eval_dataset, [0, 1]))
    trainer.save_model()
    return trainer, note.seen | {
        "log": log,
        "edits": edits,
        "compiler": [*note.seen["compiler"], torch.compile.so_far()],
        "videos": [*note.seen["videos"]],
    }


def look(trainer) -> dict:
    """What a gathered rollout changes and has to put back."""
    module = trainer.model_wrapped.module
    blocks = [*module.get_base_model().transformer_blocks, *module.get_base_model().single_transformer_blocks]
    return {
        "compiled": sum(block._compiled_call_impl is not None for block in blocks),
        "hooks": [[*m._forward_hooks, *m._forward_pre_hooks] for m in module.modules()],
        "dicts": [type(m._parameters).__name__ for m in module.modules()],
        "sizes": [parameter.numel() for parameter in module.parameters()],
        "merged": any(layer.merged for layer in module.modules() if isinstance(layer, LoraLayer)),
        "shards": [parameter.ds_tensor.clone() for parameter in module.parameters()],
    }


def fail_in_a_rollout(trainer) -> dict:
    """An error in a merged, compiled step and one in a stochastic step, each caught; and then a whole rollout."""
    velocity, found = trainer.policy.velocity, {"before": look(trainer)}
    clips = [[100, 0]] * 4
    for name, fatal in (("in the ODE", 1), ("in the window", 2)):
        forwards = []

        def failing(*args, fatal=fatal, forwards=forwards):
            result = velocity(*args)
            forwards.append(look(trainer))
            if len(forwards) == fatal:
                raise KeyError("on purpose")
            return result

        with mock.patch.object(trainer.policy, "velocity", failing), pytest.raises(KeyError, match="on purpose"):
            trainer.generate(clips)
        found |= {name: look(trainer), f"{name}, within": {k: forwards[-1][k] for k in ("compiled", "merged")}}
    trainer.generate(clips)
    return found | {"after": look(trainer), "graphs": torch.compile.graphs.frame_count}


def deeper(load):
    """A policy with twice the blocks."""

    def loaded(*args, **kwargs):
        policy = load(*args, **kwargs)
        for blocks in (policy.transformer.transformer_blocks, policy.transformer.single_transformer_blocks):
            blocks.extend(copy.deepcopy([*blocks]))
        return policy

    return loaded


def train(folder: Path) -> None:
    """The runs of a process."""
    found, lines = {}, []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("editrl.trainers.zero").addHandler(handler)
    with mock.patch.object(torch, "compile", Compiler()):
        found["plain"] = run(folder, "plain")[1]
        lines.clear()
        trainer, found["fast"] = run(folder, "fast", **FAST)
        found["failed"], found["fast"]["lines"] = fail_in_a_rollout(trainer), [*lines]
        lines.clear()
        found["each forward"] = run(folder, "each", **FAST, ds3_gather_for_rollout=False)[1] | {"lines": [*lines]}
        awm = {"loss_type": "awm", "same_init_noise": False, "sde_window_range": None, "max_steps": 2}
        found["awm"] = run(folder, "awm", **FAST | awm)[1]
    torch._dynamo.reset()
    load = HunyuanVideoPolicy.from_pretrained
    with (
        mock.patch.object(HunyuanVideoPolicy, "from_pretrained", deeper(load)),
        mock.patch.object(torch, "compile", Compiler()),
    ):
        found["deep"] = run(folder, "deep", **FAST | {"max_steps": 2})[1]
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


def main(folder: Path) -> None:
    import forked  # beside this file, which is a program here
    import test_zero

    test_zero.let_processes_meet()
    forked.run(train, 2, folder)


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_program) -> Path:
    folder = tmp_path_factory.mktemp("zero-compiled")
    run_program(__file__, folder, TIMEOUT)
    return folder


@pytest.fixture(scope="module", params=[0, 1])
def found(folder, request) -> dict:
    """What a process saw."""
    return read(folder, request.param)


@cache
def read(folder: Path, rank: int) -> dict:
    return torch.load(folder / f"{rank}.pt", weights_only=False)


def test_rollouts_and_evaluation_are_those_without(found):
    for name in ("fast", "each forward"):
        for one, other in zip(found[name]["videos"], found["plain"]["videos"], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
        torch.testing.assert_close(found[name]["edits"], found["plain"]["edits"], rtol=0, atol=1e-4)


def test_the_trained_weights_are_those_without(folder):
    plain, fast = (load_file(next((folder / name).glob("*model.safetensors"))) for name in ("plain", "fast"))
    assert plain.keys() == fast.keys()
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-4, atol=2e-4)


def test_the_ratio_starts_at_one(found):
    for name in ("plain", "fast", "each forward"):
        deviations = [log["ratio/deviation"] for log in found[name]["log"]]
        assert deviations[0::2] == [0, 0]  # of the first update of each rollout
        assert min(deviations[1::2]) > 0
    assert found["awm"]["log"][0]["ratio/deviation"] == 0 < found["awm"]["log"][1]["ratio/deviation"]


def test_deterministic_steps_are_compiled_and_merged_and_evaluation_is_compiled(found):
    first, second, evaluated = found["fast"]["compiler"]
    assert (first["merged"], second["merged"], evaluated["merged"]) == (CALLS, 2 * CALLS, 2 * CALLS)
    assert (second["unmerged"], evaluated["unmerged"]) == (0, BLOCKS * 2 * 2)  # two steps of two clips by themselves
    assert found["plain"]["compiler"][-1] == {"graphs": 0, "merged": 0, "unmerged": 0}


def test_graphs_grow_neither_with_blocks_nor_with_rollouts(found):
    first, second, evaluated = (seen["graphs"] for seen in found["fast"]["compiler"])
    assert 0 < first == second < evaluated  # which has not merged
    assert found["failed"]["graphs"] == evaluated
    deep = found["deep"]["compiler"][0]
    assert (deep["graphs"], deep["merged"]) == (first, 2 * CALLS)


def test_where_every_forward_gathers_nothing_is_compiled_or_merged_and_the_log_says_so(found, folder):
    nothing = {"graphs": found["fast"]["compiler"][-1]["graphs"], "merged": 0, "unmerged": 0}
    assert found["each forward"]["compiler"] == [nothing] * 3
    told = [line for line in found["each forward"]["lines"] if "nothing to do" in line]
    said = "compile_blocks and merge_adapter: nothing to do, since the weights are not gathered for a rollout"
    assert told == ([said] if found is read(folder, 0) else [])
    assert not [line for line in found["fast"]["lines"] if "nothing to do" in line]


def test_everything_is_back_after_an_error_in_a_rollout(found):
    failed = found["failed"]
    assert failed["in the ODE, within"] == {"compiled": BLOCKS, "merged": True}
    assert failed["in the window, within"] == {"compiled": 0, "merged": False}
    before = failed["before"]
    assert before["compiled"] == 0
    for name in ("in the ODE", "in the window", "after"):
        after = failed[name]
        assert {k: v for k, v in after.items() if k != "shards"} == {k: v for k, v in before.items() if k != "shards"}
        for one, other in zip(after["shards"], before["shards"], strict=True):
            assert torch.equal(one, other)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
