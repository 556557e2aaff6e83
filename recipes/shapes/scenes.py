"""Scenes of the embedded world: objects, edits, instructions, captions, sampling. Plain Python, no pixels.

A scene has one to three shapes in distinct quadrants of a 32×32 clip of 5 frames. Each shape moves in a straight line
through the centre of its quadrant and never leaves it, so shapes never overlap. An edit changes some quadrants or the
background; everything else, the motion of an edited shape included, stays as it was: source and instruction
(and reference image) determine the target.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from editrl.errors import EditrlError, did_you_mean

FRAMES, RESOLUTION, QUADRANT, FPS = 5, 32, 16, 8.0
FORMS = ("circle", "square", "triangle")
COLOURS = {
    "red": (225, 25, 25),
    "green": (20, 165, 45),
    "blue": (30, 60, 235),
    "yellow": (250, 220, 10),
    "purple": (195, 30, 215),
    "cyan": (15, 210, 225),
}
SIZES = {"small": 3.5, "large": 5.0}  # pixels from the centre of a shape to the sides of its bounding square
BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0), "brown": (110, 60, 20)}
POSITIONS = ("top left", "top right", "bottom left", "bottom right")  # by slot, in reading order
VELOCITIES = (-1.0, -0.5, 0.0, 0.5, 1.0)  # pixels a frame along each axis
TASKS = ("recolour", "reshape", "add", "remove", "background", "hybrid", "reference")
SPLITS = ("train", "heldout", "all")
HELD_OUT = (("red", "triangle"), ("blue", "circle"), ("yellow", "square"))  # (colour, form) never seen in training

TEMPLATES = {
    "recolour": (
        "make {object} {colour}",
        "paint {object} {colour}",
        "change the colour of {object} to {colour}",
    ),
    "reshape": ("turn {object} into a {form}", "change {object} into a {form}", "transform {object} into a {form}"),
    "add": ("add {new} in the {position}", "draw {new} in the {position}", "place {new} in the {position}"),
    "remove": ("remove {object}", "delete {object}", "erase {object}", "take {object} away"),
    "background": (
        "change the background to {background}",
        "make the background {background}",
        "use a {background} background",
    ),
    "reference": (
        "replace {object} with the object in the reference image",
        "swap {object} for the object shown in the reference image",
        "put the object from the reference image in place of {object}",
    ),
}


def _known(what: str, value, options: Iterable) -> None:
    options = list(options)
    if value not in options:
        hint = did_you_mean(value, options) if isinstance(value, str) else ""
        raise EditrlError(f"scene: {what} {value!r} does not exist; use one of {options}.{hint}")


@dataclass(frozen=True)
class Shape:
    """One object: its looks, its quadrant (slot 0-3, see POSITIONS) and its (x, y) velocity in pixels a frame."""

    form: str
    colour: str
    size: str
    slot: int
    velocity: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self):
        _known("form", self.form, FORMS)
        _known("colour", self.colour, COLOURS)
        _known("size", self.size, SIZES)
        _known("slot", self.slot, range(len(POSITIONS)))
        if len(self.velocity) != 2:
            raise EditrlError(f"scene: velocity {self.velocity!r} is not a pair; give (x, y) in pixels a frame.")
        for speed in self.velocity:
            _known("velocity", speed, VELOCITIES)

    def __str__(self):
        return f"a {self.size} {self.colour} {self.form}"


@dataclass(frozen=True)
class Edit:
    """One change: its kind (a task other than "hybrid"), the slot it is about, and the looks it gives."""

    kind: str
    slot: int | None = None
    colour: str | None = None
    form: str | None = None
    size: str | None = None
    background: str | None = None

    def __post_init__(self):
        _known("edit", self.kind, TEMPLATES)


@dataclass(frozen=True)
class EditScene:
    """A source scene, the edits asked for, and the instruction that asks for them. Immutable; JSON round trip."""

    id: str
    task: str
    instruction: str
    objects: tuple[Shape, ...]
    background: str
    edits: tuple[Edit, ...]

    def __post_init__(self):
        _known("task", self.task, TASKS)
        _known("background", self.background, BACKGROUNDS)
        _known("background", self.target_background, BACKGROUNDS)
        if len({shape.slot for shape in self.objects}) < len(self.objects):
            raise EditrlError(f"scene {self.id}: two objects share a slot; give each object its own quadrant.")
        if not self.edited_slots and not self.edits_background:
            raise EditrlError(f"scene {self.id}: its edits change nothing; an edit must differ from the source.")

    @cached_property
    def target_objects(self) -> tuple[Shape, ...]:
        """The objects after the edits, by slot."""
        shapes = {shape.slot: shape for shape in self.objects}
        for edit in self.edits:
            if edit.kind == "background":
                continue
            if (edit.slot in shapes) == (edit.kind == "add"):
                state = "taken" if edit.kind == "add" else "empty"
                raise EditrlError(f"scene {self.id}: edit {edit.kind!r} of slot {edit.slot}, which is {state}.")
            if edit.kind == "remove":
                del shapes[edit.slot]
            elif edit.kind == "add":
                shapes[edit.slot] = Shape(edit.form, edit.colour, edit.size, edit.slot)
            else:
                old = shapes[edit.slot]
                shapes[edit.slot] = replace(old, colour=edit.colour or old.colour, form=edit.form or old.form)
        return tuple(shapes[slot] for slot in sorted(shapes))

    @property
    def target_background(self) -> str:
        return next((edit.background for edit in self.edits if edit.kind == "background"), self.background)

    @property
    def edits_background(self) -> bool:
        return self.target_background != self.background

    @cached_property
    def edited_slots(self) -> tuple[int, ...]:
        """The quadrants whose object differs between source and target."""
        return tuple(sorted({shape.slot for shape in set(self.objects) ^ set(self.target_objects)}))

    @property
    def reference(self) -> Shape | None:
        """The object that the reference image shows, or None."""
        slots = [edit.slot for edit in self.edits if edit.kind == "reference"]
        return next((shape for shape in self.target_objects if shape.slot in slots), None)

    @property
    def source_caption(self) -> str:
        return caption_of(self.objects, self.background)

    @property
    def target_caption(self) -> str:
        return caption_of(self.target_objects, self.target_background)

    @property
    def combinations(self) -> set[tuple[str, str]]:
        """All (colour, form) pairs that source, target or reference show."""
        return {(shape.colour, shape.form) for shape in self.objects + self.target_objects}

    def to_dict(self) -> dict:
        """Plain JSON values; `EditScene.from_dict` gives an equal scene back."""
        objects = [{**vars(shape), "velocity": list(shape.velocity)} for shape in self.objects]
        edits = [dict(vars(edit)) for edit in self.edits]
        plain = {key: getattr(self, key) for key in ("id", "task", "instruction", "background")}
        return {**plain, "objects": objects, "edits": edits}

    @classmethod
    def from_dict(cls, values: dict) -> "EditScene":
        """Raises EditrlError for a missing or unknown key and for names that the world does not have."""
        try:
            objects = tuple(Shape(**{**shape, "velocity": tuple(shape["velocity"])}) for shape in values["objects"])
            edits = tuple(Edit(**edit) for edit in values["edits"])
            return cls(**{**values, "objects": objects, "edits": edits})
        except (KeyError, TypeError) as error:
            name = values.get("id", "?") if isinstance(values, dict) else "?"
            raise EditrlError(f"scene {name}: not a scene of the embedded world ({error}).") from error


# --- language ---------------------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """The words of an instruction or caption; a comma is a word of its own."""
    return re.findall(r"\w+|,", text.lower())


def caption_of(objects: Iterable[Shape], background: str) -> str:
    """All objects in reading order with size, colour, form and position, then the background."""
    phrases = [f"{shape} in the {POSITIONS[shape.slot]}" for shape in sorted(objects, key=lambda shape: shape.slot)]
    listed = " and ".join(filter(None, [", ".join(phrases[:-1]), *phrases[-1:]])) or "nothing"
    return f"{listed} on a {background} background"


def hard_negatives(scene: EditScene, rng: random.Random) -> list[str]:
    """Six wrong captions of the target, one for each attribute, all distinct and none of them true.

    In this order: colour, form, size, position, presence (an object more or less), background. A scene without held-out
    combinations gets negatives without them: a contrastive model would learn that those words are always wrong.
    (A hand-made target with nothing in it, or with four objects, has no use for some of the six; they are left out.)
    """
    objects, background = scene.target_objects, scene.target_background
    taken = {shape.slot for shape in objects}
    empty = [slot for slot in range(len(POSITIONS)) if slot not in taken]
    barred = () if scene.combinations & set(HELD_OUT) else HELD_OUT
    looks = [(form, colour) for colour in COLOURS for form in FORMS if (colour, form) not in barred]
    more = [(None, Shape(*rng.choice(looks), rng.choice(list(SIZES)), slot)) for slot in empty]
    changes = {
        "colour": [(old, replace(old, colour=colour)) for old in objects for colour in COLOURS if colour != old.colour],
        "form": [(old, replace(old, form=form)) for old in objects for form in FORMS if form != old.form],
        "size": [(old, replace(old, size=size)) for old in objects for size in SIZES if size != old.size],
        "position": [(old, replace(old, slot=slot)) for old in objects for slot in empty],
        "presence": [(old, None) for old in objects if len(objects) > 1] + more,
    }
    captions = []
    for options in changes.values():
        options = [(old, new) for old, new in options if new is None or (new.form, new.colour) in looks]
        if options:
            old, new = rng.choice(options)
            kept = [shape for shape in objects if shape is not old]
            captions.append(caption_of(kept + ([new] if new else []), background))
    other = rng.choice([name for name in BACKGROUNDS if name != background])
    return [*captions, caption_of(objects, other)]


def _vocabulary() -> tuple[str, ...]:
    templates = [re.sub(r"{\w+}", " ", text) for texts in TEMPLATES.values() for text in texts]
    names = [*FORMS, *COLOURS, *SIZES, *BACKGROUNDS, *POSITIONS]
    return tuple(sorted(set(words_of(" ".join([*templates, *names, "a the in on and nothing background ,"])))))


VOCABULARY = _vocabulary()  # every word of every instruction and caption, sorted


def _phrase(rng: random.Random, edit: Edit, objects: Sequence[Shape], always_name_position: bool) -> str:
    template, names = rng.choice(TEMPLATES[edit.kind]), vars(edit)
    if edit.kind == "background":
        return template.format(**names)
    if edit.kind == "add":
        return template.format(new=Shape(edit.form, edit.colour, edit.size, edit.slot), position=POSITIONS[edit.slot])
    old = next(shape for shape in objects if shape.slot == edit.slot)
    twins = sum((shape.colour, shape.form) == (old.colour, old.form) for shape in objects)
    place = f" in the {POSITIONS[old.slot]}" if always_name_position or twins > 1 or rng.random() < 0.5 else ""
    return template.format(object=f"the {old.colour} {old.form}{place}", **names)


# --- sampling ---------------------------------------------------------------------------------------------------------


def _draw_shape(rng: random.Random, slot: int) -> Shape:
    velocity = (rng.choice(VELOCITIES), rng.choice(VELOCITIES))
    return Shape(rng.choice(FORMS), rng.choice(list(COLOURS)), rng.choice(list(SIZES)), slot, velocity)


def _draw_edit(rng: random.Random, kind: str, shape: Shape | None, empty_slot: int, background: str) -> Edit:
    def other(options, current):
        return rng.choice([name for name in options if name != current])

    if kind == "background":
        return Edit(kind, background=other(BACKGROUNDS, background))
    if kind == "add":
        return Edit(kind, empty_slot, rng.choice(list(COLOURS)), rng.choice(FORMS), rng.choice(list(SIZES)))
    if kind == "recolour":
        return Edit(kind, shape.slot, colour=other(COLOURS, shape.colour))
    if kind == "reshape":
        return Edit(kind, shape.slot, form=other(FORMS, shape.form))
    if kind == "reference":
        pairs = [(colour, form) for colour in COLOURS for form in FORMS]
        colour, form = other(pairs, (shape.colour, shape.form))
        return Edit(kind, shape.slot, colour, form)
    return Edit(kind, shape.slot)


def _draw_scene(rng: random.Random, task: str, scene_id: str) -> EditScene:
    hybrid = task == "hybrid"
    kinds = rng.sample(["recolour", "reshape", "add", "remove", "background"], 2) if hybrid else [task]
    fewest = 2 if hybrid or task == "remove" else 1  # something is left to preserve
    slots = rng.sample(range(len(POSITIONS)), rng.randint(fewest, 2 if "add" in kinds else 3) + 1)
    empty_slot = slots.pop()
    objects = tuple(_draw_shape(rng, slot) for slot in sorted(slots))
    background = rng.choice(list(BACKGROUNDS))
    chosen = rng.sample(objects, min(len(kinds), len(objects)))  # two edits never share an object
    edits = tuple(
        _draw_edit(rng, kind, shape, empty_slot, background) for kind, shape in zip(kinds, chosen, strict=True)
    )
    # A hybrid names positions: "make the red circle blue and remove the blue circle" could mean two things.
    instruction = " and ".join(_phrase(rng, edit, objects, always_name_position=hybrid) for edit in edits)
    return EditScene(scene_id, task, instruction, objects, background, edits)


def sample_scenes(n: int, seed: int, split: str = "train", tasks: Sequence[str] = TASKS) -> list[EditScene]:
    """`n` random scenes, the tasks in turn; scene i depends on (seed, split, i, its task) alone.

    "train" scenes never show a combination of HELD_OUT in source, target or reference; every "heldout" scene shows at
    least one; "all" ignores them. Raises EditrlError for an unknown split or task.
    """
    _known("split", split, SPLITS)
    if not tasks or n < 0:
        raise EditrlError(
            f"sample_scenes: n is {n} and tasks is {tasks!r}; n must be 0 or more, with at least one task."
        )
    for task in tasks:
        _known("task", task, TASKS)

    def fits(scene: EditScene) -> bool:
        return split == "all" or bool(scene.combinations & set(HELD_OUT)) == (split == "heldout")

    scenes = []
    for index in range(n):
        scene_id, task = f"{split}-{seed}-{index:05d}", tasks[index % len(tasks)]
        rng = random.Random(f"{scene_id}-{task}")
        while not fits(scene := _draw_scene(rng, task, scene_id)):
            pass
        scenes.append(scene)
    return scenes
