"""Editors of real size with random weights, as folders in Hub layout: what a benchmark loads and runs.

`full` is HunyuanVideo-13B with LLaVA-LLaMA-3-8B, CLIP-L and the VAE at their configurations; `tiny` are the same
classes at toy size, so that every benchmark also runs on a CPU. Tokenizers are those of the embedded world: what a
random model reads does not matter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip import CLIPImageProcessor

from editrl.recipes.shapes import WEIGHTS

TRANSFORMER = {
    "full": {},  # the class' defaults are HunyuanVideo-13B
    "tiny": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "text_embed_dim": 64,
        "pooled_projection_dim": 48,
        "rope_axes_dim": (4, 6, 6),
    },
}
VAE = {"full": {}, "tiny": {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 2}}
LLAMA = {
    "full": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128320,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    },
}
VISION = {
    "full": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
}
CLIP = {
    "full": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "tiny": {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}


REWARD_CLIPS = {
    "full": {  # ViT-L/14, and ViT-H/14 as PickScore's
        "clip": ((768, 12, 3072, 12), (1024, 16, 4096, 24), 768, (224, 14)),
        "pickscore": ((1024, 16, 4096, 24), (1280, 16, 5120, 32), 1024, (224, 14)),
    },
    "tiny": {
        "clip": ((32, 2, 64, 2), (32, 2, 64, 2), 16, (28, 14)),
        "pickscore": ((32, 2, 64, 2), (32, 2, 64, 2), 16, (28, 14)),
    },
}
"""Name -> text tower and image tower (width, heads, feed-forward, layers), embedding, (image size, patch)."""


def write_rewards(folder: Path, size: str, device: str) -> None:
    """Write the CLIP models of VIVA's rewards, with random weights, into `folder`; those that are there are kept."""
    for name, (text, vision, embedding, (image, patch)) in REWARD_CLIPS[size].items():
        if (folder / name / "config.json").exists():
            continue
        tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / name)

        def tower(width, heads, wide, layers):
            return {
                "hidden_size": width,
                "num_attention_heads": heads,
                "intermediate_size": wide,
                "num_hidden_layers": layers,
            }

        config = CLIPConfig(
            text_config=tower(*text) | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
            vision_config=tower(*vision) | {"image_size": image, "patch_size": patch},
            projection_dim=embedding,
        )
        with torch.device(device):
            model = CLIPModel(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        side = {"height": image, "width": image}
        CLIPImageProcessor(size={"shortest_edge": image}, crop_size=side).save_pretrained(folder / name)


def write_editor(folder: Path, size: str, device: str, dtype: torch.dtype) -> None:
    """Write an editor of `size` ("full" or "tiny") into `folder`, part by part; parts that are there are kept.

    The transformer is written as HunyuanVideo's text-to-video checkpoint, which a real run starts from.
    """
    diffusers_logging.disable_progress_bar()
    base = WEIGHTS / "sft"
    image_token = json.loads((base / "vlm" / "config.json").read_text())["image_token_index"]
    builders = {
        "transformer": lambda: HunyuanVideoTransformer3DModel(**TRANSFORMER[size]),
        "vae": lambda: AutoencoderKLHunyuanVideo(**VAE[size]),
        "vlm": lambda: LlavaForConditionalGeneration(
            LlavaConfig(
                text_config={"model_type": "llama", **LLAMA[size]},
                vision_config={"model_type": "clip_vision_model", **VISION[size]},
                image_token_index=image_token,
            )
        ),
        "text_encoder_2": lambda: CLIPTextModel(CLIPTextConfig(**CLIP[size])),
    }
    for name, build in builders.items():
        if (folder / name / "config.json").exists():
            continue
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # 13 B parameters in float32 first would be 52 GB
        try:
            with torch.device(device):
                model = build()
        finally:
            torch.set_default_dtype(before)
        model.save_pretrained(folder / name)
        del model
    processor = LlavaProcessor.from_pretrained(base / "processor")
    side = VISION[size]["image_size"]
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        processor.tokenizer,
        patch_size=VISION[size]["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
    ).save_pretrained(folder / "processor")
    AutoTokenizer.from_pretrained(base / "tokenizer_2").save_pretrained(folder / "tokenizer_2")


if __name__ == "__main__":
    write_editor(Path(sys.argv[1]), sys.argv[2], sys.argv[3], getattr(torch, sys.argv[4]))
