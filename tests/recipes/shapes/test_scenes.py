"""Scenes of the embedded world: what is sampled, what the words say, and what is refused."""

import json
import random
import re

import pytest

from editrl.errors import EditrlError
from editrl.recipes.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    FORMS,
    HELD_OUT,
    POSITIONS,
    SPLITS,
    TASKS,
    VOCABULARY,
    Edit,
    EditScene,
    Shape,
    caption_of,
    hard_negatives,
    sample_scenes,
    words_of,
)

OBJECT = r"the (?P<colour>\w+) (?P<form>\w+)(?: in the (?P<place>(?:top|bottom) (?:left|right)))?"
GRAMMAR = {
    "background": [r"(?:change the background to|make the background) (?P<new>\w+)", r"use a (?P<new>\w+) background"],
    "add": [r"(?:add|draw|place) a (?P<size>\w+) (?P<colour>\w+) (?P<form>\w+) in the (?P<place>\w+ \w+)"],
    "remove": [rf"(?:remove|delete|erase) {OBJECT}", rf"take {OBJECT} away"],
    "reshape": [rf"(?:turn|change|transform) {OBJECT} into a (?P<new>\w+)"],
    "reference": [
        rf"replace {OBJECT} with the object in the reference image",
        rf"swap {OBJECT} for the object shown in the reference image",
        rf"put the object from the reference image in place of {OBJECT}",
    ],
    "recolour": [rf"(?:make|paint) {OBJECT} (?P<new>\w+)", rf"change the colour of {OBJECT} to (?P<new>\w+)"],
}


def read_instruction(text):
    """A second, independent reading of the language: (kind, named parts)."""
    for kind, patterns in GRAMMAR.items():
        for pattern in patterns:
            if match := re.fullmatch(pattern, text):
                return kind, match.groupdict()
    raise AssertionError(f"nobody could follow {text!r}")


def follow(instruction, objects, background, reference):
    """Do what the words say to the source: (objects by slot, background)."""
    result = {shape.slot: (shape.colour, shape.form, shape.size, shape.velocity) for shape in objects}
    for text in instruction.split(" and "):
        kind, words = read_instruction(text)
        if kind == "background":
            background = words["new"]
            continue
        if kind == "add":
            slot = POSITIONS.index(words["place"])
            assert slot not in result
            result[slot] = (words["colour"], words["form"], words["size"], (0.0, 0.0))
            continue
        meant = [
            shape
            for shape in objects
            if (shape.colour, shape.form) == (words["colour"], words["form"])
            and words["place"] in (None, POSITIONS[shape.slot])
        ]
        assert len(meant) == 1, f"{text!r} could mean {len(meant)} objects"
        colour, form, size, velocity = result.pop(meant[0].slot)
        if kind == "recolour":
            result[meant[0].slot] = (words["new"], form, size, velocity)
        elif kind == "reshape":
            result[meant[0].slot] = (colour, words["new"], size, velocity)
        elif kind == "reference":
            result[meant[0].slot] = (reference.colour, reference.form, size, velocity)
    return result, background


@pytest.mark.parametrize("split", SPLITS)
def test_source_instruction_and_reference_determine_the_target(split):
    for scene in sample_scenes(700, seed=1, split=split):
        objects, background = follow(scene.instruction, scene.objects, scene.background, scene.reference)
        wanted = {shape.slot: (shape.colour, shape.form, shape.size, shape.velocity) for shape in scene.target_objects}
        assert (objects, background) == (wanted, scene.target_background), scene


def test_scenes_are_a_function_of_seed_and_index():
    scenes = sample_scenes(30, seed=3)
    assert sample_scenes(30, seed=3) == scenes
    assert sample_scenes(10, seed=3) == scenes[:10]
    assert all(first.objects != second.objects for first, second in zip(scenes, sample_scenes(30, 4), strict=True))
    assert len({scene.id for scene in scenes}) == 30


def test_tasks_take_turns():
    assert [scene.task for scene in sample_scenes(14, seed=0)] == [*TASKS, *TASKS]
    assert {scene.task for scene in sample_scenes(5, seed=0, tasks=["add"])} == {"add"}


def test_a_scene_has_one_to_three_objects_before_and_after_and_something_to_preserve():
    for scene in sample_scenes(700, seed=5, split="all"):
        assert 1 <= len(scene.objects) <= 3
        assert 1 <= len(scene.target_objects) <= 3
        assert set(scene.objects) & set(scene.target_objects) or not scene.edits_background
        assert len(scene.edited_slots) + scene.edits_background == (2 if scene.task == "hybrid" else 1)


def test_held_out_combinations_stay_out_of_training_and_are_in_every_held_out_scene():
    held_out = set(HELD_OUT)
    assert len(held_out) == 3 and held_out <= {(colour, form) for colour in COLOURS for form in FORMS}
    assert not any(scene.combinations & held_out for scene in sample_scenes(700, seed=0, split="train"))
    assert all(scene.combinations & held_out for scene in sample_scenes(700, seed=0, split="heldout"))
    mixed = [bool(scene.combinations & held_out) for scene in sample_scenes(700, seed=0, split="all")]
    assert any(mixed) and not all(mixed)
    reference = next(scene for scene in sample_scenes(700, seed=0, split="all", tasks=["reference"]))
    assert (reference.reference.colour, reference.reference.form) in reference.combinations


