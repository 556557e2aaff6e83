"""What the editor is conditioned on: source frames for the instructor, the reference in time, and no instruction."""

import pytest
import torch

from editrl.data import EditExample
from editrl.errors import EditrlError
from editrl.policies.hunyuan_video.instructor import shown_frames
from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy
from editrl.policy import Conditions
from editrl.recipes.shapes import WEIGHTS

EDITOR = str(WEIGHTS / "sft")


def load(**options) -> HunyuanVideoPolicy:
    policy = HunyuanVideoPolicy.from_pretrained(EDITOR, **options)
    policy.transformer.eval()
    return policy


def example(seed=0, *, reference=False, frames=9, size=(32, 32), instruction="make the red circle blue") -> EditExample:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, 3, 40, 56, generator=generator) if reference else None
    source = torch.rand(frames, 3, *size, generator=generator)
    return EditExample(id=str(seed), instruction=instruction, source=source, reference_image=image)


def noise_for(policy, conditions: Conditions, seed=9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(conditions), *policy.latent_shape(conditions), generator=generator)


@torch.no_grad()
def velocity(policy, conditions, latents, sigma=0.8):
    return policy.velocity(policy.transformer, latents, sigma, conditions)


# -- what the instructor sees ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "length", "shown"),
    [
        ("first", 33, [0]),
        ("first_middle_last", 33, [0, 16, 32]),
        (5, 33, [0, 8, 16, 24, 32]),
        (5, 1, [0]),
        (4, 3, [0, 1, 2]),
        (1, 33, [0]),
    ],
)
def test_which_frames_are_shown(frames, length, shown):
    assert shown_frames(length, frames) == shown


@pytest.mark.parametrize("frames", ["last", 0, -1, True, 1.5])
def test_other_frames_are_refused(frames):
    with pytest.raises(EditrlError, match=r"the instructor's frames are"):
        load(frames=frames)


def test_a_hidden_layer_that_the_vlm_does_not_have_is_refused():
    with pytest.raises(EditrlError, match=r"hidden_layer is -99, but the instructor has \d+ hidden states"):
        load(hidden_layer=-99)


def test_more_frames_are_more_tokens_and_none_are_text_alone():
    lengths = {
        frames: load(frames=frames).encode([example()]).instructor_tokens.shape[1]
        for frames in ("none", "first", "first_middle_last", 5)
    }
    picture = lengths["first_middle_last"] - lengths["first"]
    assert lengths["none"] < lengths["first"] < lengths["first_middle_last"] < lengths[5]
    assert lengths[5] - lengths["first"] == 2 * picture, "each further frame takes as many"


def test_a_later_object_is_seen_only_by_an_instructor_that_is_shown_later_frames():
    early = example()
    late = example()
    late.source = early.source.clone()
    late.source[-1] = 1 - late.source[-1]
    for frames, sees in (("first", False), ("first_middle_last", True)):
        policy = load(frames=frames)
        one, other = (policy.encode([sample]).instructor_tokens for sample in (early, late))
        assert torch.allclose(one, other, atol=1e-5) is not sees


def test_text_only_ignores_all_pictures():
    policy = load(frames="none")
    one, other = policy.encode([example(1)]), policy.encode([example(2, reference=True)])
    assert torch.equal(one.instructor_tokens, other.instructor_tokens)


def test_different_numbers_of_pictures_and_words_in_one_batch_equal_one_by_one():
    policy = load(frames="first_middle_last", reference_position="last")
    examples = [
        example(1, instruction="remove the circle"),
        example(2, reference=True, instruction="add the object of the reference image to the left of the blue square"),
        example(3, instruction="make the small red circle on the left blue and remove the large green square"),
    ]
    together = policy.encode(examples)
    latents = noise_for(policy, together)
    expected = [
        velocity(policy, policy.encode([sample]), latents[row : row + 1]) for row, sample in enumerate(examples)
    ]
    torch.testing.assert_close(velocity(policy, together, latents), torch.cat(expected), rtol=0, atol=2e-5)


def test_a_placeholder_in_an_instruction_is_an_error_not_a_shifted_picture():
    policy = load()
    with pytest.raises(EditrlError, match=r"2 slots '<image>' for 1 pictures"):
        policy.encode([example(instruction="what is <image>?")])


def test_a_chat_template_that_drops_the_picture_is_an_error():
    policy = load()
    policy.instructor.processor.tokenizer.chat_template = "{% for turn in messages %}{{ turn['role'] }} {% endfor %}"
    with pytest.raises(EditrlError, match=r"0 slots '<image>' for 1 pictures: its chat template drops"):
        policy.encode([example()])


# -- no instruction ----------------------------------------------------------------------------------------------------


def test_unconditional_forgets_the_instruction_and_keeps_the_pictures():
    policy = load()
    one, other = (policy.encode([example(instruction=text)], unconditional=True) for text in ("remove it", "turn blue"))
    for name in one.tensors:
        assert torch.equal(one.tensors[name], other.tensors[name]), name
    elsewhere = policy.encode([example(5)], unconditional=True)
    assert not torch.allclose(elsewhere.instructor_tokens, one.instructor_tokens, atol=1e-4)


