"""Does a setting teach the shapes editor? One run: `python -m editrl.benchmarks.algorithms.learning --out FILE`.

Starts from a shipped checkpoint, trains by GRPO on fresh training scenes, and judges the editor by the oracle on
held-out scenes with fixed noise, before, during and after. `--reward random` is the control: what the optimizer does
when there is nothing to learn. The file is written after every evaluation, so a run that is cut off keeps its results.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.utils import logging

import editrl
from editrl.recipes.shapes import WEIGHTS
from editrl.recipes.shapes.dataset import rows
from editrl.recipes.shapes.world import sample_scenes

ORACLE = "editrl.recipes.shapes.oracle:"
EVAL_SEED = 3 * 10**6


class RandomReward:
    """A reward that knows nothing: standard normal, drawn anew for every clip."""

    name = "random"

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, videos, **kwargs) -> list[float]:
        return torch.randn(len(videos), generator=self.generator).tolist()


def reward_set(options: argparse.Namespace) -> editrl.RewardSet:
    """The rewards of an experiment: oracle | viva (the three of the paper) | random | source_fidelity."""
    kind, weights = options.reward, options.weights
    clip, pick = ({"model": str(weights / name), "frames_per_forward": 2048} for name in ("clip", "pickscore"))
    if kind == "viva":
        kwargs = {"clip_instruction": clip, "clip_source_fidelity": clip, "pickscore": pick}
        return editrl.RewardSet(list(kwargs), kwargs=kwargs, weights=options.reward_weights)
    if kind == "source_fidelity":
        return editrl.RewardSet(["clip_source_fidelity"], kwargs={"clip_source_fidelity": clip})
    return editrl.RewardSet([RandomReward(options.seed) if kind == "random" else ORACLE + "oracle_margin"])


class Recorder(TrainerCallback):
    """Writes evaluations and the training log's means to the result file."""

    def __init__(self, path: Path, result: dict):
        self.path, self.result, self.started = path, result, time.perf_counter()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        success, preservation = (metrics[f"eval_metrics/oracle_{name}/mean"] for name in ("success", "preservation"))
        rewards = {k.split("/")[1]: v for k, v in metrics.items() if k.startswith("eval_rewards/")}
        point = {
            "update": state.global_step,
            "seconds": round(time.perf_counter() - self.started, 1),
            "success": round(success, 4),
            "preservation_db": round(preservation, 3),
            "rewards": rewards,
        }
        last = next((log for log in reversed(state.log_history) if "loss" in log), {})
        watched = ("grad_norm", "kl", "ratio/deviation", "frac_reward_zero_std")
        point |= {k: v for k, v in last.items() if k in watched or k.startswith("seconds/")}
        self.result["evaluations"].append(point)
        print(json.dumps({"run": self.path.stem, **point}), flush=True)
        write_json(self.path, self.result)


def write_json(path: Path, value) -> None:
    """Atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "cpus": str(os.cpu_count())}


def run(options: argparse.Namespace) -> dict:
    """Train and judge; returns what is written to `options.out`."""
    logging.set_verbosity_error()
    policy = editrl.load_policy(
        "hunyuan_video",
        str(options.weights / "sft"),
        transformer=str(options.weights / options.checkpoint) if options.checkpoint != "sft" else None,
    )
    train = editrl.EditDataset(rows(sample_scenes(options.scenes, 5 * 10**5 + options.seed, "train")))
    held_out = editrl.EditDataset(rows(sample_scenes(options.eval_scenes, EVAL_SEED, "heldout")))
    clips = options.groups * options.members
    micro = options.micro_batch or clips
    per_generation = clips * options.window // micro
    args = editrl.FlowGRPOConfig(
        output_dir=str(options.out.with_suffix(".run")),
        max_steps=options.updates,
        num_generations=options.members,
        generation_batch_size=clips,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=per_generation // options.updates_per_rollout,
        per_device_eval_batch_size=min(512, micro),
        num_inference_steps=options.steps,
        sde_window_size=options.window,
        sde_window_range=[0, options.window_end],
        sde_kernel="flow_sde",
        noise_level=options.noise_level,
        same_init_noise=options.same_init_noise,
        loss_type=options.loss_type,
        beta=options.beta,
        scale_rewards=options.scale_rewards,
        shift=3.0,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=2,
        weight_decay=0.0,
        adam_beta2=options.adam_beta2,
        ema_decay=options.ema or None,
        eval_num_inference_steps=8,
        eval_strategy="steps",
        eval_steps=options.eval_every,
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
        tf32=options.device.startswith("cuda") or None,
        use_cpu=options.device == "cpu",
    )
    peft_config = None
    if options.lora_rank:
        from peft import LoraConfig

        peft_config = LoraConfig(
            r=options.lora_rank,
            lora_alpha=4 * options.lora_rank,
            target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out", "ff.net.0.proj", "ff.net.2"],
        )
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "weights")}
    settings["weights"] = "shipped" if options.weights == WEIGHTS else options.weights.name
    result = {"settings": settings, "machine": machine(options.device), "evaluations": []}
    trainer = editrl.FlowGRPOTrainer(
        policy,
        reward_set(options),
        args,
        train,
        held_out,
        peft_config,
        callbacks=[Recorder(options.out, result)],
        metric_funcs=[ORACLE + name for name in ("oracle_success", "oracle_preservation")],
    )
    trainer.train()
    return result


def parser() -> argparse.ArgumentParser:
    """The options of a run; the defaults are the large-batch setting for a GPU."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    add("--reward", choices=["oracle", "viva", "random", "source_fidelity"], default="oracle")
    add("--reward_weights", type=float, nargs="+", help="one each; default 1")
    add("--checkpoint", choices=["sft", "sft-underediting"], default="sft")
    add("--out", type=Path, required=True)
    add("--weights", type=Path, default=WEIGHTS)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    add("--updates", type=int, default=100)
    add("--eval_every", type=int, default=10)
    add("--scenes", type=int, default=4096, help="training scenes")
    add("--eval_scenes", type=int, default=512, help="held-out scenes")
    add("--groups", type=int, default=64)
    add("--members", type=int, default=24)
    add("--micro_batch", type=int, default=0, help="0: the whole generation batch")
    add("--updates_per_rollout", type=int, default=1)
    add("--steps", type=int, default=8)
    add("--window", type=int, default=2)
    add("--window_end", type=int, default=6)
    add("--noise_level", type=float, default=0.7)
    add("--same_init_noise", action="store_true")
    add("--loss_type", default="grpo")
    add("--beta", type=float, default=0.0)
    add("--scale_rewards", default="group")
    add("--learning_rate", type=float, default=5e-5)
    add("--schedule", default="constant_with_warmup")
    add("--adam_beta2", type=float, default=0.99)
    add("--ema", type=float, default=0.9)
    add("--lora_rank", type=int, default=0)
    return options


if __name__ == "__main__":
    run(parser().parse_args())
