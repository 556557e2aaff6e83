"""CLIP rewards of VIVA's Edit-GRPO (arXiv 2512.16906): does the edit follow the instruction, does it keep the source?

C(a, b) is the cosine of CLIP embeddings, averaged over the frames of the whole clip (or `num_frames` of them).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from editrl.errors import EditrlError, did_you_mean
from editrl.registry import register_reward
from editrl.rewards.backbone import BackboneReward, clip_means

FORMS = ("delta", "full", "directional")


@register_reward("clip_instruction")
class ClipInstruction(BackboneReward):
    """R_IF = C(edited, target caption) - C(edited, source caption): how far the clip moved towards the wanted text.

    Needs captions of the source and of the wanted result (not the instruction). `form`:

    - "delta", as above. Range [-2, 2]; 0 is "no nearer to one than to the other". The terms of the full delta that do
      not depend on the edited clip are the same for a whole group, so they are left out.
    - "full", VIVA's four terms: (C(edited, target caption) - C(source, target caption)) + (C(source, source caption) -
      C(edited, source caption)). Range [-4, 4]; 0 for an unchanged clip, so values compare between groups.
    - "directional", the cosine of the change in the image and the change in the text (StyleGAN-NADA, arXiv 2108.00946),
      mean over frames at the same time. Range [-1, 1]; an unchanged frame points nowhere and counts 0. None where both
      captions mean the same to CLIP.

    Other arguments: see `BackboneReward`. The last two forms need the source clips as well.
    """

    name = "clip_instruction"

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        *,
        form: str = "delta",
        num_frames: int | None = None,
        dtype: str = "float32",
        frames_per_forward: int = 256,
        processor: str | None = None,
    ):
        super().__init__(
            model, num_frames=num_frames, dtype=dtype, frames_per_forward=frames_per_forward, processor=processor
        )
        if form not in FORMS:
            near = did_you_mean(str(form), FORMS)
            raise EditrlError(f"form of clip_instruction is {form!r}: choose one of {', '.join(FORMS)}.{near}")
        self.form = form
        sources = set() if form == "delta" else {"source_videos"}
        self.requires = {"source_captions", "target_captions"} | sources

    def __call__(
        self,
        videos: Sequence[Tensor],
        source_captions: Sequence[str],
        target_captions: Sequence[str],
        source_videos: Sequence[Tensor] | None = None,
        cache: dict | None = None,
        **kwargs,
    ) -> list[float | None]:
        """N clips [F,3,H,W] in [0,1], their captions and, for two forms, their sources -> N floats."""
        wanted, unwanted = self.backbone.embed_texts([*target_captions, *source_captions]).chunk(2)
        change = wanted - unwanted
        if self.form == "directional":
            require_same_length(videos, source_videos)
        edited = self.embed_clips(videos, cache)
        if self.form == "delta":
            return clip_means(edited, change.split(1))
        sources = self.embed_clips(source_videos, cache)
        if self.form == "full":
            gained, had = clip_means(edited, change.split(1)), clip_means(sources, change.split(1))
            return [one - other for one, other in zip(gained, had, strict=True)]
        moves = [normalize(clip - source, dim=-1) for clip, source in zip(edited, sources, strict=True)]
        scores = clip_means(moves, normalize(change, dim=-1).split(1))
        applies = (change.norm(dim=-1) > torch.finfo(torch.float16).eps).tolist()
        return [score if known else None for score, known in zip(scores, applies, strict=True)]


@register_reward("clip_frame_consistency")
class ClipFrameConsistency(BackboneReward):
    """Mean cosine of neighbouring frames' image embeddings: does the clip hold together in time? None for images.

    The temporal consistency of Gen-1 (arXiv 2302.03011) and EditVerseBench. Range [-1, 1]; 1 for a still clip, so never
    train on it alone.
    """

    name = "clip_frame_consistency"

    def __call__(self, videos: Sequence[Tensor], cache: dict | None = None, **kwargs) -> list[float | None]:
        """N clips [F,3,H,W] in [0,1] -> N floats; None for a clip of one frame (or `num_frames=1`)."""
        frames = self.embed_clips(videos, cache)
        return [(part[1:] * part[:-1]).sum(-1).mean().item() if len(part) > 1 else None for part in frames]


@register_reward("clip_source_fidelity")
class ClipSourceFidelity(BackboneReward):
    """R_SP = C(source, edited): the mean cosine of frames at the same time in both clips. Range [-1, 1].

    Highest for an unchanged clip: never train on it alone.
    """

    name = "clip_source_fidelity"

    def __call__(
        self, videos: Sequence[Tensor], source_videos: Sequence[Tensor], cache: dict | None = None, **kwargs
    ) -> list[float]:
        """N clips [F,3,H,W] in [0,1] and their sources, of as many frames -> N floats."""
        require_same_length(videos, source_videos)
        return clip_means(self.embed_clips(videos, cache), self.embed_clips(source_videos, cache))


def require_same_length(videos: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """EditrlError for a clip that has another number of frames than its source."""
    for i, (edited, source) in enumerate(zip(videos, sources, strict=True)):
        if len(edited) != len(source):
            raise EditrlError(
                f"clip {i} has {len(edited)} frames, its source {len(source)}: frames are compared one to one, so "
                "give both the same number."
            )
