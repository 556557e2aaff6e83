import open_clip
import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from editrl.errors import EditrlError
from editrl.reward import RewardSet
from editrl.rewards.clip import ClipFrameConsistency, ClipInstruction, ClipSourceFidelity

SOURCE_CAPTIONS = ["a red ball", "a cube", "two cones"]
TARGET_CAPTIONS = ["a blue ball", "a sphere", "a single cone"]


@pytest.fixture
def videos() -> list[torch.Tensor]:
    """Three clips of 5, 1 and 9 frames in the model's own size, so that no resize stands between us and plain CLIP."""
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(frames, 3, 32, 32, generator=generator) for frames in (5, 1, 9)]


@pytest.fixture
def sources(videos) -> list[torch.Tensor]:
    return [video.flip(-1) for video in videos]


def plain_clip(folder: str):
    """Unit vectors of frames and texts, by nothing but transformers."""
    model, tokenizer = CLIPModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessor.from_pretrained(folder)

    def frames(video):
        pixels = processor(video, do_rescale=False, return_tensors="pt").pixel_values
        return normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    def text(caption):
        return normalize(model.get_text_features(**tokenizer(caption, return_tensors="pt")).pooler_output, dim=-1)[0]

    return torch.no_grad()(frames), torch.no_grad()(text)


def plain_open_clip(spec: str):
    name, _, checkpoint = spec.removeprefix("open_clip:").partition("/")
    model = open_clip.create_model(name, pretrained=checkpoint).eval()
    tokenizer = open_clip.get_tokenizer(name)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    frames = torch.no_grad()(lambda video: normalize(model.encode_image((video - mean) / std), dim=-1))
    return frames, torch.no_grad()(lambda caption: normalize(model.encode_text(tokenizer([caption])), dim=-1)[0])


@pytest.fixture(params=["transformers", "open_clip"])
def backend(request, tiny_clip, tiny_open_clip):
    """(model spec, embed frames, embed text)"""
    if request.param == "transformers":
        return tiny_clip, *plain_clip(tiny_clip)
    return tiny_open_clip, *plain_open_clip(tiny_open_clip)


def test_instruction_reward_is_the_cosine_gained_on_the_source_caption(backend, videos):
    model, frames, text = backend
    wanted = [
        (frames(video) @ text(target)).mean().item() - (frames(video) @ text(source)).mean().item()
        for video, source, target in zip(videos, SOURCE_CAPTIONS, TARGET_CAPTIONS, strict=True)
    ]
    scores = ClipInstruction(model)(videos, SOURCE_CAPTIONS, TARGET_CAPTIONS)
    assert scores == pytest.approx(wanted, abs=1e-5)
    assert max(map(abs, scores)) > 1e-4


def test_instruction_reward_changes_sign_with_the_captions(tiny_clip, videos):
    reward = ClipInstruction(tiny_clip)
    forth = reward(videos, SOURCE_CAPTIONS, TARGET_CAPTIONS)
    back = reward(videos, TARGET_CAPTIONS, SOURCE_CAPTIONS)
    assert forth == pytest.approx([-score for score in back], abs=1e-6)


def test_source_fidelity_is_the_mean_cosine_of_aligned_frames(backend, videos, sources):
    model, frames, _ = backend
    wanted = [
        (frames(video) * frames(source)).sum(-1).mean().item() for video, source in zip(videos, sources, strict=True)
    ]
    assert ClipSourceFidelity(model)(videos, sources) == pytest.approx(wanted, abs=1e-5)


def test_an_unchanged_clip_has_fidelity_one(tiny_clip, videos):
    assert ClipSourceFidelity(tiny_clip)(videos, [video.clone() for video in videos]) == pytest.approx([1.0] * 3)


def test_fidelity_compares_frames_one_to_one(tiny_clip, videos):
    with pytest.raises(EditrlError, match="clip 2 has 9 frames, its source 8"):
        ClipSourceFidelity(tiny_clip)(videos, [*videos[:2], videos[2][:8]])


def test_the_last_frame_counts_unless_frames_are_sampled(tiny_clip, videos):
    changed = videos[2].clone()
    changed[-1] = 1 - changed[-1]
    captions = SOURCE_CAPTIONS[:1] * 2, TARGET_CAPTIONS[:1] * 2
    for reward, arguments in [
        (ClipInstruction(tiny_clip), captions),
        (ClipSourceFidelity(tiny_clip), ([videos[2]] * 2,)),
    ]:
        before, after = reward([videos[2], changed], *arguments)
        assert abs(before - after) > 1e-4
    before, after = ClipInstruction(tiny_clip, num_frames=1)([videos[2], changed], *captions)
    assert before == after  # only the middle frame is looked at


