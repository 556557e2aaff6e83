"""A policy seen through overlapping windows of a clip that is longer than it can take at once.

The windows are denoised together: at every step each gives a velocity, and where windows overlap the velocities are
blended linearly into one, so that all of them walk one path from one noise (as MultiDiffusion does over an image,
arXiv 2302.08113). Decoded frames are blended once more, because the decoder too sees where a window begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from editrl.data import EditExample
from editrl.errors import EditrlError
from editrl.policy import Conditions, FlowPolicy
from editrl.rollout import counter_noise


def windows(count: int, multiple: int, max_frames: int | None, overlap: int | None) -> tuple[int, list[int]]:
    """`(frames of a window, first frame of each)`: the fewest windows, all alike, evenly spread over `count` frames.

    Starts are multiples of `multiple`, so that the latent frames of neighbours, all but a window's first, are those of
    the same frames.
    """
    if max_frames is None or count <= max_frames:
        return count, [0]
    length = (max_frames - 1) // multiple * multiple + 1
    overlap = length // 4 if overlap is None else overlap
    # In latent frames, and rounded up. One frame is always shared: it is its own latent frame in the later window.
    stride = (length - 1) // multiple - max(-(-(overlap - 1) // multiple), 0)
    if stride < 1:
        raise EditrlError(
            f"windows of at most {max_frames} frames that share {overlap} do not advance; "
            f"give max_frames of at least {multiple + 1}, and an overlap of at most max_frames - {multiple}"
        )
    last = (count - length) // multiple
    steps = -(-last // stride)
    return length, [step * last // steps * multiple for step in range(steps + 1)]


class WindowedPolicy(FlowPolicy):
    """A policy on clips of one length, seen through windows of it. One window alone is the policy itself, to the bit.

    A video autoencoder gives the first frame of a clip a latent frame of its own, so every window but the first has one
    that the clip has not. These are denoised along: the latents here are the clip's [C,f,h,w] and then, in time, one of
    each further window.

    Args:
        policy: the editor.
        count: frames of a clip.
        length, starts: of the windows, from `windows`.
        on_forward: called after every forward of the transformer.
    """

    def __init__(
        self, policy: FlowPolicy, count: int, length: int, starts: Sequence[int], on_forward: Callable[[], None]
    ):
        self.policy, self.transformer = policy, policy.transformer
        self.frame_multiple, self.size_multiple = policy.frame_multiple, policy.size_multiple
        self.count, self.spans = count, [(start, start + length) for start in starts]
        self.on_forward = on_forward
        multiple = self.frame_multiple
        self.latent_count, window_count = (count - 1) // multiple + 1, (length - 1) // multiple + 1
        self.first_slots = [start // multiple for start in starts]
        spans = [(first + (first > 0), first + window_count) for first in self.first_slots]  # of the clip's latents
        self.slots = [
            [*([self.latent_count + index - 1] if index else []), *range(*span)] for index, span in enumerate(spans)
        ]
        own = torch.eye(len(starts))[:, 1:]
        self.weights = torch.cat([blend_weights(spans, self.latent_count), own], dim=1)

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def encode(self, examples: Sequence[EditExample], unconditional: bool = False) -> Conditions:
        """Conditions of one clip: a row a window."""
        [clip] = examples
        # One by one: all windows at once would need the memory that windows are there to save.
        return Conditions.concatenate(
            self.policy.encode([replace(clip, source=clip.source[slice(*span)])], unconditional=unconditional)
            for span in self.spans
        )

    def compact(self, conditions: Conditions) -> Conditions:
        return self.policy.compact(conditions)

    def latent_shape(self, conditions: Conditions) -> tuple[int, ...]:
        channels, _, *size = self.policy.latent_shape(conditions[:1])
        return channels, self.weights.shape[1], *size

    def noise(self, conditions: Conditions, seed: int) -> Tensor:
        """Initial noise [1,C,f+,h,w]: that of the clip in one piece, and for a window's own first latent frame that
        of the clip's latent frame there, so that both come out alike."""
        channels, _, *size = self.latent_shape(conditions)
        clip = counter_noise((channels, self.latent_count, *size), seed)
        return torch.cat([clip, clip[:, self.first_slots[1:]]], dim=1)[None]

    def velocity(
        self, transformer: nn.Module, latents: Tensor, sigma: Tensor | float, conditions: Conditions
    ) -> Tensor:
        velocity = torch.zeros_like(latents)
        for row, (slots, weights) in enumerate(zip(self.slots, self.weights, strict=True)):
            part = self.policy.velocity(transformer, latents[:, :, slots], sigma, conditions[row : row + 1])
            velocity[:, :, slots] += part * weights[slots].to(part).view(-1, 1, 1)
            self.on_forward()
        return velocity

    def decode(self, latents: Tensor) -> Tensor:
        video = None
        for slots, span, weights in zip(self.slots, self.spans, blend_weights(self.spans, self.count), strict=True):
            part = self.policy.decode(latents[:, :, slots]).cpu()
            if video is None:
                video = part.new_zeros(1, self.count, *part.shape[2:])
            video[:, slice(*span)] += part * weights[slice(*span)].view(-1, 1, 1, 1)
        return video


def blend_weights(spans: Sequence[tuple[int, int]], count: int) -> Tensor:
    """[spans, count]: what each span (start, stop) has of every position; linear where two overlap, and 1 together."""
    position = torch.arange(count)
    ramps = []
    for index, (start, stop) in enumerate(spans):
        rise = position - start + 1 if index > 0 else torch.full_like(position, count)
        fall = stop - position if index < len(spans) - 1 else torch.full_like(position, count)
        ramps.append(torch.minimum(rise, fall).clamp(min=0))
    weights = torch.stack(ramps).float()
    return weights / weights.sum(0)
