"""One reward of a set: what it is offered, and what of its answer is a score."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from editrl.errors import EditrlError, OutageError, did_you_mean
from editrl.reward_options import RewardOptions, frame_indices

Reward = Callable[..., Sequence[float | None]]

# The name a reward asks for (one value a sample) -> the field of EditExample, which is also the key of a row.
COLUMNS = {
    "ids": "id",
    "tasks": "task",
    "instructions": "instruction",
    "source_videos": "source",
    "target_videos": "target",
    "reference_images": "reference_image",
    "masks": "mask",
    "source_captions": "source_caption",
    "target_captions": "target_caption",
    "fps": "fps",
}
CLIPS = ("videos", "source_videos", "target_videos", "masks")  # what has frames that belong together
OFFERED_ALWAYS = {"videos", "cache", "ids", "fps"}  # never missing, whatever the row holds


@dataclass(frozen=True)
class Member:
    """One reward, what its signature says, and how it wants to be asked."""

    name: str
    reward: Reward
    accepts: frozenset[str] | None  # None: it takes **kwargs, that is, everything
    requires: frozenset[str]
    columns: frozenset[str]  # what it may look at: its parameters, `requires`, and its own `columns`
    options: RewardOptions

    def calls(self, groups: list[list[int]]) -> list[list[int]]:
        """The numbers of the clips of each call, for the clips of `groups`."""
        if self.options.groupwise:
            return groups
        clips = [i for group in groups for i in group]
        size = self.options.batch_size or len(clips)
        return [clips[start : start + size] for start in range(0, len(clips), size)]

    def score(self, columns: dict[str, list], part: list[int], labels: list[str], cache: dict) -> torch.Tensor:
        """float32 [n] for the n samples whose numbers are `part`; NaN for None."""
        offered = {name: [values[i] for i in part] for name, values in columns.items()}
        labels = [labels[i] for i in part]
        for column in sorted(self.requires):
            for value, label in zip(offered.get(column, [None] * len(labels)), labels, strict=True):
                if value is None:
                    raise EditrlError(
                        f"reward '{self.name}' needs '{column}', which {label} does not have: "
                        f"add '{COLUMNS.get(column, column)}' to its row, or leave the reward out."
                        + ("" if column in offered else did_you_mean(column, offered))
                    )
        if self.options.frames != "all":
            offered |= {name: self._sampled(offered[name], cache) for name in CLIPS if name in offered}
        offered["cache"] = cache
        arguments = {name: value for name, value in offered.items() if self.accepts is None or name in self.accepts}
        try:
            with torch.no_grad():
                result = self.reward(**arguments)
        except Exception as error:  # somebody else's code: whatever it raises, say which reward and samples it was
            reason = " ".join(str(error).split())
            kind = OutageError if isinstance(error, OutageError) else EditrlError  # training can wait for an outage
            raise kind(f"reward '{self.name}' failed on {_span(labels)}: {type(error).__name__}: {reason}") from error
        return self._as_scores(result, labels)

    def _sampled(self, clips: list[torch.Tensor | None], cache: dict) -> list[torch.Tensor | None]:
        """The frames that it is shown. One tensor for one clip, by which rewards that share a model recognise it."""
        frames = self.options.frames
        memo = cache.setdefault(("frames", frames), {})
        for clip in clips:
            if clip is not None and id(clip) not in memo:
                memo[id(clip)] = (clip, clip[frame_indices(len(clip), frames)])
        return [None if clip is None else memo[id(clip)][1] for clip in clips]

    def _as_scores(self, result: Any, labels: list[str]) -> torch.Tensor:
        values = result.tolist() if hasattr(result, "tolist") else result
        if not isinstance(values, list | tuple):
            raise EditrlError(
                f"reward '{self.name}' returned {type(result).__name__} for {_span(labels)}: return a list of floats."
            )
        if len(values) != len(labels):
            raise EditrlError(
                f"reward '{self.name}' returned {len(values)} values for {len(labels)} videos ({_span(labels)})."
            )
        return torch.tensor([self._as_score(value, label) for value, label in zip(values, labels, strict=True)])

    def _as_score(self, value: Any, label: str) -> float:
        if value is None:
            return math.nan
        if getattr(value, "ndim", None) == 0:  # a tensor or a NumPy scalar
            value = value.item()
        if not isinstance(value, Real):
            raise EditrlError(
                f"reward '{self.name}' returned {type(value).__name__} for {label}: a score is a float, or None where "
                "it does not apply."
            )
        if not abs(value) <= torch.finfo(torch.float32).max:  # NaN, infinite, or too large for float32
            raise EditrlError(
                f"reward '{self.name}' returned {value} for {label}: a score is finite; return None where it does not "
                "apply."
            )
        return float(value)


def member_of(name: str, reward: Any, options: dict[str, Any]) -> Member:
    if not callable(reward):
        raise EditrlError(f"reward '{name}' is {type(reward).__name__}, which cannot be called.")
    function = reward.forward if isinstance(reward, torch.nn.Module) else reward  # Module.__call__ hides the names
    parameters = inspect.signature(function).parameters.values()
    named = {p.name: p.default for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    requires = getattr(reward, "requires", None)
    if requires is None:
        requires = {name for name, default in named.items() if default is inspect.Parameter.empty}
    elif isinstance(requires, str):
        requires = {requires}
    takes_everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return Member(
        name,
        reward,
        accepts=None if takes_everything else frozenset(named),
        requires=frozenset(requires) - OFFERED_ALWAYS,
        columns=frozenset({*named, *requires, *getattr(reward, "columns", ())}) - {"cache"},
        options=RewardOptions.of(name, reward, options),
    )


def chunks(groups: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    """Neighbouring groups with `size` clips at most; a larger group is a chunk of its own."""
    chunk: list[list[int]] = []
    for group in groups:
        if chunk and sum(map(len, chunk)) + len(group) > size:
            yield chunk
            chunk = []
        chunk.append(group)
    if chunk:
        yield chunk


def numbered(count: int, ids: list | None) -> list[str]:
    return [f"sample {i}" if ids is None else f"sample {i} (id {ids[i]!r})" for i in range(count)]


def _span(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]} to {labels[-1]}"
