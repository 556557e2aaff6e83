"""The oracle: right edits succeed, copies fail, and both without ever drawing a candidate."""

from dataclasses import replace

import pytest
import torch

from editrl.errors import EditrlError
from editrl.recipes.shapes import oracle
from editrl.recipes.shapes.oracle import oracle_margin, oracle_preservation, oracle_success, score, shape_distances
from editrl.recipes.shapes.render import palette, render_scenes, render_states, to_quadrants
from editrl.recipes.shapes.scenes import BACKGROUNDS, TASKS, Edit, EditScene, Shape, sample_scenes


def clips(scenes, key="target"):
    return render_scenes(scenes)[key].float() / 255


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("task", TASKS)
def test_targets_succeed_even_under_noise_and_copies_fail(task, split):
    scenes = sample_scenes(60, seed=21, split=split, tasks=[task])
    target, source = clips(scenes), clips(scenes, "source")
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    assert score(target, scenes)["success"].all()
    assert score(target + 0.4 * noise, scenes)["success"].all()
    assert not score(source, scenes)["success"].any()
    assert score(target, scenes)["margin"].min() > 0.99
    assert score(source, scenes)["margin"].max() < -0.99


def test_preservation_is_high_for_target_and_source_and_low_when_the_background_is_wiped():
    scenes = sample_scenes(70, seed=22)
    target, source = clips(scenes), clips(scenes, "source")
    assert score(target, scenes)["preservation_psnr"].min() == pytest.approx(60)
    assert score(source, scenes)["preservation_psnr"].min() == pytest.approx(60)
    assert score((source + 0.5) % 1, scenes)["preservation_psnr"].max() < 15
    shifted = score(source + 0.1, scenes)["preservation_psnr"]
    torch.testing.assert_close(shifted, torch.full_like(shifted, 20.0), atol=1e-3, rtol=0)


def test_preservation_looks_outside_the_mask_only():
    scenes = sample_scenes(70, seed=23)
    pixels = render_scenes(scenes)
    inside = pixels["mask"].bool()
    noisy = torch.where(inside, torch.rand(70, 5, 3, 32, 32), pixels["source"] / 255)
    assert score(noisy, scenes)["preservation_psnr"].min() == pytest.approx(60)


def test_margin_rises_from_source_to_target_and_is_positive_exactly_for_successes():
    scenes = sample_scenes(70, seed=24)
    target, source = clips(scenes), clips(scenes, "source")
    results = [score(source.lerp(target, share), scenes) for share in (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)]
    means = torch.stack([result["margin"].mean() for result in results])
    assert (means.diff() > 0).all()
    for result in results:
        assert torch.equal(result["margin"] > 0, result["success"])
        assert result["margin"].abs().max() <= 1


def test_half_of_a_hybrid_is_no_success():
    scenes = sample_scenes(40, seed=25, tasks=["hybrid"])
    for position in (0, 1):
        half_done = [replace(scene, edits=(scene.edits[position],)) for scene in scenes]
        done = clips(half_done)
        assert score(done, half_done)["success"].all()
        assert not score(done, scenes)["success"].any()


def one_object(task, edit, **looks):
    shape = Shape(**{"form": "circle", "colour": "red", "size": "large", "slot": 0, "velocity": (0.5, -1.0), **looks})
    return EditScene("x", task, "", (shape,), "white", (edit,))


def test_size_counts_only_where_the_instruction_names_it():
    large = one_object("recolour", Edit("recolour", 0, colour="green"))
    small = one_object("recolour", Edit("recolour", 0, colour="green"), size="small")
    assert score(clips([small]), [large])["success"].all()
    add_large = one_object("add", Edit("add", 3, "blue", "square", "large"))
    add_small = one_object("add", Edit("add", 3, "blue", "square", "small"))
    assert not score(clips([add_small]), [add_large])["success"].any()


