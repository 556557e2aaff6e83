"""Clips of any length and size: what the model sees, what comes back, and windows that leave no seam."""

import hashlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editrl.data import EditExample
from editrl.editing import Placement, edit_clip, edited_frames, side_by_side
from editrl.errors import EditrlError
from editrl.policies.hunyuan_video.policy import HunyuanVideoPolicy
from editrl.policy import Conditions, FlowPolicy
from editrl.recipes.shapes import WEIGHTS
from editrl.rollout import counter_noise, edit_examples
from editrl.windows import WindowedPolicy, blend_weights, windows


class Repainter(FlowPolicy):
    """Adds a brightness to a clip, exactly, whatever the steps. `disagreement`: windows add another one each, between
    -disagreement and disagreement more, by their first frame. Its latents are pixels: one frame, then four and four."""

    def __init__(self, disagreement: float = 0.0):
        self.transformer = torch.nn.Linear(1, 1)  # says where the policy lives
        self.disagreement = disagreement
        self.seen: list[EditExample] = []
        self.decoded: list[int] = []

    def encode(self, examples, unconditional=False):
        self.seen += examples
        brightness = 0.0 if unconditional else 0.1
        clean = [example.source + brightness + self.whim(example.source[0]) for example in examples]
        return Conditions({"clean": self.encode_videos(torch.stack(clean))})

    def whim(self, first_frame: torch.Tensor) -> float:
        parity = hashlib.sha256(first_frame.numpy().tobytes()).digest()[0] % 2
        return self.disagreement * (2 * parity - 1)

    def encode_videos(self, videos):
        longer = torch.cat([videos[:, :1].expand(-1, 3, -1, -1, -1), videos], dim=1)
        return longer.unflatten(1, (-1, 4)).flatten(2, 3).transpose(1, 2)

    def latent_shape(self, conditions):
        return tuple(conditions.clean.shape[1:])

    def velocity(self, transformer, latents, sigma, conditions):
        return (latents - conditions.clean) / sigma

    def decode(self, latents):
        self.decoded.append(4 * latents.shape[2] - 3)
        return latents.transpose(1, 2).unflatten(2, (4, 3)).flatten(1, 2)[:, 3:]


