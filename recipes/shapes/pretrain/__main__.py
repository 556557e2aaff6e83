"""Rebuild the tiny weights: `python -m editrl.recipes.shapes.pretrain --out recipes/shapes/weights --device cuda`."""

import argparse
import json
from pathlib import Path

import torch
from transformers.utils import logging

from editrl.recipes.shapes.pretrain import clip, editors, vae, vlm
from editrl.recipes.shapes.pretrain.common import Options

# Stage -> steps, batch size, learning rate.
RECIPES = {
    "vae": (7000, 32, 2e-3),
    "vae-refine": (9500, 32, 1e-3),
    "clip": (8000, 256, 1e-3),
    "pickscore": (2500, 256, 3e-4),
    "vlm": (5000, 256, 1e-3),
    "sft": (6000, 256, 1e-3),
    "sft-underediting": (18, 256, 1e-4),
}

FOLDERS = {"vae": "sft/vae", "vae-refine": "sft/vae", "vlm": "sft/vlm"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", default=list(RECIPES), help=f"any of {', '.join(RECIPES)}; default all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the stage's own, for trial runs")
    parser.add_argument("--batch_size", type=int, help="likewise")
    parser.add_argument("--learning_rate", type=float, help="likewise")
    arguments = parser.parse_args()
    out, device = arguments.out, arguments.device
    for stage in arguments.stages:
        if stage not in RECIPES:
            parser.error(f"unknown stage '{stage}'; choose from {', '.join(RECIPES)}")
    # The text encoder is read from the whole CLIP: its "unexpected" vision weights are no news.
    logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high")
    for stage in arguments.stages:
        steps, batch_size, learning_rate = RECIPES[stage]
        options = Options(
            out / FOLDERS.get(stage, stage),
            arguments.steps or steps,
            arguments.batch_size or batch_size,
            arguments.learning_rate or learning_rate,
            device,
            arguments.seed,
        )
        train = {
            "vae": lambda o: vae.train(o),
            "vae-refine": lambda o: vae.train(o, start=o.out),
            "clip": lambda o: clip.train_clip(o),
            "pickscore": lambda o: clip.train_pickscore(o, out / "clip"),
            "vlm": lambda o: vlm.train(o, out / "sft" / "processor"),
            "sft": lambda o: editors.train(o, out, underediting=0.0),
            "sft-underediting": lambda o: editors.train(o, out, underediting=0.5),
        }[stage]
        print(json.dumps({stage: train(options)}), flush=True)


if __name__ == "__main__":
    main()
