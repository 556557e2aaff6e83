"""HunyuanVideo's transformer with source latents: at the start it is the stock model, and it can learn to look."""

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from editrl.errors import EditrlError
from editrl.policies.hunyuan_video.transformer import (
    HunyuanVideoEditTransformer3DModel,
    JoinedSingleTransformerBlock,
    rope_of_joined,
)

CHANNELS = 16
SHAPE = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
    "pooled_projection_dim": 20,
    "rope_axes_dim": (4, 6, 6),
}
WIDTH = SHAPE["num_attention_heads"] * SHAPE["attention_head_dim"]
NEW_LAYERS = {"x_embedder.source_proj.weight", "x_embedder.source_proj.bias", "x_embedder.projector.weight"}


def stock(in_channels: int = CHANNELS) -> HunyuanVideoTransformer3DModel:
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(in_channels=in_channels, **SHAPE).eval()


def editor() -> HunyuanVideoEditTransformer3DModel:
    """Another seed than `stock`, so that nothing is equal by accident."""
    torch.manual_seed(1)
    return HunyuanVideoEditTransformer3DModel(**SHAPE).eval()


def editor_of(text_to_video: HunyuanVideoTransformer3DModel) -> HunyuanVideoEditTransformer3DModel:
    model = editor()
    model.load_state_dict(text_to_video.state_dict(), strict=False)
    return model


