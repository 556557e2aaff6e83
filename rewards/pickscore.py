"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): a CLIP-H tuned on which of two images people picked."""

import math
from collections.abc import Sequence

from torch import Tensor

from editrl.registry import register_reward
from editrl.rewards.backbone import BackboneReward, clip_means

DEFAULT_MODEL = "yuvalkirstain/PickScore_v1"
DEFAULT_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # PickScore's repository has the weights only


@register_reward("pickscore")
class PickScore(BackboneReward):
    """R_PS: human preference of the edited frames for the target caption, exp(logit_scale) * cosine / 26, frame mean.

    The 26 is the scale that RL work on images uses. `processor` is the folder or Hub id of tokenizer and preprocessing;
    left out, it is the one that PickScore_v1 was trained with, or the model's own folder for any other model.
    """

    name = "pickscore"

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        num_frames: int | None = None,
        dtype: str = "float32",
        frames_per_forward: int = 256,
        processor: str | None = None,
    ):
        if processor is None and model == DEFAULT_MODEL:
            processor = DEFAULT_PROCESSOR
        super().__init__(
            model, num_frames=num_frames, dtype=dtype, frames_per_forward=frames_per_forward, processor=processor
        )

    def __call__(
        self, videos: Sequence[Tensor], target_captions: Sequence[str], cache: dict | None = None, **kwargs
    ) -> list[float]:
        """N clips [F,3,H,W] in [0,1] and the captions of the wanted results -> N floats."""
        texts = self.backbone.embed_texts(target_captions)
        scale = math.exp(self.backbone.logit_scale) / 26
        return [scale * cosine for cosine in clip_means(self.embed_clips(videos, cache), texts.split(1))]
