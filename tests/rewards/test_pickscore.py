import pytest
import torch
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from editrl.rewards import pickscore
from editrl.rewards.pickscore import PickScore

CAPTIONS = ["a blue ball", "a sphere"]


@pytest.fixture
def videos() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(frames, 3, 32, 32, generator=generator) for frames in (5, 2)]


def test_pickscore_is_the_scaled_cosine_over_26(tiny_clip, videos):
    model, tokenizer = CLIPModel.from_pretrained(tiny_clip), AutoTokenizer.from_pretrained(tiny_clip)
    processor = CLIPImageProcessor.from_pretrained(tiny_clip)
    wanted = []
    for video, caption in zip(videos, CAPTIONS, strict=True):
        images = processor(video, do_rescale=False, return_tensors="pt")
        with torch.no_grad():
            logits = model(**images, **tokenizer(caption, return_tensors="pt")).logits_per_image  # exp(scale) * cosine
        wanted.append(logits.mean().item() / 26)
    assert PickScore(tiny_clip)(videos, CAPTIONS) == pytest.approx(wanted, abs=1e-5)


def test_pickscore_looks_at_the_whole_clip(tiny_clip, videos):
    changed = videos[0].clone()
    changed[-1] = 1 - changed[-1]
    before, after = PickScore(tiny_clip)([videos[0], changed], CAPTIONS[:1] * 2)
    assert abs(before - after) > 1e-4


def test_tokenizer_and_preprocessing_may_lie_elsewhere(tiny_clip, tmp_path, videos):
    CLIPModel.from_pretrained(tiny_clip).save_pretrained(tmp_path)  # weights only, like PickScore's own repository
    apart = PickScore(str(tmp_path), processor=tiny_clip)(videos, CAPTIONS)
    assert apart == pytest.approx(PickScore(tiny_clip)(videos, CAPTIONS), abs=1e-6)


def test_the_default_processor_belongs_to_the_default_model_only(tiny_clip):
    assert PickScore().processor == pickscore.DEFAULT_PROCESSOR
    assert PickScore(tiny_clip).processor is None
    assert PickScore(processor=tiny_clip).processor == tiny_clip
