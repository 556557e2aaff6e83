"""Pixels of the embedded world: scenes as index tensors, drawn for many scenes, frames and quadrants at once.

A shape stays in its quadrant on one of 25 paths, so all that can be seen of it is looked up in a small table
(form × size × path) that signed distances fill once for a device.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from editrl.recipes.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    FORMS,
    FRAMES,
    POSITIONS,
    QUADRANT,
    RESOLUTION,
    SIZES,
    VELOCITIES,
    EditScene,
    Shape,
)


def shape_coverage(form: str, radius: float, x: Tensor, y: Tensor) -> Tensor:
    """Anti-aliased coverage in [0,1] at pixel offsets (x, y) from the centre, by signed distance; y points down."""
    if form == "circle":
        distance = torch.hypot(x, y) - radius
    elif form == "square":
        distance = torch.maximum(x.abs(), y.abs()) - radius
    else:  # apex up, base and height 2 * radius
        side = (2 * x.abs() - y - radius) / 5**0.5
        distance = torch.maximum(side, y - radius)
    return (0.5 - distance).clamp(0, 1)


@lru_cache(maxsize=8)
def coverage_table(device: torch.device) -> Tensor:
    """Every trajectory in its quadrant: [form + 1, size, x velocity, y velocity, F, 16, 16]; form 0 is no shape."""
    pixel = torch.arange(QUADRANT, dtype=torch.float32) + 0.5 - QUADRANT / 2
    time = torch.arange(FRAMES, dtype=torch.float32) - (FRAMES - 1) / 2
    path = torch.tensor(VELOCITIES)[:, None] * time  # [V, F] pixels from the quadrant's centre
    x = (pixel - path[..., None])[:, None, :, None, :].expand(-1, len(VELOCITIES), -1, QUADRANT, -1)
    y = (pixel - path[..., None])[None, :, :, :, None].expand(len(VELOCITIES), -1, -1, -1, QUADRANT)

    def draw(form: str, radius: float) -> Tensor:
        shift = radius % 1  # sides of a resting square fall on pixel edges, whatever the radius
        return shape_coverage(form, radius, x - shift, y - shift)

    filled = [torch.stack([draw(form, radius) for radius in SIZES.values()]) for form in FORMS]
    return torch.stack([torch.zeros_like(filled[0]), *filled]).to(device)


def palette(colours: dict[str, tuple[int, int, int]], device: torch.device) -> Tensor:
    """The colours of a table such as COLOURS as float32 [K,3] in [0,1]."""
    return torch.tensor(list(colours.values()), dtype=torch.float32, device=device) / 255


def slot_states(object_lists: Sequence[Sequence[Shape]]) -> Tensor:
    """Long [N,4,5]: form + 1 (0 is empty), colour, size, x velocity, y velocity of every slot, as indices."""
    colours, sizes = list(COLOURS), list(SIZES)
    states = [[[0, 0, 0, 2, 2]] * len(POSITIONS) for _ in object_lists]
    for slots, objects in zip(states, object_lists, strict=True):
        for shape in objects:
            path = [VELOCITIES.index(speed) for speed in shape.velocity]
            slots[shape.slot] = [
                FORMS.index(shape.form) + 1,
                colours.index(shape.colour),
                sizes.index(shape.size),
                *path,
            ]
    return torch.tensor(states, dtype=torch.long).reshape(len(object_lists), len(POSITIONS), 5)


def background_indices(names: Sequence[str]) -> Tensor:
    """Long [N]."""
    return torch.tensor([list(BACKGROUNDS).index(name) for name in names], dtype=torch.long)


def to_quadrants(videos: Tensor) -> Tensor:
    """[N,F,C,32,32] -> [N,4,F,C,16,16]."""
    halves = videos.unflatten(-1, (2, QUADRANT)).unflatten(-3, (2, QUADRANT))  # [N,F,C,2,16,2,16]
    return halves.permute(0, 3, 5, 1, 2, 4, 6).flatten(1, 2)


def from_quadrants(quadrants: Tensor) -> Tensor:
    """[N,4,F,C,16,16] -> [N,F,C,32,32]."""
    return quadrants.unflatten(1, (2, 2)).permute(0, 3, 4, 1, 5, 2, 6).flatten(5, 6).flatten(3, 4)


def slot_coverage(states: Tensor) -> Tensor:
    """Coverage [N,4,F,16,16] of every slot's shape in its quadrant; zeros where the slot is empty."""
    form, _, size, x_speed, y_speed = states.unbind(-1)
    return coverage_table(states.device)[form, size, x_speed, y_speed]


