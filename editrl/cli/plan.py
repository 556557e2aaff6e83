"""`editrl plan`: what a recipe of GRPO will take, from shapes and measured rates; no weight is read, no GPU needed."""

import dataclasses
import json
import sys
from dataclasses import dataclass, field

STAGES = ("none", "zero1", "zero2", "zero3")
FROZEN_GIB = 16.3
"""LLaVA-LLaMA-3-8B, CLIP-L and the VAE in bfloat16, as measured (benchmarks/results/throughput/edit-full-h200.json)."""

DECODE_BYTES, DECODE_SECONDS = 1630, 1.27e-7
"""Of the VAE, for a pixel of a frame, in one piece: 20 GiB and 1.67 s for 33 frames of 480x832 (the same file)."""

COMPILED_DECODE = 0.5
"""What `compile_vae` leaves of that (grpo-full-h200.json)."""

ENCODE_SECONDS = 7.4e-8
"""Of encoding a source, for a pixel of a frame (edit-full-h200.json)."""

GATHERED_TRAINING = 1.2
"""ZeRO-3 on two GPUs against one GPU, an eager checkpointed training step of the 13B: 34.3 s for eight
(grpo-full-h200.json) against 3.58 (steps-full-h200.json)."""


@dataclass
class PlanArguments:
    """The machines."""

    gpus: int = field(default=8, metadata={"help": "GPUs in all."})
    gpu_memory: float = field(default=80.0, metadata={"help": "GiB of each."})
    tflops: float = field(
        default=719.0, metadata={"help": "Measured TFLOP/s of one in a bfloat16 product of 8192 cubed (H200: 719)."}
    )
    json: bool = field(default=False, metadata={"help": "Print JSON instead of a table."})

    def __post_init__(self):
        for name in ("gpus", "gpu_memory", "tflops"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass
class Row:
    """One way to run the recipe."""

    deepspeed: str
    activations: str
    fits: bool
    training_gib: float
    rollout_gib: float
    training_step_seconds: float
    update_seconds: float


def main(argv: list[str]) -> int:
    """Predict memory and seconds of a GRPO recipe, and which ZeRO stage and activation budget fit."""
    from editrl.cli.arguments import DataArguments, PolicyArguments, RewardArguments
    from editrl.cli.config import parse_config
    from editrl.cli.launch import quiet_libraries
    from editrl.errors import EditrlError
    from editrl.trainers import FlowGRPOConfig

    quiet_libraries()

    @dataclass
    class PlannedConfig(FlowGRPOConfig):
        """The recipe's, but that it asks for no GPU and starts no DeepSpeed: it is planned on any machine."""

        def __post_init__(self):
            # Over all processes where it is given, else it follows from the sizes of one.
            self.over_all = self.generation_batch_size is not None
            self.planned_with = self.deepspeed
            self.deepspeed, self.bf16, self.use_cpu = None, False, True
            super().__post_init__()

    types = (PolicyArguments, DataArguments, RewardArguments, PlannedConfig, PlanArguments)
    policy_args, data_args, _, args, machines = parse_config(types, argv, "plan")
    clip = (data_args.num_frames, data_args.height, data_args.width)
    if None in clip:
        raise EditrlError("`editrl plan` needs the size of the clips: give num_frames, height and width")
    if args.fp8_base or "offload" in str(args.planned_with):
        what = "fp8_base" if args.fp8_base else "offloading to main memory"
        raise EditrlError(f"`editrl plan` has no rates for {what}; plan without it")
    if not policy_args.use_peft:
        raise EditrlError("`editrl plan` knows what LoRA takes, not what training all weights does; set use_peft")
    rows, notes = predict(policy_args, args, clip, machines)
    if machines.json:
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows], "notes": notes}, indent=2))
    else:
        print_rows(rows)
        print("\n".join(notes))
    return int(not any(row.fits for row in rows))


