"""Does a setting teach the shapes editor? One run: `python -m editrl.benchmarks.algorithms.learning --out FILE`.

Starts from a shipped checkpoint, trains on fresh training scenes by any `loss_type`, and lets the oracle judge the
editor on held-out scenes with fixed noise, before, during and after. `--reward random` is the control: what the
optimizer does when there is nothing to learn. The file is written after every evaluation, so a run that is cut off
keeps its results.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import yaml
from transformers import TrainerCallback
from transformers.utils import logging

import editrl
from editrl.benchmarks.record import machine, write_json
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
    """The rewards of an experiment; `benchmarks/README.md` says what each is for."""
    kind, weights = options.reward, options.weights
    clip, pick = ({"model": str(weights / name), "frames_per_forward": 2048} for name in ("clip", "pickscore"))
    if kind == "viva":
        kwargs = {"clip_instruction": clip, "clip_source_fidelity": clip, "pickscore": pick}
        return editrl.RewardSet(list(kwargs), kwargs=kwargs, weights=options.reward_weights)
    if kind == "source_fidelity":
        return editrl.RewardSet(["clip_source_fidelity"], kwargs={"clip_source_fidelity": clip})
    if kind == "random":
        return editrl.RewardSet([RandomReward(options.seed)])
    parts = {
        "oracle": ["oracle_margin"],
        "oracle_success": ["oracle_success", "oracle_margin"],
        "oracle_both": ["oracle_margin", "oracle_preservation"],
        "oracle_all": ["oracle_success", "oracle_margin", "oracle_preservation"],
    }[kind]
    return editrl.RewardSet([ORACLE + part for part in parts], weights=options.reward_weights)


class Recorder(TrainerCallback):
    """Writes evaluations and the training log's means to the result file."""

    def __init__(self, path: Path, result: dict):
        self.path, self.result, self.started = path, result, time.perf_counter()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        success, preservation = (metrics[f"eval_metrics/oracle_{name}/mean"] for name in ("success", "preservation"))
        rewards = {k.split("/")[1]: v for k, v in metrics.items() if k.startswith("eval_rewards/")}
        point = {
            "update": state.global_step,
            "clips": state.global_step // args.updates_per_generation * args.generation_batch_size,
            "seconds": round(time.perf_counter() - self.started, 1),
            "success": round(success, 4),
            "preservation_db": round(preservation, 3),
            "rewards": rewards,
        }
        last = next((log for log in reversed(state.log_history) if "loss" in log), {})
        watched = ("grad_norm", "kl", "ratio/deviation", "frac_reward_zero_std")
        point |= {k: v for k, v in last.items() if k in watched or k.startswith("seconds/")}
        if not state.is_world_process_zero:
            return
        self.result["evaluations"].append(point)
        print(json.dumps({"run": self.path.stem, **point}), flush=True)
        write_json(self.path, self.result)


def build(options: argparse.Namespace, callbacks=(), held_out: editrl.EditDataset | None = None):
    """The trainer of an experiment."""
    logging.set_verbosity_error()
    policy = editrl.load_policy(
        "hunyuan_video",
        str(options.weights / "sft"),
        transformer=str(options.weights / options.checkpoint) if options.checkpoint != "sft" else None,
    )
    train = editrl.EditDataset(rows(sample_scenes(options.scenes, 5 * 10**5 + options.seed, "train")))
    clips = options.groups * options.members
    settings = {
        "output_dir": str(options.out.with_suffix(".run")),
        "max_steps": options.updates,
        "num_generations": options.members,
        "generation_batch_size": clips,
        "per_device_train_batch_size": options.micro_batch or clips,
        "per_device_eval_batch_size": min(512, options.micro_batch or clips),
        "num_inference_steps": 8,
        "sde_window_size": 2,
        "sde_window_range": [0, 6],
        "noise_level": 0.7,
        "shift": 3.0,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "weight_decay": 0.0,
        "adam_beta2": 0.99,
        "ema_decay": 0.9,
        "eval_num_inference_steps": 8,
        "eval_ode_solver": "euler",
        "eval_strategy": "steps" if held_out else "no",
        "eval_steps": options.eval_every,
        "eval_on_start": held_out is not None,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "watchdog": "off",
        "seed": options.seed,
        "tf32": options.device.startswith("cuda") or None,
        "use_cpu": options.device == "cpu",
    }
    settings |= dict(options.set)
    args = editrl.FlowGRPOConfig(**settings)
    if "gradient_accumulation_steps" not in settings:  # one on-policy update a rollout
        settings["gradient_accumulation_steps"] = args.steps_per_generation
        args = editrl.FlowGRPOConfig(**settings)
    return editrl.FlowGRPOTrainer(
        policy,
        reward_set(options),
        args,
        train,
        held_out,
        lora(options.lora_rank) if options.lora_rank else None,
        callbacks=list(callbacks),
        metric_funcs=[ORACLE + name for name in ("oracle_success", "oracle_preservation")],
    )


def lora(rank: int):
    """Every linear layer of the blocks; alpha is 4·rank, since 1·rank hardly learns."""
    from peft import LoraConfig

    layers = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out", "ff.net.0.proj", "ff.net.2"]
    return LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=layers)


def described(options: argparse.Namespace) -> dict:
    """The settings of a run as its result states them."""
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "weights", "set")}
    return settings | dict(options.set) | {"weights": "shipped" if options.weights == WEIGHTS else options.weights.name}


def run(options: argparse.Namespace) -> dict:
    """Train and judge; returns what is written to `options.out`."""
    held_out = editrl.EditDataset(rows(sample_scenes(options.eval_scenes, EVAL_SEED, "heldout")))
    result = {"settings": described(options), "machine": machine(options.device), "evaluations": []}
    build(options, [Recorder(options.out, result)], held_out).train()
    return result


def setting(text: str) -> tuple[str, object]:
    """`field=value` of `--set`, the value as in YAML."""
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"must be field=value, not {text!r}")
    return name, yaml.safe_load(value)


def parser(description: str | None = __doc__) -> argparse.ArgumentParser:
    """The options of a run; the defaults are the large-batch setting for a GPU."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    add(
        "--reward",
        choices=["oracle", "oracle_success", "oracle_both", "oracle_all", "viva", "random", "source_fidelity"],
        default="oracle",
    )
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
    add("--learning_rate", type=float, default=5e-5)
    add("--lora_rank", type=int, default=0, help="0: train all weights")
    add("--set", type=setting, nargs="+", default=[], metavar="FIELD=VALUE", help="any field of FlowGRPOConfig")
    return options


def main() -> None:
    run(parser().parse_args())


if __name__ == "__main__":
    main()
