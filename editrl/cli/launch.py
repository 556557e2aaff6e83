"""What the commands that train do around their trainer: where a run starts, and what they leave behind."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.utils import logging

from editrl.data import EditDataset
from editrl.errors import EditrlError
from editrl.policy import FlowPolicy
from editrl.trainers.base import COMPLETE, FlowTrainer, newest_checkpoint
from editrl.trainers.config import FlowConfig


def quiet_libraries() -> None:
    """No bars in a log file, and no warning from DeepSpeed that there is no GPU."""
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it looks for one, and says what it did not find


def starting_point(args: FlowConfig, has_eval_dataset: bool) -> str | None:
    """The checkpoint that the run continues, or None for a new run in a folder that holds no other.

    EditrlError for a checkpoint that is missing or incomplete, a folder in use, or an evaluation of nothing.
    """
    if (args.eval_strategy != "no" or args.eval_on_start) and not has_eval_dataset:
        raise EditrlError(
            f"eval_strategy is '{args.eval_strategy.value}' and eval_on_start {args.eval_on_start}, but there is no "
            "eval_manifest; give one, or set --eval_strategy no --eval_on_start false"
        )
    asked = args.resume_from_checkpoint
    if asked is None or asked.lower() == "false":
        _refuse_to_overwrite(args.output_dir)
        return None
    if asked.lower() == "true":
        return newest_checkpoint(args.output_dir)
    if not (Path(asked) / COMPLETE).is_file():
        raise EditrlError(
            f"resume_from_checkpoint: '{asked}' is no complete checkpoint (it has no file '{COMPLETE}'); give another, "
            "or true for the newest of output_dir"
        )
    return asked


def _refuse_to_overwrite(output_dir: str) -> None:
    folder = Path(output_dir)
    finished = any((folder / name).exists() for name in ("transformer", "adapter_config.json"))
    if finished or any(folder.glob("checkpoint-*")):
        raise EditrlError(
            f"output_dir '{output_dir}' holds an earlier run; continue it with --resume_from_checkpoint true, or give "
            "another --output_dir"
        )


def make_folder(path: str | Path) -> None:
    """EditrlError, before anything has been computed, if there is no writing to `path`."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EditrlError(f"{path}: this folder cannot be made ({error.strerror}); choose another") from error


@contextlib.contextmanager
def whole_weights(args: FlowConfig) -> Iterator[None]:
    """While a ZeRO-3 configuration is alive, `from_pretrained` shards what it loads; frozen models must stay whole."""
    config = getattr(args, "hf_deepspeed_config", None)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            set_hf_deepspeed_config(config)


def adopt_geometry(datasets: Sequence[EditDataset], policy: FlowPolicy) -> None:
    """Check again what was checked by the policy's class, if the loaded policy's geometry is another."""
    for dataset in datasets:
        if (dataset.frame_multiple, dataset.size_multiple) != (policy.frame_multiple, policy.size_multiple):
            dataset.frame_multiple, dataset.size_multiple = policy.frame_multiple, policy.size_multiple
            dataset.check()


@contextlib.contextmanager
def arguments_of(command: str) -> Iterator[None]:
    """While a trainer is made, a library's ValueError is about the arguments: one line, as for ours."""
    try:
        yield
    except EditrlError:
        raise
    except ValueError as error:
        raise EditrlError(f"`editrl {command}`: {error}") from error


def save(trainer: FlowTrainer) -> None:
    """Write the trained weights to output_dir: their moving average, if there is one, since that was evaluated."""
    with trainer.averaged_weights():
        trainer.save_model()
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        whole = folder / "transformer"
        print(
            f"saved. To use it: editrl edit {f'--transformer {whole}' if whole.is_dir() else f'--adapter {folder}'} ..."
        )