def perturbed(model: HunyuanVideoEditTransformer3DModel) -> HunyuanVideoEditTransformer3DModel:
    """`model` whose projector is no longer the one of the start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in NEW_LAYERS:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs() -> dict[str, Tensor]:
    """Two samples, of which the second has padded tokens; `hidden_states` are the noisy latents alone."""
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(2, CHANNELS, 2, 4, 6, generator=generator),
        "timestep": torch.tensor([900.0, 317.5]),
        "encoder_hidden_states": torch.randn(2, 7, SHAPE["text_embed_dim"], generator=generator),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "pooled_projections": torch.randn(2, SHAPE["pooled_projection_dim"], generator=generator),
        "guidance": torch.tensor([6000.0, 1000.0]),
    }


def source_latents(seed: int = 4) -> Tensor:
    return torch.randn(2, CHANNELS, 2, 4, 6, generator=torch.Generator().manual_seed(seed))


def edit(model: HunyuanVideoEditTransformer3DModel, source: Tensor) -> Tensor:
    """Velocity with the source on channels, after the noise."""
    given = inputs()
    given["hidden_states"] = torch.cat([given["hidden_states"], source], dim=1)
    return model(**given).sample


def test_only_the_source_embedding_and_the_projector_are_new():
    result = editor().load_state_dict(stock().state_dict(), strict=False)
    assert set(result.missing_keys) == NEW_LAYERS
    assert result.unexpected_keys == []


@torch.no_grad()
def test_at_the_start_the_editor_is_the_stock_model_whatever_the_source():
    text_to_video = stock()
    model = editor_of(text_to_video)
    expected = text_to_video(**inputs()).sample
    for seed in (4, 5):
        torch.testing.assert_close(edit(model, source_latents(seed)), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_with_another_projector_the_output_depends_on_the_source():
    model = perturbed(editor())
    assert (edit(model, source_latents(4)) - edit(model, source_latents(5))).abs().max() > 1e-3


def test_gradients_reach_the_source_half_at_once_and_the_source_embedding_after_one_step():
    model = editor()
    embedder = model.x_embedder
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for update in range(2):
        optimizer.zero_grad()
        edit(model, source_latents()).square().mean().backward()
        assert embedder.projector.weight.grad[:, WIDTH:].abs().max() > 0
        # The source embedding sits behind the zero half of the projector, which the first step fills.
        assert (embedder.source_proj.weight.grad.abs().max() > 0) == (update == 1)
        optimizer.step()


@pytest.mark.parametrize("model", [editor(), perturbed(editor())], ids=["at the start", "perturbed"])
@torch.no_grad()
def test_save_and_load_return_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = HunyuanVideoEditTransformer3DModel.from_pretrained(tmp_path)
    assert loaded.config.source_channels == CHANNELS
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert torch.equal(edit(loaded.eval(), source_latents()), edit(model, source_latents()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_text_to_video_checkpoint_loads_as_an_editor_at_its_start(dtype, tmp_path):
    text_to_video = stock()
    text_to_video.save_pretrained(tmp_path)
    model = HunyuanVideoEditTransformer3DModel.from_pretrained(tmp_path, torch_dtype=dtype).eval()
    assert not [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    embedder = model.x_embedder
    assert torch.equal(embedder.projector.weight.float(), torch.eye(WIDTH, 2 * WIDTH))
    # As `Conv3d` draws it: anything, but neither zero (no gradient would ever arrive) nor left-over memory.
    bound = (CHANNELS * 2 * 2) ** -0.5
    for parameter in embedder.source_proj.parameters():
        assert 0.2 * bound < parameter.float().std() < bound
        assert parameter.abs().max() <= 1.01 * bound
    for name, value in text_to_video.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.to(dtype)), name
    if dtype == torch.float32:
        torch.testing.assert_close(edit(model, source_latents()), text_to_video(**inputs()).sample, rtol=0, atol=1e-6)


@torch.no_grad()
def test_projector_and_embeddings_fuse_into_a_stock_model_of_more_channels():
    """Both are linear: P [Wn xn + bn; Ws xs + bs] = [Pn Wn, Ps Ws] [xn; xs] + Pn bn + Ps bs."""
    model = perturbed(editor_of(stock()))
    embedder = model.x_embedder
    of_noise, of_source = embedder.projector.weight.split(WIDTH, dim=1)
    fused = stock(in_channels=2 * CHANNELS)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("x_embedder.")}
    state["x_embedder.proj.weight"] = torch.cat(
        [
            torch.einsum("de,echij->dchij", of_noise, embedder.proj.weight),
            torch.einsum("de,echij->dchij", of_source, embedder.source_proj.weight),
        ],
        dim=1,
    )
    state["x_embedder.proj.bias"] = of_noise @ embedder.proj.bias + of_source @ embedder.source_proj.bias
    fused.load_state_dict(state)
    given = inputs()
    given["hidden_states"] = torch.cat([given["hidden_states"], source_latents()], dim=1)
    torch.testing.assert_close(fused(**given).sample, edit(model, source_latents()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [("lacks", "lacks 1 weights, the first is proj_out.bias"), ("more", "has the unknown weight other")],
)
def test_a_checkpoint_of_another_model_is_refused(change, message, tmp_path):
    """diffusers would leave the weight as the memory was, with a warning."""
    editor().save_pretrained(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    state = load_file(file)
    state = (
        {k: v for k, v in state.items() if k != "proj_out.bias"}
        if change == "lacks"
        else state | {"other": torch.zeros(1)}
    )
    save_file(state, file)
    with pytest.raises(EditrlError, match=message):
        HunyuanVideoEditTransformer3DModel.from_pretrained(tmp_path)


def test_joined_tokens_give_what_parted_ones_give():
    torch.manual_seed(5)
    block = JoinedSingleTransformerBlock(2, 16, 4.0, "rms_norm").requires_grad_(False)
    video, text = torch.randn(2, 12, WIDTH), torch.randn(2, 7, WIDTH)
    temb, rope = torch.randn(2, WIDTH), (torch.rand(12, 16), torch.rand(12, 16))
    mask = torch.arange(19)[None, None, None] < torch.tensor([19, 15])[:, None, None, None]
    parted = [video.clone().requires_grad_(), text.clone().requires_grad_()]
    joined = torch.cat([video, text], dim=1).requires_grad_()
    expected = torch.cat(block(*parted, temb, mask, rope), dim=1)
    found, nothing = block(joined, None, temb, mask, rope_of_joined(rope, 7))
    assert nothing is None
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for output in (found, expected):
        output.square().sum().backward()
    torch.testing.assert_close(joined.grad, torch.cat([part.grad for part in parted], dim=1))
