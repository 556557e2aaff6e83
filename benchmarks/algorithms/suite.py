"""All learning experiments: `python -m editrl.benchmarks.algorithms.suite gpu|cpu --out FOLDER`.

Every experiment runs with three seeds, and every algorithm beside a random-reward control of the same settings. A run
whose result is complete is not repeated, so an interrupted suite goes on where it stopped. `summary.py` makes the table
of the folder.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

VIVA = "--reward viva --reward_weights 1 0.3 1"
REWARDS = {"oracle": "--reward oracle", "viva": VIVA, "random": "--reward random"}

# Large batches: 64 groups of 24 clips a rollout, from the ordinary checkpoint. Learning rates are what preservation
# allows; the KL holds what no reward asks for. Its scale is that of the loss, so betas differ.
ROLLOUTS = "--updates 60 --eval_every 20"
ALGORITHMS = {
    "grpo": "--updates 300 --eval_every 20 --learning_rate 2e-5 --set beta=0.1",
    "grpo_guard": f"{ROLLOUTS} --learning_rate 5e-5 --set loss_type=grpo_guard beta=0.5",
    # Four updates a rollout: with one nothing can be masked, and dppo is grpo.
    "dppo": "--updates 240 --eval_every 80 --learning_rate 5e-5 --micro_batch 384 "
    "--set loss_type=dppo beta=0.1 gradient_accumulation_steps=2",
    "nft": f"{ROLLOUTS} --learning_rate 1e-4 --set loss_type=nft beta=0.1 timesteps_per_sample=4",
    "awm": f"{ROLLOUTS} --learning_rate 1e-4 --set loss_type=awm beta=0.04 timesteps_per_sample=4",
    "rwr": f"{ROLLOUTS} --learning_rate 5e-5 --set loss_type=rwr beta=0.3 timesteps_per_sample=4",
}
LONG = (
    "--updates 300 --eval_every 20 --learning_rate 1.5e-4 "
    "--set loss_type=nft beta=0.08 timesteps_per_sample=4 lr_scheduler_type=linear ema_decay=0.98"
)
# With preservation among what is rewarded, the KL need not stand in for it, and a fifth of it does.
LONGEST = (
    "--updates 420 --eval_every 60 --learning_rate 1.5e-4 "
    "--set loss_type=nft beta=0.02 timesteps_per_sample=4 lr_scheduler_type=linear ema_decay=0.98"
)

# Small batches from the under-editing checkpoint, on two cores in minutes; nft is how `editrl quickstart` trains.
SMALL = (
    "--checkpoint sft-underediting --device cpu --groups 8 --members 12 --micro_batch 48 --scenes 256 "
    "--updates {} --eval_every {} --learning_rate {} --set lr_scheduler_type=linear {}"
)
SMALL_ALGORITHMS = {
    "grpo": SMALL.format(50, 10, 5e-5, "sde_window_range=[0,2]"),
    "grpo_guard": SMALL.format(30, 10, 5e-5, "sde_window_range=[0,2] loss_type=grpo_guard"),
    "dppo": SMALL.format(120, 40, 2e-5, "sde_window_range=[0,2] loss_type=dppo gradient_accumulation_steps=1"),
    "nft": SMALL.format(30, 10, 5e-5, "loss_type=nft beta=0.1"),
    "awm": SMALL.format(30, 10, 5e-5, "loss_type=awm beta=0.04"),
    "rwr": SMALL.format(30, 10, 5e-5, "loss_type=rwr beta=0.1"),
}

EXPERIMENTS = {
    "gpu": {
        f"{reward}-{algorithm}": f"--checkpoint sft {rewarded} {settings}"
        for reward, rewarded in REWARDS.items()
        for algorithm, settings in ALGORITHMS.items()
    }
    | {
        "oracle-nft-long": f"--checkpoint sft --reward oracle {LONG}",
        "oracle_all-nft-long": f"--checkpoint sft --reward oracle_all --reward_weights 1 0.5 0.1 {LONGEST}",
        "random-nft-long": f"--checkpoint sft --reward random {LONGEST}",
    },
    "cpu": {
        f"small-{reward}-{algorithm}": f"{REWARDS[reward]} {settings}"
        for algorithm, settings in SMALL_ALGORITHMS.items()
        for reward in ("viva", "random")
    }
    # A copy of the source maximises it.
    | {
        "small-source_fidelity-grpo": "--reward source_fidelity "
        + SMALL.format(20, 5, 1e-4, "sde_window_range=[0,2] lr_scheduler_type=constant_with_warmup"),
    },
}


def complete(path: Path, updates: int) -> bool:
    """Whether a result reached its last update."""
    return path.exists() and json.loads(path.read_text())["evaluations"][-1]["update"] >= updates


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=list(EXPERIMENTS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of experiments; default all of the size")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to share among the runs")
    parser.add_argument("--minutes", type=float, default=60, help="end each run after this time; its results stay")
    options = parser.parse_args()
    chosen = options.only or list(EXPERIMENTS[options.size])
    options.out.mkdir(parents=True, exist_ok=True)
    waiting = []
    for seed in options.seeds:
        for name in chosen:
            path = options.out / f"{name}-seed{seed}.json"
            arguments = EXPERIMENTS[options.size][name].split()
            if complete(path, int(arguments[arguments.index("--updates") + 1])):
                print(f"{path.stem}: complete", flush=True)
                continue
            waiting.append(["--seed", str(seed), *arguments, "--out", str(path)])
    return run_all(waiting, options)


def run_all(waiting: list[list[str]], options: argparse.Namespace) -> int:
    """Run the command lines, `parallel` at a time; the exit code is 1 if one failed."""
    threads = str(max((os.cpu_count() or 1) // options.parallel, 1))
    running: dict[subprocess.Popen, tuple[str, float]] = {}
    failed, started = False, 0
    while waiting or running:
        while waiting and len(running) < options.parallel:
            arguments = waiting.pop(0)
            gpu = {"CUDA_VISIBLE_DEVICES": str(started % options.gpus)} if options.size == "gpu" else {}
            name = Path(arguments[-1]).stem
            log = (options.out / f"{name}.log").open("w")
            command = [sys.executable, "-m", "editrl.benchmarks.algorithms.learning", *arguments]
            environment = {**os.environ, "OMP_NUM_THREADS": threads, **gpu}
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            running[process] = name, time.monotonic()
            started += 1
        for process, (name, since) in list(running.items()):
            overdue = time.monotonic() - since > 60 * options.minutes
            if overdue and process.poll() is None:
                process.terminate()
                process.wait()
            if process.poll() is not None:
                del running[process]
                failed |= process.returncode != 0 and not overdue
                print(f"{name}: {'out of time' if overdue else f'exit code {process.returncode}'}", flush=True)
        time.sleep(0.5)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
