"""Weights between this library and stock diffusers: fused, as an adapter, and loaded from either."""

import json
import logging

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from editrl.errors import EditrlError
from editrl.policies.hunyuan_video.loading import stream_transformer
from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy
from editrl.policies.hunyuan_video.transformer import HunyuanVideoEditTransformer3DModel
from editrl.policies.hunyuan_video.weights import fuse, load_adapter, save_diffusers_adapter
from editrl.recipes.shapes import WEIGHTS

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
    "pooled_projection_dim": 20,
    "rope_axes_dim": (4, 6, 6),
}
MIDDLE = TINY | {
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "num_layers": 3,
    "num_single_layers": 4,
    "num_refiner_layers": 2,
    "rope_axes_dim": (8, 28, 28),
}
TARGETS = ["to_q", "to_k", "add_q_proj", "proj_mlp", "ff.net.2"]


def editor(shape=TINY, seed=0) -> HunyuanVideoEditTransformer3DModel:
    """With a source path that is no longer the one of the start."""
    torch.manual_seed(seed)
    model = HunyuanVideoEditTransformer3DModel(**shape).eval()
    with torch.no_grad():
        model.x_embedder.projector.weight.add_(0.1 * torch.randn_like(model.x_embedder.projector.weight))
    return model


def with_lora(model: HunyuanVideoEditTransformer3DModel, **changes) -> PeftModel:
    config = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS} | changes
    adapted = get_peft_model(model, LoraConfig(**config)).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return adapted


@torch.no_grad()
def output(model, shape=TINY, size=(2, 4, 6)) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return model(
        hidden_states=torch.randn(2, 32, *size, generator=generator),
        timestep=torch.tensor([900.0, 317.5]),
        encoder_hidden_states=torch.randn(2, 7, shape["text_embed_dim"], generator=generator),
        encoder_attention_mask=torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        pooled_projections=torch.randn(2, shape["pooled_projection_dim"], generator=generator),
        guidance=torch.tensor([6000.0, 1000.0]),
    ).sample


# -- fused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [TINY, MIDDLE], ids=["tiny", "middle"])
def test_a_fused_transformer_is_a_stock_one_of_the_same_function(shape, tmp_path):
    model = editor(shape)
    stock = fuse(model)
    assert type(stock) is HunyuanVideoTransformer3DModel
    assert stock.config.in_channels == 32
    assert stock.config.out_channels == 16
    torch.testing.assert_close(output(stock, shape), output(model, shape), rtol=0, atol=2e-6)
    stock.save_pretrained(tmp_path)
    loaded = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(output(loaded, shape), output(stock, shape))


def test_a_fused_transformer_takes_no_second_copy_of_the_blocks():
    model = editor()
    own = {parameter.data_ptr() for parameter in model.parameters()}
    new = [name for name, parameter in fuse(model).named_parameters() if parameter.data_ptr() not in own]
    assert sorted(new) == ["x_embedder.proj.bias", "x_embedder.proj.weight"]