def film(frames: int, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    """A pattern that drifts by a pixel a frame, [F,3,H,W] in [0.3, 0.6]."""
    generator = torch.Generator().manual_seed(seed)
    pattern = 0.3 + 0.3 * torch.rand(3, height, width + frames, generator=generator)
    return torch.stack([pattern[:, :, t : t + width] for t in range(frames)])


def edit(policy, source, instruction="brighter", **options):
    return edit_clip(policy, source, instruction, **({"num_inference_steps": 3, "shift": 3.0} | options))


@pytest.fixture(scope="module")
def editor() -> HunyuanVideoPolicy:
    policy = HunyuanVideoPolicy.from_pretrained(str(WEIGHTS / "sft"))
    policy.transformer.eval()
    return policy


# -- one window --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"true_cfg_scale": 3.0}, {"ode_solver": "dpm2"}], ids=str)
def test_a_clip_that_fits_is_edited_as_by_edit_examples(editor, options):
    source = torch.rand(5, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    example = EditExample(id="x", instruction="remove the circle", source=source, reference_image=source[:1])
    [expected] = edit_examples(
        editor, editor.transformer, [example], num_inference_steps=3, shift=3.0, noise_keys=[(7,)], **options
    )
    found = edit(editor, source, example.instruction, reference_image=source[0], seed=7, **options)
    assert torch.equal(found, expected)
    assert not torch.equal(edit(editor, source, example.instruction, seed=8, **options), expected)


def test_embedded_guidance_is_set_for_the_edit_only(editor):
    source = torch.rand(1, 3, 32, 32)
    plain = edit(editor, source)
    assert not torch.equal(edit(editor, source, guidance_scale=6.0), plain)
    assert editor.guidance_scale == 1.0
    assert torch.equal(edit(editor, source), plain)


def test_true_guidance_goes_beyond_the_condition():
    source = film(5)
    torch.testing.assert_close(edit(Repainter(), source, true_cfg_scale=2.0), source + 0.2)


def test_the_shift_is_the_policys_for_the_size_unless_another_is_asked_for(editor, monkeypatch):
    sizes = []
    monkeypatch.setattr(editor, "shift_for", lambda *size: sizes.append(size) or 3.0)
    source = torch.rand(1, 3, 40, 70)
    assert torch.equal(edit(editor, source, shift=None), edit(editor, source, shift=3.0))
    assert not torch.equal(edit(editor, source, shift=None), edit(editor, source, shift=7.0))
    assert sizes == [(32, 64)] * 2


# -- length ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "count", "seen", "returned"),
    [
        ("cut", 1, 1, 1),
        ("cut", 4, 1, 1),
        ("cut", 5, 5, 5),
        ("cut", 8, 5, 5),
        ("refuse", 9, 9, 9),
        ("repeat", 9, 9, 9),
        ("repeat", 2, 5, 2),
        ("repeat", 6, 9, 6),
    ],
)
def test_a_length_is_cut_or_repeated_to_4k_plus_1(frames, count, seen, returned):
    policy, source = Repainter(), film(count)
    edited = edit(policy, source, frames=frames)
    assert [len(example.source) for example in policy.seen] == [seen]
    torch.testing.assert_close(edited, source[:returned] + 0.1)
    if seen > count:
        assert torch.equal(policy.seen[0].source[count:], source[-1:].expand(seen - count, -1, -1, -1))


def test_a_length_can_be_refused():
    with pytest.raises(EditrlError, match=r"the clip has 6 frames, which is not 4k\+1; cut it to 5, or let frames be"):
        edit(Repainter(), film(6), frames="refuse")
    assert edited_frames(6, 1, "refuse") == 6  # a policy that takes any length


def test_a_picture_is_a_clip_of_one_frame():
    picture = film(1)[0]
    assert torch.equal(edit(Repainter(), picture), edit(Repainter(), picture[None]))


# -- size --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "options", "seen", "returned"),
    [
        ((32, 48), {}, (32, 48), (32, 48)),
        ((33, 47), {}, (32, 48), (33, 47)),
        ((5, 71), {}, (16, 64), (5, 71)),
        ((90, 160), {"size": 48}, (48, 80), (90, 160)),
        ((90, 160), {"size": (32, 48)}, (32, 48), (32, 48)),
        ((90, 160), {"size": (32, 48), "fit": "pad"}, (32, 48), (90, 160)),
        ((160, 90), {"size": (32, 48), "fit": "pad"}, (32, 48), (160, 90)),
        ((90, 160), {"size": (32, 48), "fit": "stretch"}, (32, 48), (90, 160)),
    ],
)
def test_a_size_is_brought_to_one_that_divides_and_back(source, options, seen, returned):
    policy = Repainter()
    edited = edit(policy, film(5, *source), **options)
    assert policy.seen[0].source.shape == (5, 3, *seen)
    assert edited.shape == (5, 3, *returned)


def smooth(height, width):
    """One frame whose red grows downwards and whose green grows to the right."""
    down = torch.linspace(0.1, 0.8, height)[:, None].expand(height, width)
    right = torch.linspace(0.1, 0.8, width).expand(height, width)
    return torch.stack([down, right, 0.3 * torch.ones(height, width)])[None]


@pytest.mark.parametrize("options", [{}, {"size": (48, 48), "fit": "pad"}, {"size": (64, 32), "fit": "stretch"}])
def test_what_was_scaled_and_padded_comes_back_in_its_place(options):
    source = smooth(50, 70)
    edited = edit(Repainter(), source, **options)
    torch.testing.assert_close(edited, (source + 0.1).clamp(0, 1), rtol=0, atol=0.03)