@pytest.mark.parametrize(
    "other",
    [
        Edit("recolour", 0, colour="blue"),
        Edit("reference", 0, "green", "square"),
        Edit("remove", 0),
        Edit("background", background="black"),
    ],
)
def test_another_edit_than_the_one_asked_for_fails(other):
    asked = one_object("recolour", Edit("recolour", 0, colour="green"))
    done = one_object("recolour", other)
    assert not score(clips([done]), [asked])["success"].any()


def test_distances_are_those_of_drawn_candidates():
    generator = torch.Generator().manual_seed(0)
    videos = torch.rand(4, 5, 3, 32, 32, generator=generator)
    paths = torch.tensor([[0, 4], [2, 2], [1, 3], [4, 0]])
    looks = [[form, colour, size] for form in (1, 2, 3) for size in (0, 1) for colour in range(6)] + [[0, 0, 0]]
    backgrounds = torch.arange(4)
    quadrant = to_quadrants(videos)[:, 0]
    distances = shape_distances(quadrant, paths, palette(BACKGROUNDS, torch.device("cpu")))
    assert distances.shape == (4, 37)
    for part, path in enumerate(paths.tolist()):
        states = torch.zeros(37, 4, 5, dtype=torch.long)
        states[:, 0] = torch.tensor([[*look, *path] for look in looks])
        drawn = to_quadrants(render_states(states, backgrounds[part].expand(37)) / 255)[:, 0]
        expected = (drawn - quadrant[part]).square().mean((1, 2, 3, 4))
        torch.testing.assert_close(distances[part].float(), expected, atol=1e-3, rtol=0)


def test_autocast_does_not_change_the_scores():
    scenes = sample_scenes(70, seed=28)
    videos = 0.6 * clips(scenes) + 0.4 * clips(scenes, "source")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = score(videos, scenes)
    for key, values in score(videos, scenes).items():
        assert torch.equal(mixed[key], values)


def test_dicts_objects_and_repeats_score_alike():
    scenes = sample_scenes(14, seed=26)
    videos = (0.7 * clips(scenes) + 0.3 * clips(scenes, "source")).repeat_interleave(3, 0)
    repeated = [scene for scene in scenes for _ in range(3)]
    dicts = [scene.to_dict() for scene in repeated]
    expected = score(videos, repeated)
    for key, values in score(list(videos), dicts).items():
        torch.testing.assert_close(values, expected[key])
    assert all(len(values) == 0 for values in score([], []).values())


def test_reward_functions_share_one_computation_through_the_cache(monkeypatch):
    scenes = sample_scenes(7, seed=27)
    videos, dicts = list(clips(scenes)), [scene.to_dict() for scene in scenes]
    calls = []
    monkeypatch.setattr(oracle, "score", lambda *arguments: calls.append(1) or score(*arguments))
    cache = {}
    assert oracle_success(videos=videos, scene=dicts, cache=cache, instructions=[""] * 7) == [1.0] * 7
    assert oracle_margin(videos=videos, scene=dicts, cache=cache) == pytest.approx([1.0] * 7, abs=0.01)
    assert oracle_preservation(videos=videos, scene=dicts, cache=cache) == pytest.approx([60.0] * 7)
    assert len(calls) == 1
    others = list(clips(scenes, "source"))
    assert oracle_success(videos=others, scene=dicts, cache=cache) == [0.0] * 7  # other videos, other scores
    assert oracle_success(videos=videos, scene=dicts) == [1.0] * 7  # a cache is not needed


@pytest.mark.parametrize(
    ("videos", "words"),
    [
        (torch.zeros(2, 5, 3, 16, 16), r"video 0 is \[5, 3, 16, 16\]"),
        ([torch.zeros(5, 3, 32, 32), torch.zeros(1, 3, 32, 32)], r"video 1 is \[1, 3, 32, 32\]"),
        (torch.zeros(3, 5, 3, 32, 32), "3 videos but 2 scenes"),
        (torch.stack([torch.zeros(5, 3, 32, 32), torch.full((5, 3, 32, 32), torch.nan)]), "video 1 has NaN"),
    ],
)
def test_clips_that_cannot_be_judged_are_refused(videos, words):
    with pytest.raises(EditrlError, match=words):
        score(videos, sample_scenes(2, 0))
