"""Weights of rewards that may change in the course of a run, as functions of the update's number alone."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from editrl.errors import EditrlError, did_you_mean

SHAPES = ("linear", "cosine")
_KEYS = ("start", "end", "steps", "shape")


@dataclass(frozen=True)
class WeightSchedule:
    """A weight at every update: interpolated between (update, value) points, constant before and after them.

    "linear" between two points; "cosine" leaves one and reaches the next with slope 0 (half a cosine wave, as cosine
    annealing does, Loshchilov & Hutter 2017).
    """

    points: tuple[tuple[float, float], ...]
    shape: str = "linear"

    def __call__(self, update: int) -> float:
        """The weight at the update with this number, counted from 0."""
        after = bisect_right([step for step, _ in self.points], update)
        if after in (0, len(self.points)):
            return self.points[min(after, len(self.points) - 1)][1]
        (step, value), (next_step, next_value) = self.points[after - 1 : after + 1]
        share = (update - step) / (next_step - step)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return value + share * (next_value - value)

    @property
    def constant(self) -> bool:
        return len({value for _, value in self.points}) == 1


def read_schedule(weight: Any, name: str) -> WeightSchedule:
    """The schedule that a recipe wrote for reward `name`.

    A number; `{start, end, steps}` (`shape`: linear or cosine), from the first value to the second in that many
    updates; or a list of `[update, value]` points. EditrlError for anything else.
    """
    what = f"the weight of reward '{name}'"
    if _is_number(weight):
        return WeightSchedule(((0, _finite(weight, what)),))
    if isinstance(weight, dict):
        return _between(weight, what)
    if isinstance(weight, Sequence) and not isinstance(weight, str) and weight:
        return _through(weight, what)
    raise EditrlError(
        f"{what} is {weight!r}: give a number, {{start: 1.0, end: 0.2, steps: 200}}, or [[update, value], ...]."
    )


def _between(weight: dict, what: str) -> WeightSchedule:
    for key in weight:
        if key not in _KEYS:
            raise EditrlError(f"{what} has '{key}', which is none of {', '.join(_KEYS)}.{did_you_mean(key, _KEYS)}")
    missing = [key for key in _KEYS[:3] if key not in weight]
    if missing:
        raise EditrlError(f"{what} has no '{missing[0]}': give {{start: 1.0, end: 0.2, steps: 200}}.")
    steps, shape = weight["steps"], weight.get("shape", "linear")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise EditrlError(f"{what}: steps is {steps!r}: give a positive whole number of updates.")
    if shape not in SHAPES:
        raise EditrlError(f"{what}: shape is {shape!r}: choose one of {', '.join(SHAPES)}.")
    start, end = (_finite(weight[key], f"{what}, at its {key},") for key in ("start", "end"))
    return WeightSchedule(((0, start), (steps, end)), shape)


def _through(points: Sequence, what: str) -> WeightSchedule:
    read = []
    for point in points:
        if not isinstance(point, Sequence) or isinstance(point, str) or len(point) != 2:
            raise EditrlError(f"{what} has the point {point!r}: give [update, value].")
        update, value = point
        if not _is_number(update) or not update >= 0 or (read and update <= read[-1][0]):
            raise EditrlError(f"{what}: the updates of its points must be at least 0 and rise, got {update!r}.")
        read.append((update, _finite(value, f"{what}, at update {update},")))
    return WeightSchedule(tuple(read))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any, what: str) -> float:
    if not _is_number(value) or not math.isfinite(value):
        raise EditrlError(f"{what} is {value}: give a finite number.")
    return float(value)
