"""CLIP rewards of VIVA's Edit-GRPO (arXiv 2512.16906): does the edit follow the instruction, does it keep the source?

C(a, b) is the cosine of CLIP embeddings, averaged over the frames of the whole clip (or `num_frames` of them).
"""

from collections.abc import Sequence

from torch import Tensor

from editrl.errors import EditrlError
from editrl.registry import register_reward
from editrl.rewards.backbone import BackboneReward, clip_means


@register_reward("clip_instruction")
class ClipInstruction(BackboneReward):
    """R_IF = C(edited, target caption) - C(edited, source caption): how far the clip moved towards the wanted text.

    Needs captions of the source and of the wanted result (not the instruction). Range [-2, 2]; 0 is "no nearer to one
    than to the other". The terms of the full delta that do not depend on the edited clip are the same for a whole
    group, so they are left out.
    """

    name = "clip_instruction"

    def __call__(
        self,
        videos: Sequence[Tensor],
        source_captions: Sequence[str],
        target_captions: Sequence[str],
        cache: dict | None = None,
        **kwargs,
    ) -> list[float]:
        """N clips [F,3,H,W] in [0,1] and their captions -> N floats."""
        wanted, unwanted = self.backbone.embed_texts([*target_captions, *source_captions]).chunk(2)
        frames = self.embed_clips(videos, cache)
        return clip_means(frames, (wanted - unwanted).split(1))


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
        for i, (edited, source) in enumerate(zip(videos, source_videos, strict=True)):
            if len(edited) != len(source):
                raise EditrlError(
                    f"clip {i} has {len(edited)} frames, its source {len(source)}: frames are compared one to one, so "
                    "give both the same number."
                )
        return clip_means(self.embed_clips(videos, cache), self.embed_clips(source_videos, cache))
