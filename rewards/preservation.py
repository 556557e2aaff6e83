"""Is what the edit may not touch still as it was? Distances to the source outside the edit mask."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from editrl.errors import EditrlError
from editrl.registry import register_reward
from editrl.rewards.lpips import lpips, read_weights

HIGHEST_PSNR = 100.0  # dB; of equal pixels it would be infinite


@register_reward("preservation")
def preservation(videos, source_videos, masks=None, **kwargs) -> list[float | None]:
    """PSNR to the source outside the edit mask, in dB: 10·log10(1 / MSE) over all frames at once, 100 at most.

    Needs `masks`, [F,1,H,W] with 1 where the edit may change pixels; None for a clip without a mask, or whose mask
    leaves nothing out.
    """
    return outside_mask(psnr, videos, source_videos, masks)


@register_reward("preservation_ssim")
def preservation_ssim(videos, source_videos, masks=None, **kwargs) -> list[float | None]:
    """SSIM to the source outside the edit mask (Wang et al. 2004), mean over pixels, channels and frames; up to 1.

    None for a clip without a mask, or whose mask leaves nothing out.
    """
    return outside_mask(ssim, videos, source_videos, masks)


@register_reward("preservation_lpips")
class PreservationLPIPS:
    """Minus LPIPS (AlexNet) to the source outside the edit mask, mean over frames; 0 at best.

    `weights` is a file that you make once (the error without it says how). None for a clip without a mask, or whose
    mask leaves nothing out.
    """

    name = "preservation_lpips"

    def __init__(self, weights: str | None = None):
        self.weights = read_weights(weights)

    def to(self, device: torch.device | str) -> "PreservationLPIPS":
        self.weights = {name: weight.to(device) for name, weight in self.weights.items()}
        return self

    def __call__(self, videos, source_videos, masks=None, **kwargs) -> list[float | None]:
        """N clips and sources [F,3,H,W] in [0,1], masks [F,1,H,W] or None -> N floats."""
        device = self.weights["net.slice1.0.weight"].device

        def score(edited: Tensor, source: Tensor, outside: Tensor) -> float:
            frames = outside.flatten(1).any(1)  # a frame that is masked as a whole says nothing
            parts = (part[frames].to(device) for part in (edited, source))
            return -lpips(*parts, self.weights, outside[frames].to(device)).mean().item()

        return outside_mask(score, videos, source_videos, masks)


def outside_mask(
    score: Callable[[Tensor, Tensor, Tensor], float | None],
    videos: Sequence[Tensor],
    sources: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None,
) -> list[float | None]:
    """`score(edited, source, outside)` for each clip, on the device of the edited one.

    Within the mask `edited` is the source, so that no filter carries what happened there to the pixels that count;
    `outside` [F,1,H,W] is 1 for these.
    """
    scores = []
    for i, (edited, source) in enumerate(zip(videos, sources, strict=True)):
        mask = None if masks is None else masks[i]
        if mask is None or mask.bool().all():
            scores.append(None)
            continue
        if edited.shape != source.shape or mask.shape != (len(source), 1, *source.shape[-2:]):
            shapes = f"{list(edited.shape)}, {list(source.shape)} and {list(mask.shape)}"
            raise EditrlError(f"clip {i}, its source and its mask are {shapes}: give [F,3,H,W] twice and [F,1,H,W].")
        inside = mask.to(edited.device).bool()
        source = source.to(edited)
        scores.append(score(torch.where(inside, source, edited), source, (~inside).float()))
    return scores


def psnr(edited: Tensor, source: Tensor, outside: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in [0,1], over the pixels where `outside` [F,1,H,W] is 1."""
    squares = ((edited - source).double().square() * outside).sum() / (3 * outside.double().sum())
    return min(-10 * squares.log10().item(), HIGHEST_PSNR)


def ssim(edited: Tensor, source: Tensor, outside: Tensor) -> float | None:
    """Structural similarity with the paper's constants: Gaussian 11x11 window of sigma 1.5, K1 0.01, K2 0.03.

    Of colour clips [F,3,H,W] in [0,1], channel by channel, over the positions whose window lies within the frame and
    where `outside` is 1 (as scikit-image with gaussian_weights and the population covariance). None if there are none.
    """
    if min(edited.shape[-2:]) < 11:
        raise EditrlError(f"SSIM looks through a window of 11 pixels, the frames are {list(edited.shape[-2:])}.")
    counted = outside[..., 5:-5, 5:-5].double()
    if not counted.any():
        return None
    offsets = torch.arange(-5, 6, dtype=torch.float64, device=edited.device)
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blurred(values: Tensor) -> Tensor:
        rows = conv2d(values.flatten(0, 1).unsqueeze(1), window.view(1, 1, -1, 1))
        return conv2d(rows, window.view(1, 1, 1, -1)).view(*values.shape[:2], *counted.shape[-2:])

    x, y = edited.double(), source.double()
    mean_x, mean_y = blurred(x), blurred(y)
    variance_x, variance_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return ((similarity * counted).sum() / (3 * counted.sum())).item()
