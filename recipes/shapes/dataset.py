"""The embedded world as training data: rows in memory, or a folder of clips with a manifest.

    python -m editrl.recipes.shapes.dataset OUT --num 256 --seed 0 --split train

writes OUT/manifest.jsonl and the clips it names; `EditDataset.from_manifest` and `editrl sft` read it.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from editrl.data import atomic_path, write_image, write_video
from editrl.errors import EditrlError
from editrl.recipes.shapes.world import FPS, SPLITS, TASKS, EditScene, render_scenes, sample_scenes


def rows(scenes: Sequence[EditScene], *, underediting: float = 0.0, seed: int = 0) -> list[dict]:
    """One row of EditDataset for each scene, with uint8 tensors in memory and the extra columns `scene` (a dict, what
    the oracle needs) and `underedited` (bool).

    `underediting` in [0,1]: the share of rows, drawn with `seed`, whose target clip is a copy of the source. Synthetic
    pairs typically have this flaw; mask and captions still describe the edit that was asked for.
    """
    if not 0 <= underediting <= 1:
        raise EditrlError(f"underediting is {underediting}; give a share between 0 and 1.")
    flawed = set(random.Random(seed).sample(range(len(scenes)), round(underediting * len(scenes))))
    pixels = render_scenes(scenes)
    return [
        {
            "id": scene.id,
            "task": scene.task,
            "instruction": scene.instruction,
            "source": pixels["source"][index],
            "target": pixels["source" if index in flawed else "target"][index],
            "mask": pixels["mask"][index],
            "reference_image": pixels["reference"][index, None] if scene.reference else None,
            "source_caption": scene.source_caption,
            "target_caption": scene.target_caption,
            "fps": FPS,
            "underedited": index in flawed,
            "scene": scene.to_dict(),
        }
        for index, scene in enumerate(scenes)
    ]


def write_dataset(folder: str | Path, scenes: Sequence[EditScene], *, underediting: float = 0.0, seed: int = 0) -> Path:
    """Write the rows as files below `folder` and return its manifest.jsonl, which is written last.

    source/, target/ and mask/ get lossless mp4 (pixels come back within 2/255), reference/ gets PNG. Raises EditrlError
    for no scenes, repeated ids, or a folder that already has a manifest.
    """
    manifest = Path(folder) / "manifest.jsonl"
    if manifest.exists():
        raise EditrlError(f"{manifest}: is already there; choose another folder or remove this data set first.")
    if len({scene.id for scene in scenes}) < max(len(scenes), 1):
        raise EditrlError(f"{folder}: {len(scenes)} scenes do not have that many ids; give scenes, each its own id.")
    lines = []
    with tqdm(rows(scenes, underediting=underediting, seed=seed), desc="writing clips", disable=None) as progress:
        for index, row in enumerate(progress):
            row["mask"] = row["mask"].expand(-1, 3, -1, -1) * 255
            for key in ("source", "target", "mask"):
                clip, row[key] = row[key], f"{key}/{index:05d}.mp4"
                write_video(manifest.parent / row[key], clip, FPS, lossless=True)
            if row["reference_image"] is not None:
                image, row["reference_image"] = row["reference_image"], f"reference/{index:05d}.png"
                write_image(manifest.parent / row["reference_image"], image)
            lines.append(json.dumps(row) + "\n")
    with atomic_path(manifest) as unfinished:
        unfinished.write_text("".join(lines), encoding="utf-8")
    return manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Write a data set of the embedded world. Returns the exit code: 2 after an error, which is told in one line."""
    parser = argparse.ArgumentParser(prog="python -m editrl.recipes.shapes.dataset", description=__doc__.split("\n")[0])
    parser.add_argument("out", metavar="OUT", help="folder to write to; made if it is missing")
    parser.add_argument("--num", type=int, default=256, help="number of scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same data (default: %(default)s)")
    parser.add_argument("--split", default="train", help=f"one of {', '.join(SPLITS)} (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK", help=f"some of {', '.join(TASKS)}")
    parser.add_argument(
        "--underediting", type=float, default=0.0, metavar="SHARE", help="share of targets replaced by their source"
    )
    args = parser.parse_args(argv)
    try:
        scenes = sample_scenes(args.num, args.seed, args.split, args.tasks)
        manifest = write_dataset(args.out, scenes, underediting=args.underediting, seed=args.seed)
    except (EditrlError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {len(scenes)} scenes to {manifest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
