"""What scoring a rollout costs: `python -m editrl.benchmarks.throughput.rewards --size full --out FILE`.

Eight edits of one clip of 33 frames of 480x832, and the three rewards of VIVA: CLIP-L for instruction and source,
CLIP-H as PickScore's, with random weights. The baseline computes each reward by itself, clip after clip, with the image
processor of transformers, as one would write it down; ours is a `RewardSet`. Both give the same scores, up to the dtype
and to the image processor's rounding to grey levels; the largest differences are in the result. `--size tiny` is the
same on a CPU.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

import editrl
from editrl.benchmarks.record import machine, write_json
from editrl.benchmarks.throughput.edit import CLIP
from editrl.benchmarks.throughput.models import write_rewards
from editrl.reward import reward_columns

CAPTIONS = ("a red circle on a grey ground", "a blue circle on a grey ground")


class Plain:
    """One CLIP, used as its documentation shows."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype):
        self.model = CLIPModel.from_pretrained(folder, dtype=dtype).to(device).eval()
        self.processor, self.tokenizer = (
            CLIPImageProcessor.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
        )

    def frames(self, clip: torch.Tensor) -> torch.Tensor:
        images = list((clip * 255).round().to(torch.uint8).cpu())
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        features = self.model.get_image_features(pixel_values=pixels.to(self.model.device, self.model.dtype))
        return torch.nn.functional.normalize(features.pooler_output.float(), dim=-1)

    def text(self, caption: str) -> torch.Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            [caption], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        features = self.model.get_text_features(input_ids=tokens.input_ids.to(self.model.device))
        return torch.nn.functional.normalize(features.pooler_output.float(), dim=-1)[0]


@torch.no_grad()
def plain_scores(clip: Plain, pickscore: Plain, videos, source) -> dict[str, list[float]]:
    """Each reward by itself, clip after clip."""
    before, after = CAPTIONS
    scores = {"clip_instruction": [], "clip_source_fidelity": [], "pickscore": []}
    for video in videos:
        scores["clip_instruction"].append((clip.frames(video) @ (clip.text(after) - clip.text(before))).mean().item())
    for video in videos:
        scores["clip_source_fidelity"].append((clip.frames(video) * clip.frames(source)).sum(-1).mean().item())
    scale = pickscore.model.logit_scale.float().exp().item()
    for video in videos:
        scores["pickscore"].append(scale * (pickscore.frames(video) @ pickscore.text(after)).mean().item() / 26)
    return scores


def run(options: argparse.Namespace) -> dict:
    """Both ways, on the same clips; returns what is written to `options.out`."""
    write_rewards(options.folder, options.size, options.device)
    dtype = "bfloat16" if options.device.startswith("cuda") else "float32"
    frames, height, width = CLIP[options.size]
    generator = torch.Generator(options.device).manual_seed(0)
    draw = lambda: torch.rand(frames, 3, height, width, generator=generator, device=options.device)  # noqa: E731
    source, videos = draw(), [draw() for _ in range(options.samples)]
    row = {"instruction": "make it blue", "source_caption": CAPTIONS[0], "target_caption": CAPTIONS[1]}
    columns = reward_columns([editrl.EditExample(id="0", source=source, **row)] * options.samples)
    kwargs = {
        name: {"model": str(options.folder / folder), "dtype": dtype}
        for name, folder in (
            ("clip_instruction", "clip"),
            ("clip_source_fidelity", "clip"),
            ("pickscore", "pickscore"),
        )
    }
    ours = editrl.RewardSet(list(kwargs), kwargs=kwargs).to(options.device)
    plain = [Plain(options.folder / name, options.device, getattr(torch, dtype)) for name in ("clip", "pickscore")]
    figures, scores = {}, {}
    for name, score in (
        ("plain", lambda: plain_scores(*plain, videos, source)),
        ("ours", lambda: dict(zip(ours.names, ours(videos, columns).T.tolist(), strict=True))),
    ):
        scores[name] = score()
        seconds = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            score()
            seconds.append(time.perf_counter() - start)  # scores are numbers, so the GPU was waited for
        figures[name] = {"seconds": round(statistics.median(seconds), 4)}
    figures["ours"]["ratio"] = round(figures["ours"]["seconds"] / figures["plain"]["seconds"], 3)
    differences = {
        name: round(max(abs(a - b) for a, b in zip(scores["plain"][name], scores["ours"][name], strict=True)), 5)
        for name in kwargs
    }
    return {
        "settings": {"size": options.size, "samples": options.samples, "repeats": options.repeats, "dtype": dtype},
        "machine": machine(options.device),
        "figures": figures,
        "largest_difference": differences,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    add("--size", choices=list(CLIP), default="full")
    add("--out", type=Path, required=True)
    add("--folder", type=Path, help="where the random weights are written (full: 6 GB); default a temporary one")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--samples", type=int, default=8)
    add("--repeats", type=int, default=5)
    options = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or Path(temporary)
        result = run(options)
    write_json(options.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
