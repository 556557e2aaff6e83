"""What the training scripts share: options, an endless stream of batches, a cosine schedule, atomic saving."""

import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from editrl.recipes.shapes.world import EditScene, sample_scenes


@dataclass
class Options:
    """How long and on what a model is trained."""

    out: Path
    steps: int
    batch_size: int
    learning_rate: float
    device: str = "cpu"
    seed: int = 0


def scenes(count: int, seed: int, split: str = "all") -> list[EditScene]:
    """Scenes of all tasks in a shuffled order."""
    drawn = sample_scenes(count, seed, split)
    random.Random(seed).shuffle(drawn)
    return drawn


def optimise(model: nn.Module, options: Options, loss_of_step: Callable[[int], Tensor], name: str) -> float:
    """AdamW with warm-up and cosine decay, gradients clipped at 1. Returns the seconds taken."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=1e-4)
    warmup = max(options.steps // 50, 1)

    def scale(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / options.steps)) + 1e-3)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    started = time.perf_counter()
    progress = tqdm(range(options.steps), desc=name, mininterval=10, miniters=1)
    for step in progress:
        loss = loss_of_step(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(options.steps // 20, 1) == 0:
            progress.write(f"{name} step {step}: loss {loss.item():.5f}")
    return time.perf_counter() - started


def save(folder: Path, parts: dict[str, object], options: Options, seconds: float, quality: dict[str, float]) -> None:
    """Write `parts` (sub-folder -> object with `save_pretrained`, "" for the folder itself) in float16, and how they
    were made, to `folder`, which is replaced only when everything is written."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for subfolder, part in parts.items():
        if isinstance(part, nn.Module):
            part = part.half()
        part.save_pretrained(temporary / subfolder)
    made = {**asdict(options), "device": device_name(options.device), "minutes": round(seconds / 60, 1)}
    made.pop("out")
    (temporary / "made.json").write_text(json.dumps({**made, "quality": quality}, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def device_name(device: str) -> str:
    """The name of the card, or "cpu"."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"
