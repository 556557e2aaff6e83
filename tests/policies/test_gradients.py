"""Gradients of the transformer through the attention kernel of GPUs, against those of a CPU in float32."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from editrl.policies.hunyuan_video.transformer import HunyuanVideoEditTransformer3DModel
from editrl.speed import prepare_transformer

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DIM = 128  # the head size of the 13B model, which is what kernels are chosen by
SMALL, FULL = ((5, 16, 24), 24), ((9, 60, 104), 400)  # latent grid, instructor tokens


def transformer(heads: int = 2) -> HunyuanVideoEditTransformer3DModel:
    """Of two blocks of both kinds: what one kind leaves behind must not reach the other."""
    torch.manual_seed(0)
    model = HunyuanVideoEditTransformer3DModel(
        in_channels=4,
        out_channels=4,
        source_channels=4,
        num_attention_heads=heads,
        attention_head_dim=DIM,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=16,
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def gradients(model: HunyuanVideoEditTransformer3DModel, device: str, size=SMALL) -> dict[str, torch.Tensor]:
    """Of every weight of the blocks, for one clip without padding."""
    grid, text = size
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(1, 8, *grid, generator=generator),
        "encoder_hidden_states": torch.randn(1, text, 32, generator=generator),
        "pooled_projections": torch.randn(1, 16, generator=generator),
        "timestep": torch.tensor([700.0]),
        "guidance": torch.tensor([1000.0]),
    }
    inputs = {name: value.to(device) for name, value in inputs.items()}
    around = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()
    with around:
        velocity = model(**inputs, encoder_attention_mask=None).sample
    target = torch.randn(velocity.shape, generator=generator).to(device)
    (velocity.float() - target).square().mean().backward()
    return {
        name: parameter.grad.cpu()
        for name, parameter in model.named_parameters()
        if "transformer_blocks" in name and parameter.grad is not None
    }


def agree(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Up to the rounding of bfloat16."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 0.05 * value.norm() + 1e-7, name


@needs_cuda
@pytest.mark.parametrize("how", ["eager", "checkpointed", "compiled", "compiled, activations kept"])
def test_gradients_through_cudnn_attention_are_those_of_a_cpu(how):
    model = transformer()
    expected = gradients(model, "cpu")
    model.zero_grad()
    model.cuda()
    prepare_transformer(
        model,
        compiled="compiled" in how,
        checkpointed=how in ("checkpointed", "compiled"),
        activation_memory=1 if "kept" in how else None,
    )
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        for _ in range(2):  # the second time with the kernels planned by the first
            model.zero_grad()
            found = gradients(model, "cuda")
    agree(found, expected)


@needs_cuda
def test_gradients_at_full_size_are_those_of_another_kernel():
    """Where one kind of block gave cuDNN a part of a wider gradient, and the other a whole one, it read beyond."""
    model = transformer(heads=24).cuda()
    found = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        model.zero_grad()
        with sdpa_kernel(backend):
            found[backend] = gradients(model, "cuda", FULL)
    agree(found[SDPBackend.CUDNN_ATTENTION], found[SDPBackend.FLASH_ATTENTION])


def test_attention_gets_gradients_in_the_layout_of_its_outputs(monkeypatch):
    """What `DenseGradient` is for: a part of a wider gradient is what cuDNN did not bear at full size."""
    seen = []

    def watched(query, key, value, **kwargs):
        found = attention(query, key, value, **kwargs)
        found.register_hook(lambda gradient: seen.append((gradient.stride(), query.stride())))
        return found

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    gradients(transformer(), "cpu")
    assert len(seen) >= 4
    for of_gradient, of_query in seen:
        assert of_gradient == of_query
