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
    background: it waits more than it computes here, as for a server: in a rollout it is asked in a thread for the clips
        that are there while the next ones are sampled.
    """

    groupwise: bool = False
    batch_size: int | None = None
    frames: str | int = "all"
    keep_on: str = "gpu"
    background: bool = False

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
        for option in ("groupwise", "background"):
            if not isinstance(value := getattr(self, option), bool):
                raise EditrlError(f"{what}: {option} is {value!r}: give true or false.")
        if self.batch_size is not None and not _is_count(self.batch_size):
            raise EditrlError(f"{what}: batch_size is {self.batch_size!r}: give a positive whole number or null.")
        check_frames(self.frames, f"{what}: frames")
        if self.keep_on not in KEEP_ON:
            near = did_you_mean(str(self.keep_on), KEEP_ON)
            raise EditrlError(f"{what}: keep_on is {self.keep_on!r}: choose one of {', '.join(KEEP_ON)}.{near}")
        if self.groupwise and self.batch_size is not None:
            raise EditrlError(f"{what}: a groupwise reward sees a whole group at a time: drop batch_size.")
        if self.background and self.keep_on == "between":
            raise EditrlError(f"{what}: in the background it may be asked at any time: drop keep_on 'between'.")


OPTIONS = tuple(field.name for field in dataclasses.fields(RewardOptions))


def check_names(options: Mapping[str, Any], what: str) -> None:
    """EditrlError for an option that there is not."""
    for name in options:
        if name not in OPTIONS:
            raise EditrlError(f"{what}: no '{name}' among {', '.join(OPTIONS)}.{did_you_mean(str(name), OPTIONS)}")


def check_frames(frames: Any, what: str) -> None:
    """EditrlError for what `frame_indices` does not understand."""
    if frames not in ("all", "keyframes") and not _is_count(frames):
        raise EditrlError(f"{what} is {frames!r}: give a positive whole number or 'all', 'keyframes'.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


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
