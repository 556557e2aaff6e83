"""Resuming under DeepSpeed: never with a fresh optimizer, and on another number of processes than before."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from editrl.errors import EditrlError

if TYPE_CHECKING:
    from editrl.trainers.base import FlowTrainer

logger = logging.getLogger(__name__)

UNIVERSAL = "latest_universal"
"""DeepSpeed writes this file last, with the name of the folder, when it has made a universal checkpoint."""


def prepare_resume(trainer: FlowTrainer, checkpoint: str) -> None:
    """Make sure that the optimizer's state in `checkpoint` can be loaded by this run, before anything is.

    A checkpoint of ZeRO has a file for each process. On another number of processes it is converted once, in its own
    folder, to DeepSpeed's universal format: float32 weights and both moments, 12 bytes a trained parameter.

    EditrlError where that state is missing, or of another kind than this run keeps.
    """
    shards = list(Path(checkpoint).glob("global_step*/*_optim_states.pt"))
    if not trainer.is_deepspeed_enabled:
        if shards:
            raise EditrlError(f"'{checkpoint}' was saved under DeepSpeed; resume it with the same deepspeed")
        if not trainer.is_fsdp_enabled and not (Path(checkpoint) / "optimizer.pt").is_file():
            raise EditrlError(
                f"'{checkpoint}' holds no state of the optimizer (save_only_model?), so nothing can continue it; start "
                "a new run from its weights"
            )
        return
    if not shards:
        raise EditrlError(
            f"'{checkpoint}' holds no state of DeepSpeed's optimizer: it was saved without deepspeed, or with "
            "save_only_model; resume it without deepspeed, or start a new run from its weights"
        )
    stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
    sharded = any(shards[0].parent.glob("zero_pp_rank_*_model_states.pt"))
    if sharded != (stage == 3):
        raise EditrlError(
            f"'{checkpoint}' was saved under ZeRO-{'3' if sharded else '1 or ZeRO-2'} and this run has ZeRO-{stage}, "
            "which reads no other's; resume with the stage of the checkpoint"
        )
    saved, now = len(shards), trainer.args.world_size
    if saved == now:
        return
    if trainer.is_world_process_zero():
        logger.warning("'%s' is of %d processes, this run has %d: converting it", checkpoint, saved, now)
        convert(shards[0].parent)
    trainer.accelerator.wait_for_everyone()
    if not (Path(checkpoint) / UNIVERSAL).is_file():
        raise EditrlError(
            f"'{checkpoint}' is of {saved} processes and could not be converted for {now}; see the error of process 0, "
            f"or resume with {saved}"
        )
    trainer.accelerator.state.deepspeed_plugin.deepspeed_config.setdefault("checkpoint", {})["load_universal"] = True


def convert(folder: Path) -> None:
    """Write `<folder>_universal` beside the `global_step*` folder of a checkpoint, unless it is there and whole."""
    checkpoint, target = folder.parent, folder.with_name(f"{folder.name}_universal")
    if (checkpoint / UNIVERSAL).is_file():
        return
    shutil.rmtree(target, ignore_errors=True)  # a conversion that was cut off
    # A program of its own: it forks, which a process that holds a GPU must not. The metadata that it would miss in
    # a checkpoint of ZeRO-1 or ZeRO-2 is that of tensor parallelism, which there is none of here.
    program = [sys.executable, "-P", "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    words = ["--input_folder", str(folder), "--output_folder", str(target)]
    done = subprocess.run([*program, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        logger.error("%s", done.stderr)


def is_universal(trainer: FlowTrainer) -> bool:
    """Whether this run reads its checkpoint in the universal format."""
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    return bool(config.get("checkpoint", {}).get("load_universal"))


def restore_groups(trainer: FlowTrainer, checkpoint: str) -> None:
    """Give each group of parameters its own options again: DeepSpeed reads the first group's into all under ZeRO-3.

    The groups differ in weight decay, which norms and biases do not have.
    """
    folder = Path(checkpoint) / (Path(checkpoint) / UNIVERSAL).read_text().strip()
    saved = torch.load(folder / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=False)
    for group, options in zip(trainer.model_wrapped.optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({name: value for name, value in options.items() if name != "params"})