def test_scenes_survive_json():
    for scene in sample_scenes(70, seed=2):
        assert EditScene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_captions_name_size_colour_form_and_position_in_reading_order():
    red, blue = Shape("circle", "red", "large", 0), Shape("square", "blue", "small", 3)
    text = "a large red circle in the top left and a small blue square in the bottom right on a white background"
    assert caption_of([blue, red], "white") == text
    green = Shape("triangle", "green", "small", 1)
    assert caption_of([red, green, blue], "black").startswith("a large red circle in the top left, a small green")
    assert caption_of([], "gray") == "nothing on a gray background"


def test_the_vocabulary_is_exactly_the_words_in_use():
    used = {"nothing"}
    rng = random.Random(0)
    for scene in sample_scenes(1400, seed=0, split="all"):
        texts = [scene.instruction, scene.source_caption, scene.target_caption, *hard_negatives(scene, rng)]
        used.update(*map(words_of, texts))
    assert used == set(VOCABULARY)
    assert list(VOCABULARY) == sorted(VOCABULARY)


def test_hard_negatives_are_six_different_wrong_captions():
    rng = random.Random(0)
    held_out_texts = [f"{colour} {form}" for colour, form in HELD_OUT]
    for scene in sample_scenes(350, seed=0, split="train"):
        truth = scene.target_caption
        negatives = hard_negatives(scene, rng)
        assert len({truth, *negatives}) == 7
        assert not any(text in negative for negative in negatives for text in held_out_texts)
        colour, form, size, _position, presence, background = negatives
        for negative in (colour, form, size, background):
            changed = [pair for pair in zip(words_of(truth), words_of(negative), strict=True) if len(set(pair)) == 2]
            assert len(changed) == 1
        assert len(words_of(presence)) != len(words_of(truth))
    scene = sample_scenes(1, seed=0)[0]
    assert hard_negatives(scene, random.Random(7)) == hard_negatives(scene, random.Random(7))


def test_held_out_scenes_have_held_out_negatives_too():
    rng = random.Random(0)
    texts = [
        text for scene in sample_scenes(200, 0, "heldout", ["background"]) for text in hard_negatives(scene, rng)[:2]
    ]
    truths = [scene.target_caption for scene in sample_scenes(200, 0, "heldout", ["background"]) for _ in range(2)]
    shown = [sum(text.count(f"{colour} {form}") for colour, form in HELD_OUT) for text in texts]
    there = [sum(text.count(f"{colour} {form}") for colour, form in HELD_OUT) for text in truths]
    assert any(new > old for new, old in zip(shown, there, strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "trian"}, "Did you mean 'train'"),
        ({"tasks": ["recolor"]}, "Did you mean 'recolour'"),
        ({"tasks": []}, "at least one task"),
        ({"n": -1}, "n is -1"),
    ],
)
def test_unknown_requests_are_refused(arguments, words):
    with pytest.raises(EditrlError, match=words):
        sample_scenes(**{"n": 1, "seed": 0, **arguments})


def scene_with(*edits, copies=1):
    return EditScene("x", "recolour", "", (Shape("circle", "red", "large", 0),) * copies, "white", edits)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: scene_with(Edit("recolour", 0, colour="red")), "change nothing"),
        (lambda: scene_with(Edit("background", background="white")), "change nothing"),
        (lambda: scene_with(Edit("remove", 1)), "slot 1, which is empty"),
        (lambda: scene_with(Edit("add", 0, "red", "circle", "small")), "slot 0, which is taken"),
        (lambda: scene_with(Edit("recolour", 0, colour="crimson")), "colour 'crimson' does not exist"),
        (lambda: scene_with(Edit("background", background="blakc")), "Did you mean 'black'"),
        (lambda: scene_with(Edit("remove", 0), copies=2), "share a slot"),
        (lambda: Shape("circle", "red", "large", 4), "slot 4 does not exist"),
        (lambda: Shape("circle", "red", "large", 0, (0.3, 0)), "velocity 0.3 does not exist"),
        (lambda: Shape("circle", "red", "large", 0, (0.5,)), "not a pair"),
        (lambda: EditScene.from_dict({"id": "a7"}), "scene a7: not a scene"),
        (lambda: EditScene.from_dict({**sample_scenes(1, 0)[0].to_dict(), "colour": "red"}), "unexpected keyword"),
        (lambda: EditScene.from_dict("circle"), "not a scene"),
    ],
)
def test_broken_scenes_are_refused(build, words):
    with pytest.raises(EditrlError, match=words):
        build()


def test_backgrounds_and_colours_are_far_apart():
    colours = [*COLOURS.values(), *BACKGROUNDS.values()]
    apart = [sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) ** 0.5 for x in colours for y in colours if x != y]
    assert min(apart) > 100  # of 255: more than a small codec's error
