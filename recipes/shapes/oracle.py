"""The judge of the embedded world: it knows every scene's truth, so it measures what learned rewards only estimate.

Each edited quadrant is compared with renderings of all 36 shapes (3 forms × 6 colours × 2 sizes) on that quadrant's
trajectory and with the empty quadrant; an edited background with the 4 backgrounds. An edit succeeds when everything
that was edited is nearest to what was asked. Size counts for "add" alone, where the instruction names it.

Use it as the upper bound of a learning experiment or to evaluate one; as a reward it needs the column "scene".
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from editrl.errors import EditrlError
from editrl.recipes.shapes.render import (
    coverage_table,
    edit_mask,
    from_quadrants,
    palette,
    render_states,
    scene_states,
    slot_coverage,
    to_quadrants,
)
from editrl.recipes.shapes.scenes import BACKGROUNDS, COLOURS, FRAMES, RESOLUTION, SIZES, EditScene

CLIP_SHAPE = (FRAMES, 3, RESOLUTION, RESOLUTION)
MAX_PSNR = 60.0


def shape_distances(quadrants: Tensor, paths: Tensor, background: Tensor) -> Tensor:
    """Mean squared error of quadrants [P,F,3,16,16] to every rendering: [P,37], by (form, size, colour), empty last.

    paths [P,2]: the indices of the x and y velocity; background [P,3]: the colour behind the shape. A rendering is
    b + a(c - b) with coverage a, and |v - b - a(c - b)|² = |v - b|² - 2a(v - b)·(c - b) + a²|c - b|², so no rendering
    is ever drawn. In float64: the terms cancel, and autocast and TF32 leave it alone.
    """
    quadrants, background = quadrants.double(), background.double()
    coverage = coverage_table(quadrants.device)[1:, :, paths[:, 0], paths[:, 1]]  # [form, size, P, F, 16, 16]
    coverage = coverage.flatten(0, 1).transpose(0, 1).flatten(2).double()  # [P, 6, pixels]
    above = quadrants.transpose(1, 2).flatten(2) - background[:, :, None]  # [P, 3, pixels]
    contrast = palette(COLOURS, quadrants.device) - background[:, None]  # [P, colour, 3]
    overlap = coverage @ above.mT @ contrast.mT  # [P, 6, colour]
    energy = coverage.square().sum(-1)[:, :, None] * contrast.square().sum(-1)[:, None]
    empty = above.square().sum((1, 2))[:, None]
    filled = empty + (energy - 2 * overlap).flatten(1)
    return torch.cat([filled, empty], 1).clamp(min=0) / above[0].numel()


def background_distances(videos: Tensor, region: Tensor) -> Tensor:
    """Mean squared error of videos [N,F,3,H,W] to each plain background inside region [N,F,1,H,W] bool: [N,4]."""
    count = region.sum((1, 2, 3, 4)).clamp(min=1)[:, None]
    mean = (videos * region).sum((1, 3, 4)).double() / count
    mean_square = (videos.square() * region).sum((1, 2, 3, 4))[:, None] / count
    colours = palette(BACKGROUNDS, videos.device).double()
    return (mean_square - 2 * mean @ colours.T + colours.square().sum(-1)).clamp(min=0) / 3


def _contrast(distances: Tensor, right: Tensor) -> Tensor:
    """(nearest wrong - nearest right) / (their sum) of squared distances [P,K], right [P,K] bool: [P] in [-1,1]."""
    target = distances.masked_fill(~right, torch.inf).amin(1)
    wrong = distances.masked_fill(right, torch.inf).amin(1)
    return ((wrong - target) / (wrong + target).clamp(min=1e-12)).float()


def _right_shapes(target_states: Tensor, exact_size: Tensor) -> Tensor:
    """Which of the 37 renderings fulfil the target state [P,5]: bool [P,37]; any size, unless exact_size [P]."""
    form, colour, size = target_states[:, 0], target_states[:, 1], target_states[:, 2]
    grid = torch.zeros(len(form), len(SIZES), 37, dtype=torch.bool, device=form.device)
    for candidate_size in range(len(SIZES)):
        index = ((form - 1) * len(SIZES) + candidate_size) * len(COLOURS) + colour
        index = torch.where(form == 0, 36, index)
        allowed = ~exact_size | (form == 0) | (size == candidate_size)
        grid[:, candidate_size].scatter_(1, index[:, None], allowed[:, None])
    return grid.any(1)


def _clips(videos: Tensor | Sequence[Tensor], count: int) -> Tensor:
    for index, video in enumerate(videos):
        if tuple(video.shape) != CLIP_SHAPE:
            shape = list(video.shape)
            raise EditrlError(f"oracle: video {index} is {shape}; clips of the embedded world are {list(CLIP_SHAPE)}.")
    if len(videos) != count:
        raise EditrlError(f"oracle: {len(videos)} videos but {count} scenes; give one scene for each video.")
    if not isinstance(videos, Tensor):
        videos = torch.stack(list(videos)) if videos else torch.zeros(0, *CLIP_SHAPE)
    videos = videos.float()
    finite = videos.isfinite().flatten(1).all(1)
    if not finite.all():
        raise EditrlError(
            f"oracle: video {int(finite.int().argmin())} has NaN or infinite values; it cannot be judged."
        )
    return videos


@torch.no_grad()
def score(videos: Tensor | Sequence[Tensor], scenes: Sequence[EditScene | dict]) -> dict[str, Tensor]:
    """Judge edited clips ([N,5,3,32,32] or a list of N) in [0,1] against their scenes, on the videos' device.

    Returns [N] tensors. `success`: bool. `margin` in [-1,1]: the least over the edited parts of
    (d_wrong - d_right) / (d_wrong + d_right), from the mean squared errors to the nearest wrong and the nearest right
    rendering; above 0 exactly when the edit succeeded. `preservation_psnr`: dB, at most 60, clip against source outside
    the edit mask. A scene object that appears many times is prepared once.
    Raises EditrlError for wrong shapes, lengths or values.
    """
    videos = _clips(videos, len(scenes))
    distinct = {id(scene): scene for scene in scenes}
    rank = {key: index for index, key in enumerate(distinct)}
    unique = [scene if isinstance(scene, EditScene) else EditScene.from_dict(scene) for scene in distinct.values()]
    of_clip = torch.tensor([rank[id(scene)] for scene in scenes], dtype=torch.long, device=videos.device)

    states = scene_states(unique, videos.device)
    source, target = states["source"], states["target"]
    old_background, new_background = states["source_background"], states["target_background"]
    background_edited = old_background != new_background
    source_clips = render_states(source, old_background)
    mask = edit_mask(source, target, background_edited)

    # A part is one edited quadrant of one clip.
    clip, slot = (source != target).any(-1)[of_clip].nonzero(as_tuple=True)
    scene = of_clip[clip]
    before, after = source[scene, slot], target[scene, slot]
    added = before[:, 0] == 0
    paths = torch.where(added[:, None], after, before)[:, 3:]
    behind = palette(BACKGROUNDS, videos.device)[new_background[scene]]
    margin = torch.ones(len(videos), device=videos.device)
    if len(clip):
        distances = shape_distances(to_quadrants(videos)[clip, slot], paths, behind)
        margin.scatter_reduce_(0, clip, _contrast(distances, _right_shapes(after, added)), "amin")

    clip = background_edited[of_clip].nonzero().squeeze(1)
    if len(clip):
        scene = of_clip[clip]
        shapes = slot_coverage(source[scene]) + slot_coverage(target[scene])
        open_ground = from_quadrants(shapes.unsqueeze(3)) == 0
        right = F.one_hot(new_background[scene], len(BACKGROUNDS)).bool()
        part = _contrast(background_distances(videos[clip], open_ground), right)
        margin.scatter_reduce_(0, clip, part, "amin")

    keep = ~mask[of_clip]
    errors = (videos - source_clips[of_clip].float() / 255).square() * keep
    mean_error = errors.sum((1, 2, 3, 4)) / (3 * keep.sum((1, 2, 3, 4))).clamp(min=1)
    psnr = -10 * mean_error.clamp(min=10 ** (-MAX_PSNR / 10)).log10()
    return {"success": margin > 0, "margin": margin, "preservation_psnr": psnr}


def _shared_scores(videos: Sequence[Tensor], scenes: Sequence[dict], cache: dict | None) -> dict[str, Tensor]:
    """One `score` for all oracle rewards of a scoring call."""
    cache = {} if cache is None else cache
    asked = [*videos, *scenes]
    key = ("editrl.recipes.shapes.oracle", *map(id, asked))
    if key not in cache:
        cache[key] = (score(videos, scenes), asked)  # what is held here keeps its id to itself
    return cache[key][0]


def oracle_success(videos, scene, cache=None, **kwargs) -> list[float]:
    """1.0 where everything that was edited is nearest to what was asked, else 0.0. Reward convention."""
    return _shared_scores(videos, scene, cache)["success"].float().tolist()


def oracle_margin(videos, scene, cache=None, **kwargs) -> list[float]:
    """How clearly the worst edited part is right, in [-1,1]; above 0 is a success. Reward convention."""
    return _shared_scores(videos, scene, cache)["margin"].tolist()


def oracle_preservation(videos, scene, cache=None, **kwargs) -> list[float]:
    """PSNR in dB (at most 60) between source and clip outside the edit mask. Reward convention."""
    return _shared_scores(videos, scene, cache)["preservation_psnr"].tolist()