def test_padding_shows_the_whole_picture_and_no_edge_of_its_own():
    source = torch.ones(1, 3, 20, 40)
    placement = Placement.of((20, 40), 16, (32, 32), "pad")
    assert placement.inner == (16, 32)
    assert placement.enter(source).min() > 0.999  # black bars would show
    marked = source.clone()
    marked[..., 0] = 0  # the left column
    assert placement.enter(marked)[..., 0].max() < 0.9


def test_cropping_keeps_the_centre_and_its_shape():
    policy = Repainter()
    edit(policy, smooth(64, 96), size=(32, 32))
    torch.testing.assert_close(policy.seen[0].source[0, 1, 16, 16], torch.tensor(0.45), rtol=0, atol=0.02)
    assert policy.seen[0].source[0, 1].min() > 0.2  # a sixth of the width is cut away on the left


# -- windows -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_windows_cover_a_clip_with_the_overlap_that_was_asked_for(multiple, groups, max_frames, overlap):
    count = multiple * groups + 1
    if count > max_frames and overlap > max_frames - 2 * multiple:
        return
    length, starts = windows(count, multiple, max_frames, overlap)
    assert starts[0] == 0 and starts[-1] + length == count
    assert length <= max_frames or len(starts) == 1
    assert (length - 1) % multiple == 0
    for start, following in pairwise(starts):
        assert (following - start) % multiple == 0
        assert start < following <= start + length - overlap


def test_windows_are_no_more_than_needed_and_evenly_spread():
    assert windows(129, 4, 33, 9) == (33, [0, 24, 48, 72, 96])
    assert windows(133, 4, 36, 9) == (33, [0, 20, 40, 60, 80, 100])
    assert windows(129, 4, 129, None) == windows(129, 4, None, None) == (129, [0])
    assert windows(17, 4, 9, 1) == (9, [0, 8])  # the least: the frame with which a window begins


@pytest.mark.parametrize(("max_frames", "overlap"), [(4, None), (1, 1), (9, 6), (9, 40)])
def test_windows_that_do_not_advance_are_refused(max_frames, overlap):
    with pytest.raises(EditrlError, match="do not advance; give max_frames of at least 5"):
        windows(129, 4, max_frames, overlap)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(10, 20))
def test_weights_add_up_to_one_and_change_by_one_share_a_position(steps, length):
    starts = [sum(steps[:index]) for index in range(len(steps))]
    count = starts[-1] + length
    weights = blend_weights([(start, start + length) for start in starts], count)
    torch.testing.assert_close(weights.sum(0), torch.ones(count))
    assert weights.min() >= 0
    for start, row in zip(starts, weights, strict=True):
        assert not row[:start].any() and not row[start + length :].any()


def test_two_windows_blend_linearly():
    weights = blend_weights([(0, 6), (3, 9)], 9)
    assert weights[1].tolist() == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1])


def test_windows_that_agree_give_the_edit_of_the_clip_in_one_piece():
    source, policy = film(129), Repainter()
    edited = edit(policy, source, max_frames=33, overlap=9)
    torch.testing.assert_close(edited, source + 0.1, rtol=0, atol=1e-5)
    assert [len(example.source) for example in policy.seen] == [33] * 5
    assert policy.decoded == [33] * 5  # no forward, no decoding is longer than a window
    for example, start in zip(policy.seen, (0, 24, 48, 72, 96), strict=True):
        assert torch.equal(example.source, source[start : start + 33])


