"""What a judge is shown: frames of both clips, and a rubric from a text file."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from torch import Tensor

from editrl.errors import EditrlError, did_you_mean
from editrl.reward_options import frame_indices

PACKAGED = ("edit", "reference", "yes_no")
PLACEHOLDERS = ("instruction", "source_caption", "target_caption")
YES_NO = "answer: yes or no"


@dataclass(frozen=True)
class Prompt:
    """A rubric. The first line of its file says what is answered.

    `dimensions: a b c`: JSON with a score for each, 1 to 10. `answer: yes or no`. `answer: 1 to 9` (or up to another
    number): one mark.
    """

    name: str
    text: str
    dimensions: tuple[str, ...] = ()
    marks: tuple[int, ...] = ()  # with no dimensions either: yes or no

    @property
    def version(self) -> str:
        """Of the wording; scores with different versions do not compare."""
        return hashlib.sha256(f"{self.dimensions}{self.marks}{self.text}".encode()).hexdigest()[:12]

    @property
    def placeholders(self) -> list[str]:
        """Those of `PLACEHOLDERS` that are filled in."""
        return Template(self.text).get_identifiers()


def load_prompt(spec: str) -> Prompt:
    """A packaged prompt ("edit", "reference", "yes_no") or a text file of one's own.

    `$instruction`, `$source_caption` and `$target_caption` in it stand for those of the sample. EditrlError where there
    is no such file, or its first line does not say what is answered.
    """
    if spec in PACKAGED:
        written = (files(__package__) / "prompts" / f"{spec}.txt").read_text(encoding="utf-8")
    elif Path(spec).expanduser().is_file():
        written = Path(spec).expanduser().read_text(encoding="utf-8")
    else:
        near = did_you_mean(spec, PACKAGED)
        raise EditrlError(f"no prompt '{spec}': give a text file, or one of {', '.join(PACKAGED)}.{near}")
    first, _, text = written.partition("\n")
    kind, _, words = first.partition(":")
    dimensions = tuple(words.split()) if kind == "dimensions" else ()
    mark = re.fullmatch(r"answer: 1 to ([1-9]\d?)", first.strip())
    if not dimensions and not mark and first.strip() != YES_NO:
        raise EditrlError(
            f"the first line of the prompt '{spec}' must be `dimensions: <names>`, `{YES_NO}` or `answer: 1 to 9`."
        )
    template = Template(text)
    for name in template.get_identifiers() if template.is_valid() else ["$"]:
        if name not in PLACEHOLDERS:
            raise EditrlError(
                f"the prompt '{spec}' has the placeholder '{name}': there are {', '.join(PLACEHOLDERS)}; write $$ for "
                "a dollar sign."
            )
    return Prompt(Path(spec).stem, text.strip(), dimensions, tuple(range(1, int(mark[1]) + 1)) if mark else ())


def parts(
    prompt: Prompt,
    edited: Tensor,
    source: Tensor,
    texts: Mapping[str, str | None],
    reference: Tensor | None = None,
    frames: str | int = 8,
) -> list[str | Tensor]:
    """What is sent: texts and images [3,H,W] in [0,1], in order.

    Args:
        edited, source: [F,3,H,W] in [0,1]; of each, `frames` (see `frame_indices`) are shown.
        texts: values of `PLACEHOLDERS`.
        reference: [1,3,h,w], shown last.
    """
    for name in prompt.placeholders:
        if texts.get(name) is None:
            raise EditrlError(f"the prompt '{prompt.name}' wants ${name}, which this sample does not have.")
    shown = [*_shown("Source video", source, frames), *_shown("Edited video", edited, frames)]
    if reference is not None:
        shown += ["Reference image:", reference[0]]
    return [*shown, Template(prompt.text).substitute({name: texts[name] for name in prompt.placeholders})]


def _shown(what: str, clip: Tensor, frames: str | int) -> Sequence[str | Tensor]:
    images = list(clip[frame_indices(len(clip), frames)])
    return [f"{what}, {len(images)} frame{'s' if len(images) > 1 else ''}:", *images]
