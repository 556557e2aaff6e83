"""Cheap measures of edited clips that no reward optimises, so that a hacked reward shows in them.

Over-exposure, cartoon looks, grid patterns and wiped backgrounds come with a rising reward; what gives them away is a
plain image statistic beside it. None of these is a measure of quality: only their change over a run means something.
`editrl.trainers.watchdog` watches that change.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from editrl.errors import EditrlError

EDGE_SLOPE = 0.05
"""Luma a pixel above which a pixel is an edge. A sharp step of height h has slope h/2 on both sides, so steps of more
than a tenth of the range count; noise needs a standard deviation of about 0.05 before it does."""

BINS = 8  # of each colour channel
CHUNK_VALUES = 2**20  # float32 values measured at once: 4 MB fit a cache, and one real clip is more than that
GPU_CHUNK_VALUES = 2**26  # few and large, since each is waited for


def luma(videos: Tensor) -> Tensor:
    """Brightness in [0,1] (ITU-R BT.601, as in JPEG) of videos [N,F,3,H,W]: [N,F,H,W]."""
    red, green, blue = videos.unbind(2)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def edge_density(videos: Tensor) -> Tensor:
    """Share of pixels whose luma has a Sobel gradient steeper than `EDGE_SLOPE`: [N,F,3,H,W] -> [N] in [0,1].

    The kernels are divided by 8, so the gradient is in luma a pixel; a frame is continued beyond its border by its last
    pixels, which are no edge. Falls with wiped backgrounds and lost texture, rises with noise and grid patterns. Blur
    takes texture away, but widens a strong edge.
    """
    around = F.pad(luma(videos), (1, 1, 1, 1), mode="replicate")
    down = around[..., :-2, :] + 2 * around[..., 1:-1, :] + around[..., 2:, :]
    along = around[..., :-2] + 2 * around[..., 1:-1] + around[..., 2:]
    square = (down[..., 2:] - down[..., :-2]).square() + (along[..., 2:, :] - along[..., :-2, :]).square()
    return (square > (8 * EDGE_SLOPE) ** 2).float().mean((1, 2, 3))


def colour_entropy(videos: Tensor) -> Tensor:
    """Shannon entropy in bits, -Σ p·log2 p, of a clip's colours in 8x8x8 equal bins: [N,F,3,H,W] -> [N] in [0,9].

    0 for one plain colour. Falls with cartoon looks and wiped backgrounds, rises with noise.
    """
    red, green, blue = videos.mul(BINS).floor().clamp(0, BINS - 1).unbind(2)
    colours = (red * BINS**2 + green * BINS + blue).long().flatten(1)
    first = torch.arange(len(colours), device=colours.device)[:, None] * BINS**3
    counts = torch.bincount((colours + first).flatten(), minlength=len(colours) * BINS**3).view(-1, BINS**3)
    share = counts / counts.sum(1, keepdim=True)
    return torch.special.entr(share).sum(1) / math.log(2)


def exposure(videos: Tensor) -> Tensor:
    """Mean luma: [N,F,3,H,W] -> [N] in [0,1]."""
    return luma(videos).mean((1, 2, 3))


def temporal_flicker(videos: Tensor) -> Tensor:
    """Mean of |y[t-1] - 2 y[t] + y[t+1]| of each pixel's luma y: [N,F,3,H,W] -> [N] in [0,2].

    A second difference, so a steady fade counts nothing and a smooth picture that moves steadily next to nothing; a
    sharp edge counts where it passes. NaN for clips of fewer than three frames.
    """
    return luma(videos).diff(n=2, dim=1).abs().mean((1, 2, 3))  # the mean of no frames is NaN


def source_similarity(videos: Tensor, source_videos: Tensor) -> Tensor:
    """1 - mean absolute difference to the source clips: [N,F,3,H,W] twice -> [N] in [0,1].

    NaN where the shapes differ. 1 is the unedited source, so what an instruction changes lowers it too.
    """
    if videos.shape != source_videos.shape:
        return videos.new_full((len(videos),), torch.nan)
    return 1 - (videos - source_videos).abs().mean((1, 2, 3, 4))


WATCHDOG = {
    "edge_density": edge_density,
    "colour_entropy": colour_entropy,
    "exposure": exposure,
    "temporal_flicker": temporal_flicker,
    "source_similarity": source_similarity,
}
"""Every measure by its name. `source_similarity` takes the source clips as well."""


@torch.no_grad()
def measure(videos: Sequence[Tensor], source_videos: Sequence[Tensor]) -> dict[str, Tensor]:
    """All measures of N edited clips.

    Args:
        videos: N clips [F,3,H,W] in [0,1], on one device; sizes and lengths may differ.
        source_videos: their sources, on any device.

    Returns: name -> float32 CPU tensor [N], in the order of `WATCHDOG`; NaN where a measure does not apply.

    Raises: EditrlError for unequal numbers of clips, or a clip that holds NaN or infinity.
    """
    if len(videos) != len(source_videos):
        raise EditrlError(f"watchdog: {len(videos)} videos but {len(source_videos)} source videos; give one each.")
    alike = defaultdict(list)
    for index, (video, source) in enumerate(zip(videos, source_videos, strict=True)):
        alike[video.shape, source.shape, video.device.type].append(index)
    values = torch.full((len(WATCHDOG), len(videos)), torch.nan)
    for (shape, _, device), indices in alike.items():
        limit = CHUNK_VALUES if device == "cpu" else GPU_CHUNK_VALUES
        for part in torch.tensor(indices).split(max(limit // shape.numel(), 1)):
            clips = torch.stack([videos[index] for index in part]).float()
            sources = torch.stack([source_videos[index] for index in part]).to(clips)
            finite = clips.isfinite().flatten(1).all(1).cpu()
            if not finite.all():
                bad = part[~finite][0].item()
                raise EditrlError(f"watchdog: video {bad} has NaN or infinite values; the policy has diverged.")
            measured = [
                function(clips, sources) if name == "source_similarity" else function(clips)
                for name, function in WATCHDOG.items()
            ]
            values[:, part] = torch.stack(measured).cpu()
    return dict(zip(WATCHDOG, values, strict=True))