def render_states(states: Tensor, backgrounds: Tensor) -> Tensor:
    """uint8 [N,F,3,32,32] from `slot_states` [N,4,5] and `background_indices` [N] on one device."""
    coverage = slot_coverage(states).unsqueeze(3)
    behind = palette(BACKGROUNDS, states.device)[backgrounds][:, None, None, :, None, None]
    colour = palette(COLOURS, states.device)[states[..., 1]][:, :, None, :, None, None]
    return from_quadrants(torch.lerp(behind.expand_as(coverage + colour), colour, coverage)).mul(255).round().byte()


def edit_mask(states: Tensor, target_states: Tensor, new_background: Tensor) -> Tensor:
    """Where the edit may change pixels: bool [N,F,1,32,32].

    Object edits: the pixels of the old and of the new shape, dilated by 2 pixels. Background edits (`new_background`
    [N] bool): everything but the fully covered pixels of unedited shapes (their soft rims mix with the background).
    """
    edited = (states != target_states).any(-1)[:, :, None, None, None]
    before, after = slot_coverage(states), slot_coverage(target_states)
    changed = from_quadrants((edited & (before + after > 0)).unsqueeze(3))
    near = F.max_pool2d(changed.flatten(0, 1).float(), 5, stride=1, padding=2).bool().view_as(changed)
    kept = from_quadrants((~edited & (before >= 1)).unsqueeze(3))
    return torch.where(new_background[:, None, None, None, None], ~kept, near)


def render_reference(states: Tensor) -> Tensor:
    """uint8 [N,3,32,32]: close-ups (twice the size) on white of one shape each, from states [N,5]; white for empty."""
    pixel = torch.arange(RESOLUTION, dtype=torch.float32) + 0.5 - RESOLUTION / 2
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    filled = [torch.stack([shape_coverage(form, 2 * radius, x, y) for radius in SIZES.values()]) for form in FORMS]
    table = torch.stack([torch.zeros_like(filled[0]), *filled]).to(states.device)
    coverage = table[states[:, 0], states[:, 2]].unsqueeze(1)
    colour = palette(COLOURS, states.device)[states[:, 1], :, None, None]
    return (1 - coverage + coverage * colour).mul(255).round().byte()


def scene_states(scenes: Sequence[EditScene], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The scenes as index tensors: source and target [N,4,5], source_background and target_background [N]."""
    return {
        "source": slot_states([scene.objects for scene in scenes]).to(device),
        "target": slot_states([scene.target_objects for scene in scenes]).to(device),
        "source_background": background_indices([scene.background for scene in scenes]).to(device),
        "target_background": background_indices([scene.target_background for scene in scenes]).to(device),
    }


def render_scenes(scenes: Sequence[EditScene], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """uint8 on `device`: source and target [N,5,3,32,32], mask [N,5,1,32,32] of {0,1}, reference [N,3,32,32].

    The reference is white where a scene has none. Thousands of scenes a second on one CPU core.
    """
    device, parts = torch.device(device), []
    for start in range(0, max(len(scenes), 1), 256):  # the float intermediates stay small: twice as fast
        chunk = scenes[start : start + 256]
        states = scene_states(chunk, device)
        source = render_states(states["source"], states["source_background"])
        target = render_states(states["target"], states["target_background"])
        new_background = states["source_background"] != states["target_background"]
        mask = edit_mask(states["source"], states["target"], new_background).byte()
        shown = slot_states([[replace(scene.reference, slot=0)] if scene.reference else [] for scene in chunk])[:, 0]
        parts.append(
            {"source": source, "target": target, "mask": mask, "reference": render_reference(shown.to(device))}
        )
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
