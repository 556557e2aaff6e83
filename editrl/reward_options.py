"""How a reward wants to be asked: attributes of the reward, or keyword arguments of its decorator.

Imports nothing heavy: the decorator checks its arguments with this.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from editrl.errors import EditrlError, did_you_mean

KEEP_ON = ("gpu", "cpu", "between")


@dataclass(frozen=True)
class RewardOptions:
    """What a reward may say about itself; `reward_options` of a recipe overrides it by reward name.

    groupwise: each call sees the clips of exactly one group, all of them, as a ranking needs.
    batch_size: at most so many clips a call; None: as many as the `RewardSet` scores at a time.
    frames: which frames of `videos`, `source_videos`, `target_videos` and `masks` it is shown: "all", a number (the
        middles of that many equal stretches), or "keyframes" (first, middle and last).
    keep_on: "gpu": its model stays on the training device; "cpu": never moves there; "between": lies in main memory
        and is on the device while the clips of a rollout are scored. The last two need a `to(device)`.
    """

    groupwise: bool = False
    batch_size: int | None = None
    frames: str | int = "all"
    keep_on: str = "gpu"

    @classmethod
    def of(cls, name: str, reward: Any, overrides: Mapping[str, Any]) -> "RewardOptions":
        """The reward's own attributes, then the overrides. EditrlError for an unknown option or a wrong value."""
        check_names(overrides, f"options of reward '{name}'")
        own = {option: getattr(reward, option) for option in OPTIONS if hasattr(reward, option)}
        options = cls(**own | dict(overrides))
        options._check(f"reward '{name}'")
        if options.keep_on != "gpu" and not callable(getattr(reward, "to", None)):
            raise EditrlError(f"reward '{name}': keep_on {options.keep_on!r} needs a method `to(device)`.")
        return options

    def _check(self, what: str) -> None:
        if not isinstance(self.groupwise, bool):
            raise EditrlError(f"{what}: groupwise is {self.groupwise!r}: give true or false.")
        for option in ("batch_size", "frames"):
            value = getattr(self, option)
            known = value is None if option == "batch_size" else value in ("all", "keyframes")
            if not known and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                others = "null" if option == "batch_size" else "'all', 'keyframes'"
                raise EditrlError(f"{what}: {option} is {value!r}: give a positive whole number or {others}.")
        if self.keep_on not in KEEP_ON:
            near = did_you_mean(str(self.keep_on), KEEP_ON)
            raise EditrlError(f"{what}: keep_on is {self.keep_on!r}: choose one of {', '.join(KEEP_ON)}.{near}")
        if self.groupwise and self.batch_size is not None:
            raise EditrlError(f"{what}: a groupwise reward sees a whole group at a time: drop batch_size.")


OPTIONS = tuple(field.name for field in dataclasses.fields(RewardOptions))


def check_names(options: Mapping[str, Any], what: str) -> None:
    """EditrlError for an option that there is not."""
    for name in options:
        if name not in OPTIONS:
            raise EditrlError(f"{what}: no '{name}' among {', '.join(OPTIONS)}.{did_you_mean(str(name), OPTIONS)}")


def frame_indices(count: int, frames: str | int | None) -> list[int]:
    """Which of `count` frames are looked at.

    "all" or None: every one. A number n: the middles of n equal stretches (all, if there are no more). "keyframes":
    first, middle and last, each once.
    """
    if frames == "keyframes":
        return sorted({0, (count - 1) // 2, count - 1})
    if frames in (None, "all") or frames >= count:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * frames) for i in range(frames)]