def changes(video: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbouring frames, [F-1]."""
    return video.diff(dim=0).abs().mean((1, 2, 3))


def test_windows_that_disagree_leave_no_seam():
    """129 frames, five windows that want a brightness of 0.05 or 0.15 more: a cut between them would be as large as the
    motion. Where they overlap, frames differ no more than elsewhere."""
    source, disagreement = film(129), 0.05
    policy = Repainter(disagreement)
    edited = edit(policy, source, max_frames=41, overlap=17)
    starts = windows(129, 4, 41, 17)[1]
    whims = [policy.whim(example.source[0]) for example in policy.seen]
    assert len(set(whims)) == 2, "the windows must disagree for this test to say anything"
    cuts = torch.cat([source[start : start + 24] + whim for start, whim in zip(starts, whims, strict=True)])[:129]
    motion = changes(source)
    assert changes(cuts).max() > 1.15 * motion.max(), "a cut must be visible for this test to say anything"
    assert changes(edited).max() < 1.02 * motion.max()
    brightness = (edited - source).mean((1, 2, 3))
    assert brightness.diff().abs().max() < 2 * disagreement / 4


def test_neighbouring_windows_start_from_the_same_noise():
    policy = Repainter()
    windowed = WindowedPolicy(policy, 17, 9, [0, 4, 8], lambda: None)
    example = EditExample(id="x", instruction="", source=film(17))
    noise = windowed.noise(windowed.encode([example]), seed=3)
    clip = counter_noise((12, 5, 16, 16), 3)
    for slots, latents in zip(windowed.slots, ([0, 1, 2], [1, 2, 3], [2, 3, 4]), strict=True):
        assert torch.equal(noise[0, :, slots], clip[:, latents])


@pytest.mark.slow
def test_a_real_editor_edits_a_long_clip_without_seams(editor):
    """Random colours: nothing that the small model was trained on, so its windows agree by the blending alone."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(5, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    source = torch.nn.functional.interpolate(
        steps.permute(1, 0, 2, 3)[None], size=(129, 32, 32), mode="trilinear", align_corners=True
    )[0].permute(1, 0, 2, 3)
    edited = edit(editor, source, "remove the circle", max_frames=33, overlap=13, seed=1)
    assert edited.shape == source.shape
    length, starts = windows(129, 4, 33, 13)
    changed = changes(edited)
    overlaps = torch.zeros(128, dtype=torch.bool)
    for start, following in pairwise(starts):
        overlaps[following - 1 : start + length] = True
    assert changed[overlaps].max() <= changed[~overlaps].max()


def test_progress_counts_the_forwards():
    for options, forwards in (({}, 3), ({"max_frames": 9, "overlap": 5}, 9), ({"true_cfg_scale": 2.0}, 6)):
        calls = []
        edit(Repainter(), film(17), progress=lambda *call, calls=calls: calls.append(call), **options)
        assert calls == [(done, forwards) for done in range(1, forwards + 1)]


# -- side by side, and mistakes ----------------------------------------------------------------------------------------


def test_source_and_edit_stand_side_by_side():
    source = film(7, 32, 48)
    for options in ({}, {"size": (16, 16)}, {"frames": "repeat"}):
        edited = edit(Repainter(), source, **options)
        both = side_by_side(source, edited)
        left, right = both.chunk(2, dim=-1)
        assert torch.equal(right, edited)
        torch.testing.assert_close(left + 0.1, right, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("source", "options", "phrase"),
    [
        (torch.rand(5, 16, 16, 3), {}, r"a clip is \[frames, 3, height, width\], this tensor is \[5, 16, 16, 3\]"),
        (torch.zeros(0, 3, 16, 16), {}, "permute it"),
        (torch.full((5, 3, 16, 16), 255, dtype=torch.uint8), {}, r"a clip is floating point in \[0, 1\]"),
        (torch.full((5, 3, 16, 16), 2.0), {}, r"floating point in \[0, 1\]"),
        (torch.full((5, 3, 16, 16), float("nan")), {}, r"floating point in \[0, 1\]"),
        (film(5), {"frames": "drop"}, "frames is 'drop'; use one of cut, refuse, repeat"),
        (film(5), {"fit": "squeeze"}, "fit is 'squeeze'; use one of crop, pad, stretch"),
        (film(5), {"size": (40, 32)}, "height x width: 40x32 is not divisible by 16"),
        (film(5), {"size": (-16, 16)}, "-16x16 is not divisible by 16"),
        (film(5), {"guidance_scale": 6.0}, "Repainter has no embedded guidance"),
        (film(5), {"reference_image": torch.rand(16, 16, 3)}, "this tensor is"),
    ],
)
def test_a_mistake_is_one_line(source, options, phrase):
    with pytest.raises(EditrlError, match=phrase):
        edit(Repainter(), source, **options)