# -- the reference in time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["last", "first"])
def test_a_reference_is_one_more_latent_frame_that_is_no_part_of_the_result(position, monkeypatch):
    policy = load(reference_position=position)
    conditions = policy.encode([example(reference=True)])
    latents = noise_for(policy, conditions)
    given, forward = [], type(policy.transformer).forward

    def watched(self, *args, **kwargs):
        given.append(kwargs["hidden_states"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(policy.transformer), "forward", watched)
    result = velocity(policy, conditions, latents)
    assert result.shape == latents.shape
    [hidden] = given
    assert hidden.shape[2] == latents.shape[2] + 1
    slot, rest = (hidden[:, :, -1:], hidden[:, :, :-1]) if position == "last" else (hidden[:, :, :1], hidden[:, :, 1:])
    assert torch.equal(slot[:, :16], conditions.reference_noise)
    assert torch.equal(slot[:, 16:], conditions.reference_latents)
    assert torch.equal(rest[:, :16], latents)
    assert torch.equal(rest[:, 16:], conditions.source_latents)


def test_the_latents_of_the_reference_reach_the_velocity():
    policy = load(reference_position="last")
    conditions = policy.encode([example(reference=True)])
    latents = noise_for(policy, conditions)
    changed = Conditions(conditions.tensors | {"reference_latents": conditions.reference_latents + 1})
    assert not torch.allclose(velocity(policy, conditions, latents), velocity(policy, changed, latents), atol=1e-5)


def test_without_a_reference_the_position_does_not_matter():
    results = []
    for position in ("last", "first", "none"):
        policy = load(reference_position=position)
        conditions = policy.encode([example()])
        results.append(velocity(policy, conditions, noise_for(policy, conditions)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_noise_of_a_reference_is_a_function_of_the_image():
    policy = load(reference_position="last")
    one, again, other = (policy.encode([example(seed, reference=True)]).reference_noise for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)
    assert abs(one.std().item() - 1) < 0.1
    assert policy.encode([example(1)]).reference_noise.abs().max() == 0
    assert (
        load(reference_position="last", reference_noise="zeros")
        .encode([example(1, reference=True)])
        .reference_noise.abs()
        .max()
        == 0
    )


def test_gradients_of_a_mixed_batch_are_those_of_its_parts():
    policy = load(reference_position="last")
    conditions = policy.encode([example(1), example(2, reference=True)])
    latents = noise_for(policy, conditions)
    parameter = policy.transformer.proj_out.weight

    def gradient(rows):
        part = policy.velocity(policy.transformer, latents[rows], torch.tensor([0.8, 0.3])[rows], conditions[rows])
        return torch.autograd.grad(part.square().sum(), parameter)[0]

    together = gradient(slice(0, 2))
    torch.testing.assert_close(together, gradient(slice(0, 1)) + gradient(slice(1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "value"), [("reference_position", "middle"), ("reference_noise", "some")])
def test_unknown_choices_are_refused(name, value):
    with pytest.raises(EditrlError, match=f"{name} is '{value}'; use one of"):
        load(**{name: value})


def test_the_shift_follows_the_resolution_unless_it_is_set():
    by_size = load(flow_shift=None)
    assert by_size.shift_for(480, 832) == 5.0
    assert by_size.shift_for(720, 1280) == 7.0
    assert load().shift_for(32, 32) == 3.0, "that of the editor's folder"
    assert load(flow_shift=2.5).shift_for(720, 1280) == 2.5


def test_the_settings_are_saved_with_the_editor(tmp_path):
    policy = load(reference_position="first", reference_noise="zeros", frames=3, hidden_layer=-2, flow_shift=6.0)
    policy.save_pretrained(tmp_path)
    assert HunyuanVideoPolicy.from_pretrained(str(tmp_path)).settings() == policy.settings()


# -- what a batch does not need ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("examples", "left_out"),
    [
        ([example(0), example(1)], {"instructor_mask", "has_reference", "reference_latents", "reference_noise"}),
        ([example(0, reference=True), example(1, reference=True)], {"instructor_mask", "has_reference"}),
        ([example(0, reference=True), example(1)], set()),
        (
            [example(0), example(1, instruction="replace the red circle with a large green square")],
            {"has_reference", "reference_latents", "reference_noise"},
        ),
    ],
    ids=["alike", "all with reference", "one with reference", "instructions of different length"],
)
def test_compact_conditions_give_the_same_velocity(examples, left_out):
    policy = load(reference_position="last")
    conditions = policy.encode(examples)
    compact = policy.compact(conditions)
    assert conditions.tensors.keys() - compact.tensors.keys() == left_out
    latents = noise_for(policy, conditions)
    torch.testing.assert_close(
        velocity(policy, compact, latents), velocity(policy, conditions, latents), atol=2e-6, rtol=1e-5
    )


def test_padding_of_all_samples_is_cut_off():
    policy = load(reference_position="last")
    conditions = policy.encode([example(0), example(1, instruction="replace the red circle with a large green square")])
    longest = conditions.instructor_tokens.shape[1]
    first = policy.compact(conditions[:1])
    assert first.instructor_tokens.shape[1] == int(conditions.instructor_mask[0].sum()) < longest
    assert "instructor_mask" not in first.tensors
