import gc
import shutil
import warnings

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from editrl.errors import EditrlError
from editrl.rewards import backbone as backbone_module
from editrl.rewards.backbone import (
    BackboneReward,
    _open_clip_preprocess,
    _processor_preprocess,
    frame_indices,
    load_backbone,
)

TEXTS = ["a red ball", "a blue cube", "a red ball"]


def smooth_frames(count: int, height: int, width: int) -> torch.Tensor:
    """uint8 [count,3,height,width] with edges and gradients, rather like a picture than like noise."""
    generator = torch.Generator().manual_seed(height * width)
    coarse = torch.rand(count, 3, 9, 12, generator=generator)
    frames = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    frames[:, :, height // 4 : height // 2, width // 3 : width // 2] = 1.0
    return (frames * 255).round().to(torch.uint8)


# --- embeddings


def test_frames_and_texts_embed_as_plain_transformers_does(tiny_clip):
    backbone = load_backbone(tiny_clip)
    frames = smooth_frames(4, 32, 32).float() / 255  # the model's own size: no resize, so no rounding in the way
    model, tokenizer = CLIPModel.from_pretrained(tiny_clip), AutoTokenizer.from_pretrained(tiny_clip)
    pixels = CLIPImageProcessor.from_pretrained(tiny_clip)(frames, do_rescale=False, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokenizer(TEXTS, padding=True, return_tensors="pt"), **pixels)
    torch.testing.assert_close(backbone.embed_frames(frames), output.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(backbone.embed_texts(TEXTS), output.text_embeds, atol=1e-5, rtol=0)
    assert backbone.logit_scale == model.logit_scale.item()


def test_pooler_output_of_transformers_is_the_projected_feature(tiny_clip):
    backbone = load_backbone(tiny_clip)
    model = backbone.model
    pixels = torch.rand(2, 3, 32, 32)
    projected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    torch.testing.assert_close(backbone.image_features(backbone.model, pixels), projected)


def test_frames_and_texts_embed_as_plain_open_clip_does(tiny_open_clip):
    backbone = load_backbone(tiny_open_clip)
    frames = smooth_frames(4, 32, 32)
    name, _, checkpoint = tiny_open_clip.removeprefix("open_clip:").partition("/")
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=checkpoint)
    images = torch.stack([transform(Image.fromarray(frame.permute(1, 2, 0).numpy())) for frame in frames])
    with torch.no_grad():
        wanted_frames = normalize(model.eval().encode_image(images), dim=-1)
        wanted_texts = normalize(model.encode_text(open_clip.get_tokenizer(name)(TEXTS)), dim=-1)
    torch.testing.assert_close(backbone.embed_frames(frames.float() / 255), wanted_frames, atol=1e-5, rtol=0)
    torch.testing.assert_close(backbone.embed_texts(TEXTS), wanted_texts, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fixture", ["tiny_clip", "tiny_open_clip"])
def test_embeddings_are_float32_unit_vectors_whatever_the_dtype(fixture, request, clips):
    exact = load_backbone(request.getfixturevalue(fixture))
    rounded = load_backbone(request.getfixturevalue(fixture), dtype="bfloat16")
    assert torch.bfloat16 in {parameter.dtype for parameter in rounded.model.parameters()}
    for ours, wanted in [
        (rounded.embed_frames(clips[0]), exact.embed_frames(clips[0])),
        (rounded.embed_texts(TEXTS), exact.embed_texts(TEXTS)),
    ]:
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.norm(dim=-1), torch.ones(len(ours)))
        assert (ours * wanted).sum(-1).min() > 0.99


@pytest.mark.parametrize("frames_per_forward", [1, 4, 256])
def test_clips_of_different_size_and_length_share_forwards(tiny_clip, clips, frames_per_forward):
    backbone = load_backbone(tiny_clip)
    together = backbone.embed_clips(clips, frames_per_forward=frames_per_forward)
    for clip, vectors in zip(clips, together, strict=True):
        torch.testing.assert_close(vectors, backbone.embed_frames(clip), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "clip",
    [torch.rand(3, 8, 8), torch.rand(2, 1, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.rand(0, 3, 8, 8)],
)
def test_a_clip_that_is_no_float_video_is_refused(tiny_clip, clip):
    with pytest.raises(EditrlError, match=r"clip 0 is .*\[F,3,H,W\]"):
        load_backbone(tiny_clip).embed_clips([clip])


def test_the_backbone_is_frozen(tiny_clip):
    backbone = load_backbone(tiny_clip)
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    assert not backbone.embed_frames(torch.rand(1, 3, 32, 32, requires_grad=True)).requires_grad


# --- preprocessing


@settings(max_examples=20, deadline=None)
@given(st.integers(60, 700), st.integers(60, 700))
@example(60, 64)  # 3 columns to cut away: one on the left here, two in open_clip
def test_preprocessing_agrees_with_the_transformers_processor(height, width):
    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    frames = smooth_frames(1, height, width)
    wanted = processor(frames, return_tensors="pt").pixel_values
    ours = _processor_preprocess(processor)(frames.float() / 255)
    assert ours.shape == wanted.shape
    assert (ours - wanted).abs().max() < 0.02  # one grey level, 1/255, is 0.015 after the division by std
    assert (ours - wanted).abs().mean() < 0.005


def test_preprocessing_agrees_with_the_processor_at_480p():
    processor = CLIPImageProcessor()
    frames = smooth_frames(1, 480, 832)
    difference = (
        _processor_preprocess(processor)(frames.float() / 255) - processor(frames, return_tensors="pt").pixel_values
    )
    assert difference.abs().max() < 0.017
    assert difference.abs().mean() < 0.005


@settings(max_examples=20, deadline=None)
@given(st.integers(60, 300), st.integers(60, 300), st.sampled_from(["shortest", "squash"]))
@example(60, 64, "shortest")
def test_preprocessing_agrees_with_the_open_clip_transform(height, width, resize_mode):
    config = open_clip.transform.PreprocessCfg(size=56, resize_mode=resize_mode)
    transform = open_clip.transform.image_transform_v2(config, is_train=False)
    # Away from black and white nothing overshoots: Pillow picks the order of the axes by size, and would cut otherwise.
    frames = smooth_frames(1, height, width) // 2 + 64
    wanted = transform(Image.fromarray(frames[0].permute(1, 2, 0).numpy()))
    ours = _open_clip_preprocess("spec", vars(config))(frames.float() / 255)[0]
    assert ours.shape == wanted.shape
    assert (ours - wanted).abs().max() < 0.02
    assert (ours - wanted).abs().mean() < 0.005


def test_an_open_clip_resize_that_we_lack_is_refused():
    with pytest.raises(EditrlError, match="'longest'"):
        _open_clip_preprocess("open_clip:x/y", {"size": 56, "resize_mode": "longest"})


# --- texts


@pytest.mark.parametrize("fixture", ["tiny_clip", "tiny_open_clip"])
def test_each_distinct_text_is_embedded_once(fixture, request):
    backbone = load_backbone(request.getfixturevalue(fixture))
    seen = []
    features, backbone.text_features = (
        backbone.text_features,
        lambda model, tokens: seen.append(len(tokens)) or features(model, tokens),
    )
    try:
        vectors = backbone.embed_texts(TEXTS)
    finally:
        backbone.text_features = features
    assert sum(seen) == 2
    torch.testing.assert_close(vectors[0], vectors[2], atol=0, rtol=0)
    assert not torch.allclose(vectors[0], vectors[1])


@pytest.mark.parametrize("fixture", ["tiny_clip", "tiny_open_clip"])
def test_a_text_beyond_the_context_is_cut_with_one_warning(fixture, request):
    spec = request.getfixturevalue(fixture)
    backbone_module._loaded.clear()  # a fresh backbone, which has not warned yet
    backbone = load_backbone(spec)
    fits = " ".join("abcdefghijklmn")  # 14 one-letter words, start and end: exactly 16 tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = backbone.embed_texts([fits])
    with pytest.warns(UserWarning, match="16 tokens.*cut off") as caught:
        cut = backbone.embed_texts(["short", fits + " o p q"])
        backbone.embed_texts([fits + " z"])
    assert len(caught) == 1
    torch.testing.assert_close(cut[1], exact[0], atol=1e-6, rtol=0)


def test_a_missing_text_is_refused(tiny_clip):
    with pytest.raises(EditrlError, match="text 1 is None: every sample needs a caption"):
        load_backbone(tiny_clip).embed_texts(["a", None])


# --- loading


def test_equal_arguments_share_the_weights_and_free_them(tiny_clip):
    one = load_backbone(tiny_clip, dtype="float16")
    assert load_backbone(tiny_clip, torch.device("cpu"), "float16") is one
    assert load_backbone(tiny_clip, dtype="float32") is not one
    key = one.key
    loaded = backbone_module._loaded
    assert key in loaded
    del one
    gc.collect()
    assert key not in loaded


def test_a_model_that_is_not_there_says_how_to_get_it(tmp_path):
    missing = str(tmp_path / "nowhere")
    with pytest.raises(EditrlError, match=r"cannot load CLIPModel from .*hf download .*folder") as caught:
        load_backbone(missing)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("open_clip:ViT-L-14", r"names no weights: write open_clip:ViT-L-14/<tag"),
        ("open_clip:ViT-L-14/no_such_tag", r"cannot load .*tags of this architecture: openai, .*pass a path"),
        ("open_clip:NoSuchModel/openai", r"cannot load 'open_clip:NoSuchModel/openai'"),
        ("open_clip:local-dir:nowhere", r"cannot load 'open_clip:local-dir:nowhere'"),
    ],
)
def test_an_open_clip_spec_that_leads_nowhere_says_so(spec, message):
    with pytest.raises(EditrlError, match=message) as caught:
        load_backbone(spec)
    assert "\n" not in str(caught.value)


