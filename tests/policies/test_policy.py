"""HunyuanVideoPolicy on the tiny weights: shapes, batches that change nothing, masks, saving, and its errors."""

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo

from editrl.data import EditExample
from editrl.errors import EditrlError
from editrl.policies.hunyuan_video.loading import SUBFOLDERS
from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy
from editrl.policies.hunyuan_video.transformer import HunyuanVideoEditTransformer3DModel
from editrl.policy import Conditions
from editrl.recipes.shapes import WEIGHTS

EDITOR = WEIGHTS / "sft"
CHANNELS = 16


@pytest.fixture(scope="module")
def policy() -> HunyuanVideoPolicy:
    policy = HunyuanVideoPolicy.from_pretrained(str(EDITOR))
    policy.transformer.eval()
    return policy


def example(instruction="make the red circle blue", *, frames=5, height=32, width=32, seed=0, reference=False):
    generator = torch.Generator().manual_seed(seed)
    return EditExample(
        id=str(seed),
        instruction=instruction,
        source=torch.rand(frames, 3, height, width, generator=generator),
        reference_image=torch.rand(1, 3, 32, 32, generator=generator) if reference else None,
    )


def unlike_examples() -> list[EditExample]:
    """Short and long instructions, with and without a reference image."""
    return [
        example("remove the circle", seed=1),
        example("make the small red circle on the left blue and remove the large green square", seed=2),
        example("add the object of the reference image", seed=3, reference=True),
    ]


