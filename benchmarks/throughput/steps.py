"""The two steps that GRPO is made of, at 13B: `python -m editrl.benchmarks.throughput.steps --size full --out FILE`.

A rollout step is one forward without gradient, a training step one forward and backward, each of a clip of 33 frames of
480x832 with LoRA (rank 64 on all linear layers of the blocks) and random weights. The first of each kind is the
baseline: diffusers and PEFT as they come, eager, attention mask, checkpointed. `share_of_peak` is what the step's own
products and attention (of the base weights, nothing computed twice) would take at the rate of a long series of products
of 8192 cubed, over what it took. `--size tiny` is the same on a CPU.
"""

import argparse
import gc
import json
import os
import statistics
import time
import types
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers import HunyuanVideoTransformer3DModel
from peft import LoraConfig, get_peft_model

from editrl.benchmarks.record import machine, write_json
from editrl.benchmarks.throughput.models import TRANSFORMER
from editrl.registry import policies
from editrl.speed import MergedAdapter, Work, prepare_transformer, quantize_blocks, repeated_blocks

GIB = 2**30
LATENTS = {"full": (9, 60, 104), "tiny": (2, 4, 4)}
TEXT = {"full": 400, "tiny": 8}
BLOCK = r"(single_)?transformer_blocks\.\d+\."
ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
LAYERS = rf"{BLOCK}({ATTENTION}|proj_mlp|proj_out|ff(_context)?\.net\.(0\.proj|2))"


