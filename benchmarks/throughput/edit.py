"""One edit at real size, end to end: `python -m editrl.benchmarks.throughput.edit --size full --out FILE`.

Writes an editor with random weights in Hub layout, loads it as a user would, and edits a clip of 33 frames of 480x832:
seconds, peak GPU memory and host memory of every part, as JSON. `--size tiny` is the same script on a CPU.

Host memory: `anonymous` is what a process holds by itself; pages of mapped files, which every process of a host shares
and the kernel can drop, are counted apart.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch

import editrl
from editrl.benchmarks.record import machine, write_json
from editrl.data import EditExample
from editrl.flow import sigma_schedule
from editrl.rollout import counter_noise, rollout

GIB = 2**30
CLIP = {"full": (33, 480, 832), "tiny": (5, 64, 96)}


def host_memory() -> dict[str, float]:
    """This process' resident memory, GiB: what is its own, and pages of files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {
        "anonymous": int(fields["RssAnon"].split()[0]) * 1024 / GIB,
        "files": int(fields["RssFile"].split()[0]) * 1024 / GIB,
    }


class Parts:
    """Seconds, peak GPU memory and peak host memory of named parts."""

    def __init__(self, device: str):
        self.device, self.measured = device, {}

    @contextmanager
    def __call__(self, name: str):
        cuda = self.device.startswith("cuda")
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        peak, running = host_memory(), threading.Event()

        def watch():
            while not running.wait(0.05):
                for kind, value in host_memory().items():
                    peak[kind] = max(peak[kind], value)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        start = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        running.set()
        watcher.join()
        self.measured[name] = {
            "seconds": round(seconds, 3),
            "host_anonymous_gib": round(peak["anonymous"], 2),
            "host_files_gib": round(peak["files"], 2),
        }
        if cuda:
            self.measured[name]["gpu_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)


def run(options: argparse.Namespace) -> dict:
    """Write, load, edit; returns what is written to `options.out`."""
    device = options.device
    # In a process of its own, so that what it held is not counted below.
    writing = ["-m", "editrl.benchmarks.throughput.models", options.folder, options.size, device, options.dtype]
    subprocess.run([sys.executable, *map(str, writing)], check=True)
    parts = Parts(device)
    weights = {
        name: sum(file.stat().st_size for file in (options.folder / name).glob("*.safetensors")) / GIB
        for name in ("transformer", "vlm", "vae", "text_encoder_2")
    }
    before = host_memory()
    with parts("load"):
        policy = editrl.load_policy("hunyuan_video", str(options.folder), dtype=options.dtype, device=device)
        policy.to(device)
        policy.transformer.eval()
    if options.tiling:
        policy.vae.enable_tiling()
    frames, height, width = CLIP[options.size]
    source = torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(0))
    example = EditExample(id="0", instruction="make the red circle blue", source=source)
    with parts("encode, first time"):
        policy.encode([example])
    with parts("instructor"):
        policy.instructor([example])
    with parts("encode source"):
        policy.encode_videos(source.unsqueeze(0))
    conditions = policy.encode([example]).to(device)
    noise = counter_noise(policy.latent_shape(conditions), 0).unsqueeze(0)
    sigmas = sigma_schedule(options.steps, 5.0)
    with parts("first denoising step"):
        rollout(policy, policy.transformer, conditions, sigmas=sigmas, initial_noise=noise, stop=1)
    with parts("denoising"):
        clean = rollout(policy, policy.transformer, conditions, sigmas=sigmas, initial_noise=noise).clean
    with parts("decode, first time"):
        policy.decode(clean)
    with parts("decode"):
        video = policy.decode(clean)
    assert video.shape[1:] == source.shape
    loaded = parts.measured["load"]
    return {
        "settings": {k: v for k, v in vars(options).items() if k not in ("out", "folder")},
        "machine": machine(device),
        "clip": {"frames": frames, "height": height, "width": width},
        "tokens": {
            "video": clean.shape[2] * clean.shape[3] * clean.shape[4] // 4,
            "instructor": conditions.instructor_tokens.shape[1],
        },
        "weights_gib": {name: round(size, 2) for name, size in weights.items()},
        "parts": parts.measured,
        "seconds_a_step": round(parts.measured["denoising"]["seconds"] / options.steps, 4),
        "load_host_over_weights": round(
            (loaded["host_anonymous_gib"] - before["anonymous"]) / sum(weights.values()), 3
        ),
        "load_host_and_files_over_weights": round(
            (loaded["host_anonymous_gib"] + loaded["host_files_gib"] - sum(before.values())) / sum(weights.values()), 3
        ),
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    add("--size", choices=list(CLIP), default="full")
    add("--out", type=Path, required=True)
    add("--folder", type=Path, default=Path("editor"), help="where the random weights are written (full: 43 GB)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="bfloat16")
    add("--steps", type=int, default=10)
    add("--tiling", action="store_true", help="the VAE in tiles")
    options = options.parse_args()
    result = run(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
