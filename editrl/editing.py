"""Edit one clip of any length and any size with a policy, whose own clips have `frame_multiple * k + 1` frames of sides
that divide by `size_multiple`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from editrl.data import EditExample
from editrl.data import fit as cover
from editrl.errors import EditrlError
from editrl.flow import sigma_schedule
from editrl.policy import FlowPolicy
from editrl.rollout import rollout
from editrl.windows import WindowedPolicy, windows

FRAMES = ("cut", "refuse", "repeat")
FITS = ("crop", "pad", "stretch")


def edit_clip(
    policy: FlowPolicy,
    source: Tensor,
    instruction: str,
    *,
    reference_image: Tensor | None = None,
    num_inference_steps: int = 50,
    shift: float | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
    true_cfg_scale: float = 1.0,
    ode_solver: str = "euler",
    frames: str = "cut",
    size: tuple[int, int] | int | None = None,
    fit: str = "crop",
    max_frames: int | None = None,
    overlap: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Edit a clip [F,3,H,W] float32 in [0,1] (an image is one frame) into [F',3,H',W'] float32 in [0,1] on the CPU.

    Args:
        policy: any editor; its `transformer` is what runs.
        reference_image: [3,h,w] or [1,3,h,w] in [0,1].
        num_inference_steps, ode_solver, true_cfg_scale: as in `editrl.rollout.edit_examples`.
        shift: timestep shift; None: the policy's for the size that it sees.
        seed: of the initial noise, at least 0. A clip that needs no window and no other length or size is edited as
            by `edit_examples` with the noise key (seed,).
        guidance_scale: embedded guidance, for a policy that has it; None leaves the policy's own.
        frames: what becomes of a length that is not `frame_multiple * k + 1`. "cut": the frames over are left out, and
            F' is the largest such length. "refuse": an error. "repeat": the last frame is repeated for the model and
            the repetitions are dropped from its result, F' = F.
        size: what the model sees. None: the nearest size that divides by `size_multiple`. A number: the shorter side,
            shape kept. A pair (height, width): exactly this; `fit` says how.
        fit: into a pair. "crop": covered and cut at the centre; the result keeps this size. "pad": the whole picture,
            its edges repeated around it. "stretch": height and width scaled apart. But for "crop", padding is removed
            and H', W' = H, W.
        max_frames: frames that the model sees at once; longer clips are edited in overlapping windows. None: all.
        overlap: frames that neighbouring windows share, at least; None: a quarter of a window.
        progress: called as (done, all) after every forward of the transformer.

    Raises:
        EditrlError: a source of another form, or a setting that the policy or the clip cannot have.
    """
    source = _as_clip(source)
    count = edited_frames(len(source), policy.frame_multiple, frames)
    length, starts = windows(count, policy.frame_multiple, max_frames, overlap)
    placement = Placement.of(source.shape[-2:], policy.size_multiple, size, fit)
    shift = policy.shift_for(*placement.model) if shift is None else shift
    forwards = num_inference_steps * len(starts) * (1 if true_cfg_scale == 1 else 2)
    windowed = WindowedPolicy(policy, count, length, starts, _counter(progress, forwards))
    last = source[-1:].expand(max(count - len(source), 0), -1, -1, -1)
    example = EditExample(
        id="clip",
        instruction=instruction,
        source=placement.enter(torch.cat([source[:count], last])),
        reference_image=None if reference_image is None else _as_clip(reference_image),
    )
    with _embedded_guidance(policy, guidance_scale), torch.no_grad():
        conditions = windowed.encode([example]).to(policy.device)
        unconditional = None
        if true_cfg_scale != 1:
            unconditional = windowed.encode([example], unconditional=True).to(policy.device)
        trajectory = rollout(
            windowed,
            policy.transformer,
            conditions,
            sigmas=sigma_schedule(num_inference_steps, shift),
            initial_noise=windowed.noise(conditions, seed),
            ode_solver=ode_solver,
            unconditional=unconditional,
            true_cfg_scale=true_cfg_scale,
        )
        [edited] = windowed.decode(trajectory.clean)
    return placement.leave(edited[: len(source)])


def edited_frames(count: int, multiple: int, frames: str = "cut") -> int:
    """How many frames the model sees of a clip of `count`: `multiple * k + 1`, more than `count` with "repeat"."""
    if frames not in FRAMES:
        raise EditrlError(f"frames is {frames!r}; use one of {', '.join(FRAMES)}")
    below = (count - 1) // multiple * multiple + 1
    if below == count or frames == "cut":
        return below
    if frames == "repeat":
        return below + multiple
    raise EditrlError(
        f"the clip has {count} frames, which is not {multiple}k+1; cut it to {below}, or let frames be cut or repeat"
    )


