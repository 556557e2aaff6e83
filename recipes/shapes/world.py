"""The embedded world in one import: a tiny video-editing task whose every answer is known.

Scenes of one to three moving shapes, edited by an instruction (recolour, reshape, add, remove, background, hybrid,
reference). `sample_scenes` draws them, `render_scenes` makes the clips, oracle.py judges edits, dataset.py writes data.
"""

from editrl.recipes.shapes.render import render_scenes, render_states, slot_states
from editrl.recipes.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    FORMS,
    FPS,
    FRAMES,
    HELD_OUT,
    POSITIONS,
    RESOLUTION,
    SIZES,
    SPLITS,
    TASKS,
    VELOCITIES,
    VOCABULARY,
    Edit,
    EditScene,
    Shape,
    caption_of,
    hard_negatives,
    sample_scenes,
    words_of,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "FORMS",
    "FPS",
    "FRAMES",
    "HELD_OUT",
    "POSITIONS",
    "RESOLUTION",
    "SIZES",
    "SPLITS",
    "TASKS",
    "VELOCITIES",
    "VOCABULARY",
    "Edit",
    "EditScene",
    "Shape",
    "caption_of",
    "hard_negatives",
    "render_scenes",
    "render_states",
    "sample_scenes",
    "slot_states",
    "words_of",
]
