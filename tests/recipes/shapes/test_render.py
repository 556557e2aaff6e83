"""Pixels of the embedded world: shapes move as they should, stay in their quadrant, and masks cover every change."""

import math

import pytest
import torch

from editrl.recipes.shapes.render import (
    coverage_table,
    from_quadrants,
    render_scenes,
    shape_coverage,
    slot_coverage,
    slot_states,
    to_quadrants,
)
from editrl.recipes.shapes.scenes import COLOURS, TASKS, VELOCITIES, Shape, sample_scenes


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(140, seed=11, split="all")


@pytest.fixture(scope="module")
def pixels(scenes):
    return render_scenes(scenes)


def test_render_scenes_gives_uint8_clips_masks_and_references(scenes, pixels):
    n = len(scenes)
    assert {key: tuple(value.shape) for key, value in pixels.items()} == {
        "source": (n, 5, 3, 32, 32),
        "target": (n, 5, 3, 32, 32),
        "mask": (n, 5, 1, 32, 32),
        "reference": (n, 3, 32, 32),
    }
    assert {value.dtype for value in pixels.values()} == {torch.uint8}
    assert pixels["mask"].unique().tolist() == [0, 1]
    assert [len(value) for value in render_scenes([]).values()] == [0, 0, 0, 0]


def test_a_long_list_renders_as_its_parts_do(scenes, pixels):
    many = render_scenes(scenes * 3)  # more than one chunk
    assert all(torch.equal(many[key], pixels[key].repeat(3, *[1] * (pixels[key].dim() - 1))) for key in pixels)


def test_masks_cover_every_changed_pixel_and_leave_something_to_preserve(scenes, pixels):
    changed = (pixels["source"] != pixels["target"]).any(2, keepdim=True)
    assert not (changed & (pixels["mask"] == 0)).any()
    assert changed.flatten(1).any(1).all()
    kept = (pixels["mask"] == 0).sum((2, 3, 4))
    assert kept.min() >= 10, scenes[int(kept.amin(1).argmin())]


def test_the_mask_of_a_background_edit_is_all_but_the_shapes(scenes, pixels):
    for scene, mask, source in zip(scenes, pixels["mask"], pixels["source"], strict=True):
        if scene.task == "background":
            shown = source.permute(1, 0, 2, 3)[:, mask[:, 0] == 0].T.unique(dim=0).tolist()
            assert {tuple(colour) for colour in shown} == {COLOURS[shape.colour] for shape in scene.objects}


def test_only_reference_scenes_have_a_picture(scenes, pixels):
    for scene, picture in zip(scenes, pixels["reference"], strict=True):
        assert bool((picture < 255).any()) == (scene.task == "reference")
        if scene.reference:
            assert tuple(picture[:, 17, 16].tolist()) == COLOURS[scene.reference.colour]


@pytest.mark.parametrize("task", TASKS)
def test_edited_objects_keep_their_motion(task):
    for scene in sample_scenes(50, 0, tasks=[task]):
        before = {shape.slot: shape.velocity for shape in scene.objects}
        for shape in scene.target_objects:
            assert shape.velocity == before.get(shape.slot, (0.0, 0.0))


def test_shapes_never_touch_the_border_of_their_quadrant():
    border = torch.ones(16, 16, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert coverage_table(torch.device("cpu"))[..., border].max() == 0


def test_shapes_move_by_their_velocity():
    objects = [[Shape("circle", "red", "large", 0, (x, y))] for x in VELOCITIES for y in VELOCITIES]
    coverage = slot_coverage(slot_states(objects))[:, 0]
    pixel = torch.arange(16.0)
    mass = coverage.sum((2, 3))
    centre = torch.stack([(coverage.sum(2) * pixel).sum(-1) / mass, (coverage.sum(3) * pixel).sum(-1) / mass], -1)
    expected = torch.tensor([shapes[0].velocity for shapes in objects])
    torch.testing.assert_close(centre.diff(dim=1), expected[:, None].expand(-1, 4, -1), atol=0.02, rtol=0)


@pytest.mark.parametrize(("form", "area"), [("circle", math.pi * 25), ("square", 100), ("triangle", 50)])
def test_forms_cover_their_area(form, area):
    y, x = torch.meshgrid(torch.arange(16.0) - 7.5, torch.arange(16.0) - 7.5, indexing="ij")
    coverage = shape_coverage(form, 5.0, x, y)
    assert coverage.sum().item() == pytest.approx(area, rel=0.02)
    assert coverage.min() == 0 and coverage.max() == 1


def test_triangles_point_up():
    y, x = torch.meshgrid(torch.arange(16.0) - 7.5, torch.arange(16.0) - 7.5, indexing="ij")
    rows = shape_coverage("triangle", 5.0, x, y).sum(1)[3:13]
    assert (rows.diff() > 0).all()


def test_quadrants_are_in_reading_order_and_go_back():
    videos = torch.rand(2, 5, 3, 32, 32)
    quadrants = to_quadrants(videos)
    assert torch.equal(quadrants[:, 1], videos[..., :16, 16:])
    assert torch.equal(from_quadrants(quadrants), videos)
