"""Tiny CLIP models with random weights: one in transformers' format, one of open_clip, both on disk."""

import json
import string
from pathlib import Path

import open_clip
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

CONTEXT_LENGTH = 16


def save_tiny_clip(folder: Path, seed: int = 0) -> str:
    """A CLIPModel of 32-pixel images and a tokenizer that spells words letter by letter."""
    letters = string.ascii_lowercase
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CONTEXT_LENGTH).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    end = vocabulary["<|endoftext|>"]  # not 2: that id would switch CLIP to the pooling of its old checkpoints
    config = CLIPConfig(
        text_config=tower
        | {
            "vocab_size": len(tokens),
            "max_position_embeddings": CONTEXT_LENGTH,
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(seed)
    model = CLIPModel(config)
    for parameter in model.parameters():  # the default start is so small that all embeddings look alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> str:
    return save_tiny_clip(tmp_path_factory.mktemp("tiny_clip"))


@pytest.fixture(scope="session")
def tiny_open_clip(tmp_path_factory) -> str:
    """The spec of an open_clip model of 32-pixel images, with a checkpoint on disk."""
    folder = tmp_path_factory.mktemp("tiny_open_clip")
    name = "editrl-tiny"
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": CONTEXT_LENGTH, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
    }
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    checkpoint = folder / "weights.pt"
    torch.save(open_clip.create_model(name).state_dict(), checkpoint)
    return f"open_clip:{name}/{checkpoint}"


@pytest.fixture
def clips() -> list[torch.Tensor]:
    """Three clips of different lengths and sizes."""
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(f, 3, h, w, generator=generator) for f, h, w in [(5, 48, 64), (1, 40, 40), (9, 33, 70)]]
