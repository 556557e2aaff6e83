"""LAION's aesthetic predictors: how much people like a picture, read off its CLIP ViT-L/14 embedding."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear

from editrl.errors import UNREADABLE, EditrlError
from editrl.registry import register_reward
from editrl.rewards.backbone import BackboneReward

HOW_TO_GET = (
    "download sac+logos+ava1-l14-linearMSE.pth (github.com/christophschuhmann/improved-aesthetic-predictor) or "
    "sa_0_4_vit_l_14_linear.pth (github.com/LAION-AI/aesthetic-predictor) and pass its path as `weights`"
)


@register_reward("aesthetic")
class Aesthetic(BackboneReward):
    """Aesthetic score of LAION's predictors, mean over the frames; about 1 to 10, higher is nicer.

    `weights` is the file of the head, in its published layout: `layers.<n>.weight|bias`, the improved predictor's five
    linear layers 768-1024-128-64-16-1 (what lies between them is dropout, so there is none at inference), or
    `weight|bias`, one linear layer. Its input is the unit-length image embedding of `model`, which must be the CLIP
    that the head was trained on, OpenAI's ViT-L/14. Knows nothing of the instruction: never train on it alone.
    """

    name = "aesthetic"

    def __init__(
        self,
        weights: str | None = None,
        model: str = "openai/clip-vit-large-patch14",
        *,
        num_frames: int | None = None,
        dtype: str = "float32",
        frames_per_forward: int = 256,
        processor: str | None = None,
    ):
        super().__init__(
            model, num_frames=num_frames, dtype=dtype, frames_per_forward=frames_per_forward, processor=processor
        )
        self.head = read_head(weights)

    def __call__(self, videos: Sequence[Tensor], cache: dict | None = None, **kwargs) -> list[float]:
        """N clips [F,3,H,W] in [0,1] -> N floats."""
        return [self._score(frames).mean().item() for frames in self.embed_clips(videos, cache)]

    def _score(self, values: Tensor) -> Tensor:
        """[f,D] -> [f,1]"""
        if values.shape[1] != self.head[0][0].shape[1]:
            raise EditrlError(
                f"the aesthetic head reads {self.head[0][0].shape[1]} numbers, '{self.model}' gives {values.shape[1]}: "
                "pass the CLIP that it was trained on as `model`."
            )
        for weight, bias in self.head:
            values = linear(values, weight.to(values.device), bias.to(values.device))
        return values


def read_head(path: str | None) -> list[tuple[Tensor, Tensor]]:
    """The linear layers of a head, (weight [out,in], bias [out]) each, float32. EditrlError for any other file."""
    if path is None or not Path(path).expanduser().is_file():
        missing = "has no weights" if path is None else f"finds no file '{path}'"
        raise EditrlError(f"the reward 'aesthetic' {missing}: {HOW_TO_GET}.")
    file = Path(path).expanduser()
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        names = sorted({name.rpartition(".")[0] for name in state}, key=lambda name: int(name.rpartition(".")[2] or 0))
        prefixes = [f"{name}." if name else "" for name in names]
        layers = [(state[f"{prefix}weight"].float(), state[f"{prefix}bias"].float()) for prefix in prefixes]
    except (*UNREADABLE, SafetensorError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise EditrlError(f"'{path}' is no aesthetic head ({type(error).__name__}: {error}): {HOW_TO_GET}.") from error
    widths = [weight.shape[0] for weight, _ in layers]
    if not layers or widths[-1] != 1 or [weight.shape[1] for weight, _ in layers[1:]] != widths[:-1]:
        shapes = [list(weight.shape) for weight, _ in layers]
        raise EditrlError(f"'{path}' is no aesthetic head: its layers {shapes} do not end in one number. {HOW_TO_GET}.")
    return layers
