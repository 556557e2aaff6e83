"""Where the time of a step goes: `python -m editrl.benchmarks.throughput.kernels --size full --out FILE`.

Profiles the compiled rollout step (merged adapter) and the compiled training step of `steps.py` and adds up the kernels
by kind. `idle` is what the GPU waits within a step. On a CPU (`--size tiny`) operators are added up instead.
"""

import argparse
import json
import re
import time
from contextlib import nullcontext

import torch
from torch.profiler import ProfilerActivity, profile

from editrl.benchmarks.record import machine, write_json
from editrl.benchmarks.throughput.steps import Steps, matmul_peak, parser
from editrl.speed import MergedAdapter, prepare_transformer

KINDS = {
    "attention, backward": r"(?i)(sdpa|flash|fmha|attention).*(bprop|bwd|backward)",
    "attention, forward": r"(?i)(sdpa|flash|fmha|attention)",
    "products": r"(?i)(gemm|nvjet|cutlass|splitk|addmm|::mm|_mm$|cublas)",
    "fused between products": r"(?i)triton",
    "copies": r"(?i)(memcpy|memset|copy|cat)",
}
"""Kind -> what the name of a kernel matches; the first that does."""


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), "others")


def kernels(steps: Steps, step, repeats: int = 3) -> dict:
    """Milliseconds of a step by kind, and of the kernels that take most."""
    activity = ProfilerActivity.CUDA if steps.cuda else ProfilerActivity.CPU
    for _ in range(2):
        step()
    steps.wait()
    with profile(activities=[activity]) as profiled:
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        steps.wait()
        wall = time.perf_counter() - start
    spent, single = {}, []
    for event in profiled.key_averages():
        milliseconds = (event.self_device_time_total if steps.cuda else event.self_cpu_time_total) / 1e3 / repeats
        if not milliseconds or (steps.cuda and event.device_type.name != "CUDA"):
            continue
        kind = kind_of(event.key)
        spent[kind] = spent.get(kind, 0.0) + milliseconds
        single.append((milliseconds, event.count // repeats, event.key))
    total = 1e3 * wall / repeats
    spent["idle"] = total - sum(spent.values())
    return {
        "milliseconds": round(total, 1),
        "by_kind": {kind: round(value, 1) for kind, value in sorted(spent.items(), key=lambda item: -item[1])},
        "longest": [
            {"milliseconds": round(value, 2), "calls": calls, "kernel": name[:120]}
            for value, calls, name in sorted(single, reverse=True)[:30]
        ],
    }


def run(options: argparse.Namespace) -> dict:
    steps = Steps(options)
    matmul_peak(steps)
    steps.build()
    prepare_transformer(steps.model, compiled=True, activation_memory=steps.free())

    def rollout(around=nullcontext):
        with torch.no_grad(), around():
            steps.velocity()

    def training():
        steps.velocity().float().square().mean().backward()
        steps.model.zero_grad(set_to_none=True)

    found = {
        "training, activation_memory auto": kernels(steps, training),
        "rollout": kernels(steps, rollout),
    }
    merged = MergedAdapter(steps.model)
    found["rollout, merged adapter"] = kernels(steps, lambda: rollout(merged))
    result = {"settings": {"size": options.size}, "machine": machine(options.device)}
    return result | {"products": steps.figures, "steps": found}


def main() -> None:
    options = parser(__doc__).parse_args()
    result = run(options)
    write_json(options.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