@dataclass
class Placement:
    """How pictures of one size are shown to the model, and how its pictures come back to that size."""

    source: tuple[int, int]
    """(height, width) of the source."""
    model: tuple[int, int]
    """(height, width) that the model sees."""
    inner: tuple[int, int]
    """(height, width) of the source's picture within it; the rest is padding."""
    crop: bool

    @classmethod
    def of(cls, source: Sequence[int], multiple: int, size: tuple[int, int] | int | None, fit: str) -> Placement:
        """Of a source (height, width), by the rules of `edit_clip`."""
        source = int(source[0]), int(source[1])
        if fit not in FITS:
            raise EditrlError(f"fit is {fit!r}; use one of {', '.join(FITS)}")
        if size is None or isinstance(size, int):
            scale = 1 if size is None else size / min(source)
            near = [max(round(side * scale / multiple), 1) * multiple for side in source]
            return cls(source, (near[0], near[1]), (near[0], near[1]), crop=False)
        height, width = check_size(size, multiple)
        inner = height, width
        if fit == "pad":
            scale = min(height / source[0], width / source[1])
            inner = max(round(source[0] * scale), 1), max(round(source[1] * scale), 1)
        return cls(source, (height, width), inner, crop=fit == "crop")

    def enter(self, video: Tensor) -> Tensor:
        """[F,3,H,W] of the source's size -> the model's."""
        if self.crop:
            return cover(video, *self.model)
        top, left = self._corner()
        below, right = self.model[0] - self.inner[0] - top, self.model[1] - self.inner[1] - left
        return pad(resize(video, self.inner), (left, right, top, below), mode="replicate")

    def leave(self, video: Tensor) -> Tensor:
        """[F,3,h,w] of the model's size -> the source's; what was cropped away does not come back."""
        if self.crop:
            return video
        top, left = self._corner()
        return resize(video[..., top : top + self.inner[0], left : left + self.inner[1]], self.source)

    def _corner(self) -> tuple[int, int]:
        return (self.model[0] - self.inner[0]) // 2, (self.model[1] - self.inner[1]) // 2


def check_size(size: Sequence[int], multiple: int) -> tuple[int, int]:
    """(height, width) that the model can see, or an EditrlError."""
    height, width = size
    if height < 1 or width < 1 or height % multiple or width % multiple:
        raise EditrlError(f"height x width: {height}x{width} is not divisible by {multiple}; give sides that are")
    return height, width


def resize(video: Tensor, size: tuple[int, int]) -> Tensor:
    """[F,3,h,w] in [0,1] scaled to (height, width), whatever its shape."""
    if tuple(video.shape[-2:]) == size:
        return video
    return interpolate(video, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def side_by_side(source: Tensor, edited: Tensor) -> Tensor:
    """Source | edit [F',3,H',2W'], for a source [F,3,H,W] and its edit [F',3,H',W'] by `edit_clip`."""
    return torch.cat([cover(source[: len(edited)].float(), *edited.shape[-2:]), edited], dim=-1)


def _as_clip(video: Tensor) -> Tensor:
    """[F,3,H,W] float32, of that or of a picture [3,H,W]."""
    video = video[None] if video.dim() == 3 else video
    if video.dim() != 4 or video.shape[1] != 3 or not video.numel():
        raise EditrlError(f"a clip is [frames, 3, height, width], this tensor is {list(video.shape)}; permute it")
    if not video.is_floating_point() or not (video.min() >= 0 and video.max() <= 1):  # NaN fails too
        raise EditrlError(
            f"a clip is floating point in [0, 1], this one {video.dtype}, {video.min()} to {video.max()}; scale it"
        )
    return video.float().cpu()


def _counter(progress: Callable[[int, int], None] | None, forwards: int) -> Callable[[], None]:
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, forwards)

    return count


@contextlib.contextmanager
def _embedded_guidance(policy: FlowPolicy, scale: float | None) -> Iterator[None]:
    """The policy's `guidance_scale` is `scale` for as long as this lasts."""
    if scale is None:
        yield
        return
    if not hasattr(policy, "guidance_scale"):
        raise EditrlError(f"{type(policy).__name__} has no embedded guidance; leave guidance_scale out")
    before, policy.guidance_scale = policy.guidance_scale, scale
    try:
        yield
    finally:
        policy.guidance_scale = before
