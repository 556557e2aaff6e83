"""Whole GRPO steps at real size: `python -m editrl.benchmarks.throughput.grpo --size full --variant ours --out FILE`.

Rollout, decoding, rewards and update of one group, as `editrl grpo` runs them: 13B editor with LLaVA-8B and the VAE,
CLIP-L and CLIP-H as rewards, all with random weights. Seconds of each phase and peak memory, of the last step.

Figures of a variant are added to the file, so call it once for each; `baseline` is diffusers and PEFT as they come:
eager, attention mask, checkpointing. Several GPUs, once one process has written the weights:
`torchrun --nproc_per_node 2 -m editrl.benchmarks.throughput.grpo --deepspeed zero2 ...`.
"""

import argparse
import json
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import TrainerCallback

import editrl
from editrl.benchmarks.record import machine, write_json
from editrl.benchmarks.throughput.edit import CLIP
from editrl.benchmarks.throughput.models import write_editor, write_rewards
from editrl.benchmarks.throughput.steps import GIB, LAYERS, stock_forward

REPLAYED = {"compile_blocks": True, "compile_vae": True, "activation_memory": "auto", "merge_adapter": True}
OURS = REPLAYED | {"one_pass": True}
VARIANTS = {
    "baseline": {"gradient_checkpointing": True},
    "ours, replayed": REPLAYED,
    "ours": OURS,
    "ours, FP8 base": OURS | {"merge_adapter": False, "fp8_base": True},
}
WINDOW = 4
PHASES = ("seconds/rollout", "seconds/decode", "seconds/reward", "seconds/train")


def examples(size: str) -> editrl.EditDataset:
    """Two clips of noise, with what the rewards ask for."""
    frames, height, width = CLIP[size]
    generator = torch.Generator().manual_seed(0)
    row = {
        "instruction": "make the red circle blue",
        "source_caption": "a red circle",
        "target_caption": "a blue circle",
    }
    clips = [torch.rand(frames, 3, height, width, generator=generator) for _ in range(2)]
    return editrl.EditDataset([row | {"id": str(index), "source": clip} for index, clip in enumerate(clips)])


def trainer(options: argparse.Namespace, folder: str) -> editrl.FlowGRPOTrainer:
    """Of one group a process and step; every clip a micro-batch, one update a rollout."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    cuda = options.device == "cuda"
    # Before the arguments: ZeRO-3 would shard what is loaded after them.
    policy = editrl.load_policy(
        "hunyuan_video",
        str(options.folder),
        dtype="bfloat16" if cuda else "float32",
        device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu",
    )
    if options.variant == "baseline":
        policy.compact = lambda conditions: conditions  # which keeps the mask
    args = editrl.FlowGRPOConfig(
        output_dir=folder,
        max_steps=options.steps,
        num_generations=options.members,
        generation_batch_size=options.members * processes,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=options.members * WINDOW,
        num_inference_steps=options.inference_steps,
        sde_window_size=WINDOW,
        loss_type="grpo_guard",
        shift=5.0,
        bf16=cuda,
        use_cpu=not cuda,
        deepspeed=options.deepspeed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        watchdog="off",
        **settings(options),
    )
    clip, pickscore = (
        {"model": str(options.folder / name), "num_frames": 8, "dtype": "bfloat16" if cuda else "float32"}
        for name in ("clip", "pickscore")
    )
    rewards = {"clip_instruction": clip, "clip_source_fidelity": clip, "pickscore": pickscore}
    return editrl.FlowGRPOTrainer(
        policy,
        editrl.RewardSet(list(rewards), kwargs=rewards),
        args,
        examples(options.size),
        peft_config=LoraConfig(r=64, lora_alpha=256, target_modules=LAYERS),
    )


def settings(options: argparse.Namespace) -> dict:
    """The variant's fields; without a GPU a fixed budget, since there is none to ask. ZeRO-3 has neither budget nor
    whole weights to differentiate a rollout with."""
    fields = dict(VARIANTS[options.variant])
    if options.deepspeed == "zero3":
        for name in ("activation_memory", "one_pass"):
            fields.pop(name, None)
        fields["gradient_checkpointing"] = True
    elif "activation_memory" in fields and options.device == "cpu":
        fields["activation_memory"] = "1"
    return fields


class Figures(TrainerCallback):
    """Adds the figures of the last step to the result, after every step."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.steps = options, []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        self.steps.append({name: logs[name] for name in [*PHASES, "ratio/deviation"]})
        write_figure(self.options, self.steps, args.world_size)


def write_figure(options: argparse.Namespace, steps: list[dict], processes: int) -> None:
    """Add what the last step took to the figures of the file."""
    last = {phase: round(steps[-1][phase], 3) for phase in PHASES}
    figure = {
        "seconds": round(sum(last.values()), 3),
        "seconds_per_clip": round(sum(last.values()) / options.members, 3),
        "phases": last,
        "first_step_seconds": round(sum(steps[0][phase] for phase in PHASES), 1),
        "ratio_deviation": [step["ratio/deviation"] for step in steps],
        "clips": options.members,
        "processes": processes,
        "inference_steps": options.inference_steps,
    }
    if options.device == "cuda":
        figure["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 1)
    figure["machine"] = machine(options.device)  # variants may be added on others
    name = options.variant + (f", {options.deepspeed} on {processes}" if options.deepspeed else "")
    result = {"settings": {"size": options.size, "window": WINDOW}, "variants": {}}
    if options.out.exists():
        result = json.loads(options.out.read_text())
    result["variants"][name] = figure
    baseline = result["variants"].get("baseline")
    for found in result["variants"].values() if baseline else ():
        # Of a clip on a GPU: processes work on clips of their own.
        found["ratio"] = round(found["seconds_per_clip"] / baseline["seconds_per_clip"], 3)
    write_json(options.out, result)
    print(json.dumps({name: figure}, indent=1), flush=True)


def run(options: argparse.Namespace) -> None:
    """Train a few steps, and write what the last one took."""
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(options, folder)
        made.add_callback(Figures(options))
        with stock_forward(made.model) if options.variant == "baseline" else nullcontext():
            made.train()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    add("--size", choices=list(CLIP), default="full")
    add("--variant", choices=list(VARIANTS), default="ours")
    add("--out", type=Path, required=True)
    add("--folder", type=Path, default=Path("editor"), help="where the random weights are written (full: 47 GB)")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--deepspeed", help="a named configuration, such as zero2; under a launcher")
    add("--members", type=int, default=8, help="clips a group, and one group a process")
    add("--inference_steps", type=int, default=20)
    add("--steps", type=int, default=2, help="the last is reported; the first one compiles")
    parser, options = options, options.parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if not (options.folder / "pickscore" / "config.json").exists():
            parser.error(f"'{options.folder}' holds no weights yet; run one process first, which writes them")
    else:
        write_editor(
            options.folder,
            options.size,
            options.device,
            getattr(torch, "bfloat16" if options.device == "cuda" else "float32"),
        )
        write_rewards(options.folder, options.size, options.device)
    run(options)


if __name__ == "__main__":
    main()
