"""The shapes of an editor without its weights, for predicting what training it takes."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoRotaryPosEmbed
from torch import nn

from editrl.errors import EditrlError
from editrl.policies.hunyuan_video.transformer import HunyuanVideoEditTransformer3DModel

INSTRUCTOR_TOKENS = 600
"""One picture of 576 tokens and an instruction."""

VAE = (4, 8)
"""Frames and pixels that become one latent cell."""


def sketch_transformer(*locations: str | None) -> tuple[nn.Module, str]:
    """A transformer on the meta device, of the first location with a configuration, and where it is from.

    `locations`: folders, or Hub ids that were downloaded, with or without the subfolder `transformer`. Where none has
    one it is HunyuanVideo-13B, whose shapes are the class' defaults.
    """
    with torch.device("meta"):
        for location in filter(None, locations):
            for subfolder in ("transformer", None):
                try:
                    config = HunyuanVideoEditTransformer3DModel.load_config(
                        location, subfolder=subfolder, local_files_only=True
                    )
                except (OSError, ValueError):
                    continue
                return HunyuanVideoEditTransformer3DModel.from_config(config), str(location)
        return HunyuanVideoEditTransformer3DModel(), "HunyuanVideo-13B, since no configuration was found here"


def block_inputs(
    transformer: nn.Module,
    frames: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    text_tokens: int = INSTRUCTOR_TOKENS,
) -> tuple:
    """What a block is given for one clip, on the meta device."""
    config = transformer.config
    if (frames - 1) % VAE[0] or height % (VAE[1] * config.patch_size) or width % (VAE[1] * config.patch_size):
        raise EditrlError(
            f"a clip of {frames} frames of {height}x{width} is none of this model: give 4k+1 frames, and a height and "
            f"width that are multiples of {VAE[1] * config.patch_size}"
        )
    latent = ((frames - 1) // VAE[0] + 1, height // VAE[1], width // VAE[1])
    hidden = config.num_attention_heads * config.attention_head_dim
    grid = (latent[0] // config.patch_size_t, *(size // config.patch_size for size in latent[1:]))
    tokens = grid[0] * grid[1] * grid[2]
    with torch.device("meta"):
        video, text, temb = (
            torch.empty(*shape, dtype=dtype) for shape in ((1, tokens, hidden), (1, text_tokens, hidden), (1, hidden))
        )
        rope: HunyuanVideoRotaryPosEmbed = transformer.rope
        rotation = rope(torch.empty(1, 1, *latent))
    return video, text, temb, None, rotation, None, grid[1] * grid[2]