class Steps:
    """Times steps of one model, and keeps the figures."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.figures = options, {}
        self.cuda = options.device.startswith("cuda")
        self.model = self.inputs = self.peak = None
        self.operations = {}

    def build(self, fp8: bool = False) -> None:
        """A transformer with random weights and adapters whose second factor is not zero; the same every time."""
        self.model = None
        torch._dynamo.reset()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(self.options.device):
            model = policies.find("hunyuan_video").transformer_class(**TRANSFORMER[self.options.size])
        torch.set_default_dtype(torch.float32)
        model.requires_grad_(False)
        if fp8:
            quantize_blocks(repeated_blocks(model))
        config, length = model.config, TEXT[self.options.size]
        shapes = {
            "hidden_states": (1, 2 * config.in_channels, *LATENTS[self.options.size]),
            "encoder_hidden_states": (1, length, config.text_embed_dim),
            "pooled_projections": (1, config.pooled_projection_dim),
        }
        device = self.options.device
        self.inputs = {name: torch.randn(shape).to(device, torch.bfloat16) for name, shape in shapes.items()}
        self.inputs |= {"timestep": torch.tensor([800.0], device=device), "return_dict": False}
        self.inputs["guidance"] = torch.tensor([1000.0], device=device)
        self.model = model
        if not self.operations:
            self.count_operations()
        torch.manual_seed(1)
        self.model = get_peft_model(model, LoraConfig(r=64, lora_alpha=256, target_modules=LAYERS))
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=1e-3)

    @torch.no_grad()
    def count_operations(self) -> None:
        """Of a forward, and of a forward and backward: no weight's gradient, twice the products of attention."""
        blocks, given = repeated_blocks(self.model), []
        hook = blocks[0].register_forward_pre_hook(lambda block, inputs: given.append(inputs))
        self.velocity()
        hook.remove()
        work = Work.of(blocks, given[0])
        self.operations["rollout"] = work.products + work.attention
        self.operations["training"] = 2 * work.products + 3 * work.attention

    def velocity(self, masked: bool = False) -> torch.Tensor:
        mask = torch.ones(1, TEXT[self.options.size], dtype=torch.long, device=self.options.device) if masked else None
        with torch.autocast(self.options.device.split(":")[0], torch.bfloat16):
            return self.model(**self.inputs, encoder_attention_mask=mask)[0]

    def rollout(self, name: str, masked: bool = False, around=nullcontext) -> None:
        def step():
            with torch.no_grad(), around():
                self.velocity(masked)

        self.measure("rollout", name, step)

    def training(self, name: str, masked: bool = False) -> None:
        def step():
            self.velocity(masked).float().square().mean().backward()
            self.model.zero_grad(set_to_none=True)

        self.measure("training", name, step)

    def measure(self, kind: str, name: str, step) -> None:
        start = time.perf_counter()
        step()
        self.wait()
        first = time.perf_counter() - start
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(self.options.repeats):
            start = time.perf_counter()
            step()
            self.wait()
            seconds.append(time.perf_counter() - start)
        baseline = next((f["seconds"] for f in self.figures.values() if f["kind"] == kind), None)
        figure = {"kind": kind, "seconds": round(statistics.median(seconds), 4), "first": round(first, 1)}
        figure["spread"] = [round(min(seconds), 4), round(max(seconds), 4)]
        figure["ratio"] = round(figure["seconds"] / (baseline or figure["seconds"]), 3)
        if self.peak and kind in self.operations:
            figure["share_of_peak"] = round(self.operations[kind] / figure["seconds"] / self.peak, 3)
        if self.cuda:
            figure["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 1)
        self.figures[f"{kind}: {name}"] = figure
        print(f"{kind}: {name}", json.dumps(figure), flush=True)
        self.save()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def save(self) -> None:
        settings = {name: getattr(self.options, name) for name in ("size", "device", "repeats")}
        result = {"settings": settings, "machine": machine(self.options.device), "figures": self.figures}
        write_json(self.options.out, result)

    def within(self, limit: float) -> float:
        """GiB that activations may take for a peak of `limit` GiB."""
        return limit - torch.cuda.memory_allocated() / GIB

    def free(self):
        """What the GPU has left."""
        return "auto" if self.cuda else 1.0


def matmul_peak(steps: Steps, size: int = 8192, seconds: float = 3.0) -> None:
    """TFLOP/s of a bfloat16 product on this machine, at first and in the long run, when its power is limited."""
    if not steps.cuda:
        return
    a, b = (torch.randn(size, size, device=steps.options.device, dtype=torch.bfloat16) for _ in range(2))
    steps.measure("product", f"bfloat16, {size} cubed", lambda: [a @ b for _ in range(10)])
    figure, taken = steps.figures[f"product: bfloat16, {size} cubed"], []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        _ = [a @ b for _ in range(10)]
        steps.wait()
        taken.append(time.perf_counter() - start)
    rates = [10 * 2 * size**3 / took for took in (figure["seconds"], statistics.median(taken))]
    figure["tflops"], figure["sustained_tflops"] = (round(rate / 1e12) for rate in rates)
    steps.peak = rates[1]


@contextmanager
def stock_forward(model: torch.nn.Module):
    """Within the block the transformer runs diffusers' own forward, which builds a mask whatever it is given."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.forward = types.MethodType(HunyuanVideoTransformer3DModel.forward, base)
    try:
        yield
    finally:
        del base.forward


def run(options: argparse.Namespace) -> None:
    """All variants, the baseline of each kind first."""
    steps = Steps(options)
    matmul_peak(steps)
    steps.build()
    with stock_forward(steps.model):
        steps.rollout("diffusers and PEFT, eager, mask", masked=True)
    steps.rollout("no mask")
    prepare_transformer(steps.model, checkpointed=True)
    with stock_forward(steps.model):
        steps.training("diffusers and PEFT, eager, mask, checkpointed", masked=True)
    steps.training("no mask, checkpointed")
    steps.model.get_base_model().disable_gradient_checkpointing()
    prepare_transformer(steps.model, compiled=True)
    steps.rollout("compiled")
    merged = MergedAdapter(steps.model)
    steps.rollout("compiled, merged adapter", around=merged)
    del merged
    with torch.no_grad():
        reference = steps.velocity()
    for limit in [48 - 4, 80 - 4] if steps.cuda else []:
        prepare_transformer(steps.model, compiled=True, activation_memory=steps.within(limit))
        steps.training(f"compiled, at most {limit} GiB")
    prepare_transformer(steps.model, compiled=True, activation_memory=steps.free())
    steps.training("compiled, activation_memory auto")
    if options.fp8:
        fp8_base(steps, reference)


def fp8_base(steps: Steps, reference: torch.Tensor) -> None:
    """The same with FP8 base weights; `reference` is the velocity of the bfloat16 ones."""
    steps.build(fp8=True)
    prepare_transformer(steps.model, compiled=True, activation_memory=steps.free())
    steps.rollout("FP8 base, compiled")
    steps.training("FP8 base, compiled, activation_memory auto")
    with torch.no_grad():
        error = (steps.velocity() - reference).float().norm() / reference.float().norm()
    steps.figures["rollout: FP8 base, compiled"]["velocity_error"] = round(error.item(), 4)
    if steps.cuda:
        prepare_transformer(steps.model, compiled=True, activation_memory=steps.within(80 - 4))
        steps.training("FP8 base, compiled, at most 76 GiB")
    steps.save()


def parser(description: str) -> argparse.ArgumentParser:
    """What `Steps` needs to know."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--size", choices=list(LATENTS), default="full")
    found.add_argument("--out", type=Path, required=True)
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--repeats", type=int, default=5)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--fp8", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    run(options.parse_args())


if __name__ == "__main__":
    main()