def noise(conditions: Conditions, policy: HunyuanVideoPolicy, seed: int = 9) -> torch.Tensor:
    shape = (len(conditions), *policy.latent_shape(conditions))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def velocity(policy, conditions, latents, sigma=0.8):
    return policy.velocity(policy.transformer, latents, sigma, conditions)


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 32), (5, 32, 48), (9, 64, 32)])
def test_clips_become_latents_and_latents_become_clips(policy, frames, height, width):
    examples = [example(frames=frames, height=height, width=width, seed=seed) for seed in (1, 2)]
    conditions = policy.encode(examples)
    shape = (CHANNELS, (frames - 1) // 4 + 1, height // 8, width // 8)
    assert len(conditions) == 2
    assert policy.latent_shape(conditions) == shape
    latents = policy.encode_videos(torch.stack([one.source for one in examples]))
    assert latents.shape == (2, *shape)
    assert latents.dtype == torch.float32
    predicted = velocity(policy, conditions, latents)
    assert predicted.shape == (2, *shape)
    assert predicted.dtype == torch.float32
    videos = policy.decode(latents)
    assert videos.shape == (2, frames, 3, height, width)
    assert videos.dtype == torch.float32
    assert videos.min() >= 0 and videos.max() <= 1


def test_geometry_is_that_of_the_models(policy):
    assert policy.frame_multiple == 4
    assert policy.size_multiple == 16


def test_the_same_clip_is_always_the_same_condition(policy):
    """The mode of the VAE's posterior is taken: a sample of it would differ from call to call."""
    first, second = (policy.encode([example()]).source_latents for _ in range(2))
    assert torch.equal(first, second)


def test_what_is_frozen_needs_no_gradient(policy):
    assert not [p for module in policy.frozen_modules() for p in module.parameters() if p.requires_grad]
    assert all(parameter.requires_grad for parameter in policy.transformer.parameters())


# -- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_of_unlike_requests_equals_them_one_by_one(policy):
    examples = unlike_examples()
    together = policy.encode(examples)
    lengths = together.instructor_mask.sum(1)
    assert len(set(lengths.tolist())) == 3, "the requests must differ in length for this test to say anything"
    latents = noise(together, policy)
    alone = [policy.encode([one]) for one in examples]
    expected = torch.cat([velocity(policy, one, latents[[i]]) for i, one in enumerate(alone)])
    torch.testing.assert_close(velocity(policy, together, latents), expected, rtol=0, atol=1e-4)
    joined = Conditions.concatenate(alone)
    torch.testing.assert_close(velocity(policy, joined, latents), expected, rtol=0, atol=1e-4)


def test_what_stands_in_the_padding_does_not_matter(policy):
    conditions = policy.encode(unlike_examples())
    latents = noise(conditions, policy)
    padding = conditions.instructor_mask == 0
    assert padding.any()
    tokens = conditions.instructor_tokens.masked_fill(padding.unsqueeze(-1), 10.0)
    other = Conditions(conditions.tensors | {"instructor_tokens": tokens}, conditions.sequences)
    torch.testing.assert_close(
        velocity(policy, other, latents), velocity(policy, conditions, latents), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    "changed",
    [
        example("remove the circle"),
        example(seed=5),
        example(reference=True),
    ],
    ids=["instruction", "source", "reference image"],
)
def test_the_velocity_depends_on_every_part_of_a_request(policy, changed):
    conditions, other = policy.encode([example()]), policy.encode([changed])
    latents = noise(conditions, policy)
    assert not torch.allclose(velocity(policy, conditions, latents), velocity(policy, other, latents), atol=1e-6)


@pytest.mark.parametrize("reference", [False, True])
def test_the_system_turn_is_not_part_of_the_tokens(policy, reference):
    """It is the same for every request: a longer one changes what the tokens say, not how many they are."""
    prompts = {"edit_prompt": "edit the video . " * 2, "reference_prompt": "edit the video . " * 7}
    lengthy = HunyuanVideoPolicy.from_pretrained(str(EDITOR), **prompts)
    expected, found = (one.encode([example(reference=reference)]) for one in (policy, lengthy))
    assert torch.equal(found.instructor_mask, expected.instructor_mask)
    assert not torch.allclose(found.instructor_tokens, expected.instructor_tokens, atol=1e-4)


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_a_latent_cell_is_masked_where_any_pixel_it_covers_is(policy, frames):
    generator = torch.Generator().manual_seed(frames)
    masks = (torch.rand(3, frames, 1, 32, 48, generator=generator) < 0.002).float()
    masks[0] = 0
    expected = torch.zeros(3, 1, (frames - 1) // 4 + 1, 4, 6)
    for sample, frame, _, y, x in masks.nonzero().tolist():
        # Latent frame 0 is pixel frame 0; latent frame k holds pixel frames 4k-3 ... 4k.
        expected[sample, 0, (frame + 3) // 4, y // 8, x // 8] = 1
    assert 0 < expected.sum() < expected.numel()
    assert torch.equal(policy.latent_mask(masks), expected)


# -- precision ---------------------------------------------------------------------------------------------------------


def test_the_timestep_reaches_a_bfloat16_model_unrounded():
    policy = HunyuanVideoPolicy.from_pretrained(str(EDITOR), dtype="bfloat16", guidance_scale=6.0)
    assert policy.transformer.dtype == torch.bfloat16
    seen = []
    policy.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    conditions = policy.encode([example(seed=1), example(seed=2)])
    latents = noise(conditions, policy)
    sigmas = torch.tensor([0.87654, 0.12345])
    assert not torch.equal(sigmas.bfloat16().float(), sigmas)
    per_sample = velocity(policy, conditions, latents, sigmas)
    velocity(policy, conditions, latents, sigmas[0])
    velocity(policy, conditions, latents, sigmas[0].item())
    expected = [sigmas * 1000, sigmas[[0, 0]] * 1000, sigmas[[0, 0]] * 1000]
    for kwargs, timestep in zip(seen, expected, strict=True):
        assert kwargs["timestep"].dtype == torch.float32
        assert torch.equal(kwargs["timestep"], timestep)
        assert torch.equal(kwargs["guidance"].float(), torch.full((2,), 6000.0))
    assert per_sample.dtype == torch.float32


def test_the_reference_decoder_works_in_bfloat16():
    policy = HunyuanVideoPolicy.from_pretrained(str(EDITOR), dtype="bfloat16")
    videos = policy.decode(policy.encode_videos(example().source[None]))
    assert videos.dtype == torch.float32
    assert videos.isfinite().all()


# -- saving and loading ------------------------------------------------------------------------------------------------


def test_a_saved_editor_loads_as_the_same_editor(tmp_path):
    prompts = {"edit_prompt": "edit the video", "reference_prompt": "use the image", "hidden_layer": -2}
    policy = HunyuanVideoPolicy.from_pretrained(str(EDITOR), **prompts)
    policy.transformer.eval()
    with torch.no_grad():
        for parameter in policy.transformer.parameters():
            parameter.add_(0.01)
    policy.save_pretrained(tmp_path)
    loaded = HunyuanVideoPolicy.from_pretrained(str(tmp_path))
    loaded.transformer.eval()
    assert loaded.instructor.settings() == policy.instructor.settings()
    conditions, again = policy.encode(unlike_examples()), loaded.encode(unlike_examples())
    for name, tensor in conditions.tensors.items():
        assert torch.equal(again.tensors[name], tensor), name
    latents = noise(conditions, policy)
    assert torch.equal(velocity(loaded, again, latents), velocity(policy, conditions, latents))
    assert torch.equal(loaded.decode(latents), policy.decode(latents))


def test_the_transformer_may_come_from_a_folder_of_its_own(tmp_path):
    other = HunyuanVideoEditTransformer3DModel.from_pretrained(EDITOR / "transformer", torch_dtype=torch.float32)
    with torch.no_grad():
        other.proj_out.weight.zero_()
    other.save_pretrained(tmp_path)
    policy = HunyuanVideoPolicy.from_pretrained(str(EDITOR), transformer=str(tmp_path))
    assert not policy.transformer.proj_out.weight.any()


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_vae_of_other_latents_is_refused(policy):
    vae = AutoencoderKLHunyuanVideo.from_config({**policy.vae.config, "latent_channels": 8})
    with pytest.raises(EditrlError, match="VAE's latents have 8 channels, the transformer's in_channels is 16"):
        HunyuanVideoPolicy(policy.transformer, vae, policy.instructor, policy.text_encoder, policy.tokenizer)


@pytest.mark.parametrize("part", SUBFOLDERS)
def test_a_missing_part_is_named_with_its_place(part, tmp_path):
    folder = tmp_path / "editor"
    folder.mkdir()
    for path in EDITOR.iterdir():
        if path.name != part:
            (folder / path.name).symlink_to(path)
    with pytest.raises(EditrlError) as caught:
        HunyuanVideoPolicy.from_pretrained(str(folder))
    message = str(caught.value)
    assert part in message
    assert str(folder) in message
    assert "\n" not in message


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(EditrlError) as caught:
        HunyuanVideoPolicy.from_pretrained(str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_transformer_folder_is_named(tmp_path):
    with pytest.raises(EditrlError, match=r"cannot load the transformer from '.*nowhere'"):
        HunyuanVideoPolicy.from_pretrained(str(EDITOR), transformer=str(tmp_path / "nowhere"))
