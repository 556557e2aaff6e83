"""Two real blocks of HunyuanVideo, one of two streams and one of one, with LoRA, and inputs for them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from editrl.policies.hunyuan_video.transformer import HunyuanVideoEditTransformer3DModel

LAYERS = r"(single_)?transformer_blocks\.\d+\..*(to_[qkv]|to_out\.0|to_add_out|add_[qkv]_proj|proj_mlp|proj_out|net\.2)"


@pytest.fixture
def transformer():
    """() -> a transformer of two blocks of each kind, hidden size 64; with `lora` those layers carry adapters."""

    def make(lora: bool = True, dtype=torch.float32, **changes):
        torch.manual_seed(0)
        model = HunyuanVideoEditTransformer3DModel(
            **{
                "num_attention_heads": 4,
                "attention_head_dim": 16,
                "num_layers": 2,
                "num_single_layers": 2,
                "num_refiner_layers": 1,
                "text_embed_dim": 32,
                "pooled_projection_dim": 16,
                "rope_axes_dim": (4, 6, 6),
            }
            | changes
        ).to(dtype)
        model.requires_grad_(not lora)
        if lora:
            model = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=LAYERS))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        return model

    return make


@pytest.fixture
def inputs():
    """(dtype) -> arguments of a transformer's forward: one clip of 32 video tokens, 6 text tokens."""

    def make(dtype=torch.float32) -> dict:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(dtype)

        return {
            "hidden_states": draw(1, 32, 2, 8, 8),
            "timestep": torch.tensor([700.0]),
            "encoder_hidden_states": draw(1, 6, 32),
            "encoder_attention_mask": None,
            "pooled_projections": draw(1, 16),
            "guidance": torch.tensor([1000.0]),
            "return_dict": False,
        }

    return make
