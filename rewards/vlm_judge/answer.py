"""From what a judge said to numbers: tolerant of how it is wrapped, strict about what it says."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

LOWEST, HIGHEST = 1, 10


class UnreadableAnswer(ValueError):
    """No score can be read from an answer; the message says why, for the judge to read as well."""


@dataclass(frozen=True)
class Answer:
    """Scores by dimension, the reason that was given, and the text itself."""

    scores: dict[str, float]
    reason: str
    raw: str


def read_scores(text: str, dimensions: Sequence[str]) -> Answer:
    """The scores of the first JSON object in `text` that has one for each dimension.

    Code fences and prose around it do no harm, nor do keys like "Instruct follow score (1-10)" or numbers as strings
    ("8", "8/10"). A key that is the dimension itself, but for case and punctuation, wins over such keys.

    Raises: UnreadableAnswer when there is no such object, a score is not a number from 1 to 10, or two keys could mean
        the same dimension.
    """
    missing = "there is no JSON object in it"
    for found in _objects(text):
        keys = {dimension: _keys(found, dimension, dimensions) for dimension in dimensions}
        doubled = next((dimension for dimension, matching in keys.items() if len(matching) > 1), None)
        if doubled:
            raise UnreadableAnswer(f"{' and '.join(keys[doubled])} could both be '{doubled}'")
        absent = next((dimension for dimension, matching in keys.items() if not matching), None)
        if absent:
            missing = f"its JSON object has no '{absent}'"
            continue
        scores = {dimension: _score(found[key], dimension) for dimension, (key,) in keys.items()}
        reasons = [str(value) for key, value in found.items() if "reason" in key.lower()]
        return Answer(scores, " ".join(reasons), text)
    raise UnreadableAnswer(missing)


def read_yes_no(text: str) -> Answer:
    """1 for yes, 0 for no, under the dimension "yes". UnreadableAnswer when neither or both are said."""
    said = set(re.findall(r"\b(yes|no)\b", text.lower()))
    if len(said) != 1:
        raise UnreadableAnswer("it says neither yes nor no" if not said else "it says both yes and no")
    return Answer({"yes": float(said == {"yes"})}, "", text)


def read_mark(text: str, marks: Sequence[int]) -> Answer:
    """The one number of `text`, under the dimension "mark"; "8/10" is 8. UnreadableAnswer unless it is in `marks`."""
    said = set(re.findall(r"-?\d+(?:\.\d+)?", re.sub(rf"/\s*{marks[-1]}\b", "", text)))
    if len(said) != 1:
        raise UnreadableAnswer(f"it says {', '.join(sorted(said)) or 'no number'}, not one number")
    value = float(said.pop())
    if value not in marks:
        raise UnreadableAnswer(f"it says {value:g}, not one of {marks[0]} to {marks[-1]}")
    return Answer({"mark": value}, "", text)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            end = start + 1
        else:
            yield value
        start = text.find("{", end)


def _keys(found: dict[str, Any], dimension: str, dimensions: Sequence[str]) -> list[str]:
    """The keys that could mean the dimension: those that are its name, or else those that are like it.

    What is the name of another dimension means that one: motion_quality is not motion.
    """
    exact = [key for key in found if _plain(key) == _plain(dimension)]
    names = {_plain(name) for name in dimensions}
    return exact or [key for key in found if _plain(key) not in names and _means(key, dimension)]


def _plain(name: str) -> str:
    """ "Edit OK" and "edit-ok" are edit_ok."""
    return re.sub(r"[\W_]+", "_", name.lower()).strip("_")


def _means(key: str, dimension: str) -> bool:
    """Whether each word of the dimension begins like a word of the key: "instruct follow" is instruction_following.

    Of three letters or fewer, a word has to be the same: "a" begins too many others.
    """
    words = _plain(key).split("_")
    return all(
        any(part == word or (len(word) > 3 and (part.startswith(word) or word.startswith(part))) for word in words)
        for part in _plain(dimension).split("_")
    )


def _score(value: Any, dimension: str) -> float:
    if isinstance(value, dict) and "score" in value:
        value = value["score"]
    if isinstance(value, str) and (number := re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*(?:/\s*{HIGHEST})?\s*", value)):
        value = float(number[1])
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UnreadableAnswer(f"'{dimension}' is {value!r}, not a number")
    if not LOWEST <= value <= HIGHEST:
        raise UnreadableAnswer(f"'{dimension}' is {value}, not from {LOWEST} to {HIGHEST}")
    return float(value)