def test_an_open_clip_tag_brings_its_own_gelu(monkeypatch, tiny_open_clip):
    # open_clip goes on with the wrong activation after a warning; a tag says which one its weights were trained with.
    asked = {}
    create_model = open_clip.create_model
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"quick_gelu": True})
    monkeypatch.setattr(
        open_clip, "create_model", lambda *args, **kwargs: asked.update(kwargs) or create_model(*args, **kwargs)
    )
    load_backbone(tiny_open_clip, dtype="float16")
    assert asked["force_quick_gelu"] is True


def test_an_incomplete_checkpoint_is_refused(tiny_clip, tmp_path):
    from safetensors.torch import load_file, save_file

    CLIPModel.from_pretrained(tiny_clip).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EditrlError, match=r"lacks 1 weights .*'visual_projection.weight'"):
        load_backbone(str(tmp_path), processor=tiny_clip)


def test_a_folder_without_tokenizer_is_refused(tiny_clip, tmp_path):
    CLIPModel.from_pretrained(tiny_clip).save_pretrained(tmp_path)
    CLIPImageProcessor.from_pretrained(tiny_clip).save_pretrained(tmp_path)
    with pytest.raises(EditrlError, match="tokenizer"):
        load_backbone(str(tmp_path))


def test_an_unknown_dtype_is_refused(tiny_clip):
    with pytest.raises(EditrlError, match=r"dtype is 'bfloat61'.*Did you mean 'bfloat16'\?"):
        load_backbone(tiny_clip, dtype="bfloat61")