def predict(policy_args, args, clip: tuple[int, int, int], machines: PlanArguments) -> tuple[list[Row], list[str]]:
    """A row for each ZeRO stage and level of kept activations, and what was assumed."""
    import torch
    from peft import get_peft_model

    from editrl.registry import policies
    from editrl.speed import H200, Work, activation_gib, forward_seconds, repeated_blocks, training_seconds

    policy = policies.find(policy_args.policy)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model, inputs, source = policy.sketch(policy_args.model_name_or_path, *clip, **policy_args.policy_kwargs)
        model.requires_grad_(not policy_args.use_peft)
        base = work = Work.of(repeated_blocks(model), inputs(torch.bfloat16))
        if policy_args.use_peft:
            model = get_peft_model(model, policy_args.peft_config(), autocast_adapter_dtype=False)
            work = Work.of(repeated_blocks(model), inputs(torch.bfloat16))
    finally:
        torch.set_default_dtype(torch.float32)
    rates, gib = H200.scaled(machines.tflops), 2**30
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = 2 * sum(p.numel() for p in model.parameters()) / gib
    share = machines.gpus if args.over_all else 1
    clips, trained_clips = args.generation_batch_size / share, args.trained_clips * args.num_iterations / share
    batch = args.per_device_train_batch_size
    compiled = args.compile_blocks
    window = args.sde_window_size if args.on_window else 0
    replayed = 0 if args.one_pass else window  # whose forward is not the one that is differentiated
    plain = forward_seconds(base if args.merge_adapter else work, rates, compiled)
    held = 4 * trained / gib * clips if args.one_pass else 0.0
    pixels = clip[0] * clip[1] * clip[2]
    decoding = pixels * DECODE_SECONDS * rates_ratio(H200, rates) * (COMPILED_DECODE if args.compile_vae else 1)
    encoding = pixels * ENCODE_SECONDS * rates_ratio(H200, rates) * clips / args.num_generations
    resident = 0.0 if args.conditions_cache else FROZEN_GIB
    merged = weights if args.merge_adapter else 0.0
    rows, rollouts = [], {}
    for stage in STAGES[:-1] if args.one_pass else STAGES:  # which ZeRO-3 refuses
        repeated = compiled and stage != "zero3"  # which compiles nothing that is trained
        stochastic = forward_seconds(work, rates, repeated)
        rollouts[stage] = (args.num_inference_steps - window) * plain + replayed * stochastic
        reference = forward_seconds(base, rates, repeated) if args.beta else 0.0
        shards = {
            name: machines.gpus if STAGES.index(stage) >= least else 1
            for name, least in (("optimizer", 1), ("gradients", 2), ("weights", 3))
        }
        states = trained / gib * (12 / shards["optimizer"] + 4 / shards["gradients"]) + weights / shards["weights"]
        for level in work.kept if stage != "zero3" else ["none"]:  # which plans no activations
            step = training_seconds(work, rates, repeated, level) + reference
            step *= GATHERED_TRAINING if stage == "zero3" else 1
            kept = batch * activation_gib(work, level)
            idle = 0.0 if args.park_frozen else resident
            training = states + kept + idle
            # The window of a compiled rollout, or of one pass, runs with gradient; decoding comes afterwards.
            more = max(pixels * DECODE_BYTES / gib, merged + (kept if repeated or args.one_pass else 0.0))
            # Parked models are awake while they encode.
            sampling = states - weights / shards["weights"] + weights + max(resident, idle + more + held)
            update = clips * (rollouts[stage] + decoding) + trained_clips * args.pairs_per_clip * step
            update += 0 if args.conditions_cache else encoding
            rows.append(
                Row(
                    stage,
                    level,
                    max(training, sampling) <= machines.gpu_memory,
                    round(training, 1),
                    round(sampling, 1),
                    round(step, 2),
                    round(update, 1),
                )
            )
    notes = [
        f"shapes: {source}; {trained / 1e6:,.0f} M trained parameters, {weights:.1f} GiB of weights",
        f"a rollout of one clip: {rollouts['none']:.1f} s"
        + (", without its stochastic steps, which are trained as they are sampled" if args.one_pass else "")
        + (f" ({rollouts['zero3']:.1f} s under zero3)" if "zero3" in rollouts else "")
        + f"; clips a process and rollout: {clips:g}",
        "rollout_gib holds the whole weights, as ds3_gather_for_rollout does; not counted: reward models, the latent "
        "frame of a reference image, what a shared prefix saves",
        f"rates of an H200 (719 TFLOP/s), scaled to {machines.tflops:g}; the blocks' activations at "
        f"{'the levels of activation_memory' if args.activation_memory else 'each level of activation_memory'}",
    ]
    best = min((row for row in rows if row.fits), key=lambda row: row.update_seconds, default=None)
    if best is None:
        notes.append("nothing fits: smaller clips, more GPUs, conditions_cache, park_frozen, or no merge_adapter")
    else:
        stage = "null" if best.deepspeed == "none" else best.deepspeed
        notes.append(
            f"fastest that fits: --deepspeed {stage}, activations '{best.activations}': a rollout and its "
            f"updates in {best.update_seconds:g} s"
        )
    return rows, notes


def rates_ratio(measured, scaled) -> float:
    """How much longer than on the measured GPU."""
    return measured.products / scaled.products


def print_rows(rows: list[Row]) -> None:
    """A table for a person, aligned columns for a pipe."""
    names = [spec.name for spec in dataclasses.fields(Row)]
    cells = [
        [("yes" if v else "no") if isinstance(v, bool) else str(v) for v in dataclasses.astuple(row)] for row in rows
    ]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*names)
        for row, line in zip(rows, cells, strict=True):
            table.add_row(*line, style=None if row.fits else "dim")
        Console(markup=False, highlight=False).print(table)
        return
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    for line in (names, *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