def test_sampled_frames_are_those_of_the_shorter_clip(tiny_clip, videos):
    sampled = ClipInstruction(tiny_clip, num_frames=3)([videos[2]], SOURCE_CAPTIONS[:1], TARGET_CAPTIONS[:1])
    picked = ClipInstruction(tiny_clip)([videos[2][[1, 4, 7]]], SOURCE_CAPTIONS[:1], TARGET_CAPTIONS[:1])
    assert sampled == pytest.approx(picked, abs=1e-6)


@pytest.mark.parametrize("reward", [ClipInstruction, ClipSourceFidelity])
def test_unknown_arguments_and_dtypes_are_refused(reward, tiny_clip):
    with pytest.raises(TypeError, match="frames"):
        reward(tiny_clip, frames=3)
    with pytest.raises(EditrlError, match="dtype is 'half'"):
        reward(tiny_clip, dtype="half").to("cpu")


def test_weights_are_loaded_when_they_are_needed(tmp_path):
    reward = ClipInstruction(str(tmp_path / "later"))  # nothing there yet: .to(device) is what loads
    with pytest.raises(EditrlError, match="hf download"):
        reward.to("cpu")


# --- the other forms, and consistency in time


def test_the_full_form_has_four_terms(backend, videos, sources):
    model, frames, text = backend
    wanted = []
    for video, other, source, target in zip(videos, sources, SOURCE_CAPTIONS, TARGET_CAPTIONS, strict=True):
        edited_target, edited_source = ((frames(video) @ text(t)).mean().item() for t in (target, source))
        source_target, source_source = ((frames(other) @ text(t)).mean().item() for t in (target, source))
        wanted.append((edited_target - source_target) + (source_source - edited_source))
    reward = ClipInstruction(model, form="full")
    assert reward(videos, SOURCE_CAPTIONS, TARGET_CAPTIONS, sources) == pytest.approx(wanted, abs=1e-5)
    assert reward(videos, SOURCE_CAPTIONS, TARGET_CAPTIONS, videos) == [0, 0, 0]


def test_the_directional_form_is_the_cosine_of_both_changes(backend, videos, sources):
    model, frames, text = backend
    wanted = [
        torch.cosine_similarity(frames(video) - frames(other), (text(target) - text(source))[None]).mean().item()
        for video, other, source, target in zip(videos, sources, SOURCE_CAPTIONS, TARGET_CAPTIONS, strict=True)
    ]
    reward = ClipInstruction(model, form="directional")
    assert reward(videos, SOURCE_CAPTIONS, TARGET_CAPTIONS, sources) == pytest.approx(wanted, abs=1e-4)
    assert reward(videos, SOURCE_CAPTIONS, TARGET_CAPTIONS, videos) == [0, 0, 0]  # unchanged
    assert reward(videos, TARGET_CAPTIONS, TARGET_CAPTIONS, sources) == [None] * 3  # no change wanted
    with pytest.raises(EditrlError, match="clip 2 has 9 frames, its source 8"):
        reward(videos, SOURCE_CAPTIONS, TARGET_CAPTIONS, [*sources[:2], sources[2][:8]])


def test_a_form_says_what_it_needs(tiny_clip):
    captions = {"source_captions", "target_captions"}
    assert RewardSet([ClipInstruction(tiny_clip)]).requires == captions
    assert RewardSet([ClipInstruction(tiny_clip, form="full")]).requires == captions | {"source_videos"}
    with pytest.raises(EditrlError, match=r"form of clip_instruction is 'direction'.*Did you mean 'directional'"):
        ClipInstruction(tiny_clip, form="direction")


def test_frame_consistency_is_the_mean_cosine_of_neighbours(backend, videos):
    model, frames, _ = backend
    embedded = [frames(video) for video in videos]
    wanted = [torch.cosine_similarity(part[1:], part[:-1]).mean().item() for part in embedded]
    scores = ClipFrameConsistency(model)(videos)
    assert scores[1] is None  # an image
    assert [scores[0], scores[2]] == pytest.approx([wanted[0], wanted[2]], abs=1e-5)
    assert ClipFrameConsistency(model)([videos[0][:1].expand(4, -1, -1, -1)]) == pytest.approx([1.0])