@pytest.mark.parametrize("shape", [TINY, MIDDLE], ids=["tiny", "middle"])
def test_at_the_start_the_editor_is_the_text_to_video_model(shape, tmp_path, caplog):
    torch.manual_seed(0)
    stock = HunyuanVideoTransformer3DModel(in_channels=16, **shape).eval()
    stock.save_pretrained(tmp_path)
    loaded = HunyuanVideoEditTransformer3DModel.from_pretrained(tmp_path).eval()
    generator = torch.Generator().manual_seed(5)
    given = {
        "timestep": torch.tensor([700.0]),
        "encoder_hidden_states": torch.randn(1, 5, shape["text_embed_dim"], generator=generator),
        "encoder_attention_mask": torch.ones(1, 5, dtype=torch.long),
        "pooled_projections": torch.randn(1, shape["pooled_projection_dim"], generator=generator),
        "guidance": torch.tensor([1000.0]),
    }
    noise, source = (torch.randn(1, 16, 2, 4, 6, generator=generator) for _ in range(2))
    with torch.no_grad():
        expected = stock(hidden_states=noise, **given).sample
        found = loaded(hidden_states=torch.cat([noise, source], dim=1), **given).sample
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_a_lora_of_this_library_loads_in_a_stock_pipeline(tmp_path):
    """Trained on our transformer, loaded by `load_lora_weights` onto the fused one: the same output."""
    base = editor()
    adapted = with_lora(base, alpha_pattern={"proj_mlp": 8})
    expected = output(adapted)
    save_diffusers_adapter(adapted, tmp_path)
    policy = HunyuanVideoPolicy.from_pretrained(str(WEIGHTS / "sft"))
    pipe = HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=fuse(editor()),
        vae=policy.vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=policy.text_encoder,
        tokenizer_2=policy.tokenizer,
    )
    without = output(pipe.transformer)
    pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(output(pipe.transformer), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(without, expected, atol=1e-3)


@pytest.mark.parametrize("kind", ["peft", "diffusers", "diffusers file", "diffusers without metadata"])
def test_adapters_of_both_formats_load(kind, tmp_path):
    adapted = with_lora(editor(), **({"lora_alpha": 4} if kind.endswith("metadata") else {}))
    path = tmp_path
    if kind == "peft":
        adapted.save_pretrained(tmp_path)
    else:
        save_diffusers_adapter(adapted, tmp_path)
        file = tmp_path / "pytorch_lora_weights.safetensors"
        if kind == "diffusers file":
            path = file
        if kind.endswith("metadata"):
            save_file(load_file(file), file)
    loaded = load_adapter(editor(), path).eval()
    assert isinstance(loaded, PeftModel)
    torch.testing.assert_close(output(loaded), output(adapted), rtol=0, atol=1e-6)
    trainable = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    with loaded.disable_adapter():
        torch.testing.assert_close(output(loaded), output(editor()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["peft", "diffusers"])
@pytest.mark.parametrize(
    "other", [TINY | {"attention_head_dim": 32, "rope_axes_dim": (8, 12, 12)}, TINY | {"num_single_layers": 2}]
)
def test_an_adapter_of_another_base_is_refused(kind, other, tmp_path):
    adapted = with_lora(editor())
    adapted.save_pretrained(tmp_path) if kind == "peft" else save_diffusers_adapter(adapted, tmp_path)
    if kind == "diffusers" and other["num_single_layers"] == 2:
        pytest.skip("its file names each layer, and those it names are there")
    with pytest.raises(EditrlError, match=r"base model"):
        load_adapter(editor(other), tmp_path)


def test_a_folder_without_an_adapter_is_named(tmp_path):
    with pytest.raises(EditrlError, match=r"is no adapter: it has neither adapter_config\.json"):
        load_adapter(editor(), tmp_path)


def test_a_lora_on_the_source_path_has_no_stock_form(tmp_path):
    adapted = with_lora(editor(), target_modules=["x_embedder.projector", "to_q"])
    with pytest.raises(EditrlError, match=r"source path .*export the whole transformer"):
        save_diffusers_adapter(adapted, tmp_path)


# -- loading an editor -------------------------------------------------------------------------------------------------

EDITOR = str(WEIGHTS / "sft")


def test_an_editor_loads_with_an_adapter(tmp_path):
    policy = HunyuanVideoPolicy.from_pretrained(EDITOR)
    adapted = with_lora(policy.transformer, target_modules=["to_q"])
    adapted.save_pretrained(tmp_path)
    loaded = HunyuanVideoPolicy.from_pretrained(EDITOR, adapter=str(tmp_path))
    assert isinstance(loaded.transformer, PeftModel)
    ours, theirs = (
        {name: value for name, value in model.state_dict().items() if "lora_" in name}
        for model in (adapted, loaded.transformer)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_text_to_video_checkpoint_says_what_is_new(tmp_path, caplog):
    policy = HunyuanVideoPolicy.from_pretrained(EDITOR)
    stock = HunyuanVideoTransformer3DModel.from_config(
        {k: v for k, v in policy.transformer.config.items() if k != "source_channels"}
    )
    stock.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "editrl"):
        HunyuanVideoPolicy.from_pretrained(EDITOR, transformer=str(tmp_path))
    assert "no editor yet; new, and to be trained: x_embedder." in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "editrl"):
        HunyuanVideoPolicy.from_pretrained(EDITOR)
    assert "no editor yet" not in caplog.text


def same_weights(one, other) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_can_be_streamed_to_a_device(dtype):
    placed = HunyuanVideoPolicy.from_pretrained(EDITOR, device="cpu", dtype=dtype)
    plain = HunyuanVideoPolicy.from_pretrained(EDITOR, dtype=dtype)
    assert same_weights(placed.transformer, plain.transformer)


def test_a_sharded_text_to_video_checkpoint_can_be_streamed(tmp_path):
    torch.manual_seed(0)
    stock = HunyuanVideoTransformer3DModel(in_channels=16, **TINY)
    stock.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    streamed = stream_transformer(str(tmp_path), None, torch.float32, "cpu")
    torch.manual_seed(1)
    plain = HunyuanVideoEditTransformer3DModel.from_pretrained(tmp_path)
    assert streamed.started_anew == plain.started_anew
    for name, value in stock.state_dict().items():
        assert torch.equal(streamed.state_dict()[name], value), name
    torch.testing.assert_close(output(streamed), output(plain), rtol=0, atol=1e-6)


def test_a_stream_that_lacks_a_weight_or_has_another_says_which(tmp_path):
    editor().save_pretrained(tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    state = load_file(file)
    lacking = {name: value for name, value in state.items() if name != "proj_out.weight"}
    save_file(lacking, file)
    with pytest.raises(EditrlError, match=r"lacks 1 weights, the first is proj_out.weight"):
        stream_transformer(str(tmp_path), None, torch.float32, "cpu")
    save_file(state | {"other": torch.zeros(1)}, file)
    with pytest.raises(EditrlError, match=r"has the weight 'other', which a HunyuanVideo transformer does not have"):
        stream_transformer(str(tmp_path), None, torch.float32, "cpu")


def test_without_encoders_an_editor_has_none_and_says_so():
    policy = HunyuanVideoPolicy.from_pretrained(EDITOR, encoders=False)
    assert policy.frozen_modules() == [policy.vae]
    with pytest.raises(EditrlError, match=r"loaded without its encoders .*conditions_cache"):
        policy.encode([])
    with pytest.raises(EditrlError, match="no whole editor to save"):
        policy.save_pretrained("unused")
    assert policy.settings() == HunyuanVideoPolicy.from_pretrained(EDITOR).settings(), "known without the VLM"
    changed = HunyuanVideoPolicy.from_pretrained(EDITOR, encoders=False, hidden_layer=-1)
    assert changed.fingerprint() != policy.fingerprint(), "cached conditions of another layer are not its own"


def test_a_vlm_of_another_width_is_refused(tmp_path):
    config = json.loads((WEIGHTS / "sft" / "transformer" / "config.json").read_text())
    other = HunyuanVideoEditTransformer3DModel(
        **{k: v for k, v in config.items() if not k.startswith("_")} | {"text_embed_dim": 40}
    )
    other.save_pretrained(tmp_path)
    with pytest.raises(EditrlError, match=r"VLM's tokens have \d+ channels, the transformer's text_embed_dim is 40"):
        HunyuanVideoPolicy.from_pretrained(EDITOR, transformer=str(tmp_path))