def test_weights_are_loaded_whole_while_zero3_is_configured(tiny_clip, monkeypatch):
    from transformers.integrations import deepspeed

    class ZeRO3:
        config = {}  # noqa: RUF012

        def is_zero3(self):
            return True

    config = ZeRO3()  # held: transformers keeps only a weak reference
    deepspeed.set_hf_deepspeed_config(config)
    try:
        backbone = load_backbone(tiny_clip, dtype="float16", processor=tiny_clip + "/")
        assert deepspeed.is_deepspeed_zero3_enabled()  # for the policy, it is still on
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert not any(hasattr(parameter, "ds_id") for parameter in backbone.model.parameters())


# --- frame policy and memo


@given(st.integers(1, 200), st.integers(1, 200))
def test_sampled_frames_are_spread_evenly(count, num_frames):
    indices = frame_indices(count, num_frames)
    assert len(indices) == min(count, num_frames)
    assert indices[0] >= 0 and indices[-1] < count
    steps = np.diff(indices)
    assert len(steps) == 0 or (steps.min() >= 1 and steps.max() - steps.min() <= 1)


def test_whole_clip_by_default_and_the_middle_frame_for_one():
    assert frame_indices(5, None) == [0, 1, 2, 3, 4]
    assert frame_indices(5, 1) == [2]
    assert frame_indices(33, 3) == [5, 16, 27]


@pytest.mark.parametrize("argument", ["num_frames", "frames_per_forward"])
def test_counts_below_one_are_refused(argument):
    with pytest.raises(EditrlError, match=f"{argument} of BackboneReward is 0"):
        BackboneReward(**{argument: 0})


def test_the_same_tensor_is_embedded_once_and_equal_tensors_are_not_confused(tiny_clip):
    reward = BackboneReward(tiny_clip)
    source = torch.rand(5, 3, 32, 32)
    other = torch.rand(5, 3, 32, 32)
    frames = []
    hook = reward.backbone.model.vision_model.register_forward_hook(lambda *args: frames.append(len(args[2][0])))
    try:
        cache = {}
        first = reward.embed_clips([source, source, other, source], cache)
        again = reward.embed_clips([other, source], cache)
    finally:
        hook.remove()
    assert frames == [10]
    torch.testing.assert_close(again, [first[2], first[0]], atol=0, rtol=0)
    assert not torch.allclose(first[0], first[2])


# --- moving


def test_a_model_is_moved_not_loaded_again(tiny_clip, tmp_path):
    shutil.copytree(tiny_clip, tmp_path / "clip")
    reward = BackboneReward(str(tmp_path / "clip")).to("cpu")
    first = reward.backbone
    shutil.rmtree(tmp_path / "clip")  # nothing left to load
    reward.to("meta")
    assert reward.backbone.device.type == "meta" and first.device.type == "cpu"
    assert {weight.device.type for weight in reward.backbone.model.parameters()} == {"meta"}
    assert {weight.device.type for weight in first.model.parameters()} == {"cpu"}
    reward.to("cpu")
    assert reward.backbone is first  # somebody still holds it


def test_a_moved_model_gives_the_same_embeddings(tiny_clip, clips):
    reward = BackboneReward(tiny_clip).to("cpu")
    before = reward.backbone.embed_clips(clips), reward.backbone.embed_texts(["a ball"])
    moved = backbone_module._copied(reward.backbone, reward.backbone.key)
    assert moved.model is not reward.backbone.model
    after = moved.embed_clips(clips), moved.embed_texts(["a ball"])
    for one, other in zip([*before[0], before[1]], [*after[0], after[1]], strict=True):
        assert torch.equal(one, other)
