"""Rewards: what a scorer is offered, and `RewardSet`, which asks many scorers and lets no failure pass as a number.

A reward is a callable that takes keyword arguments by name and returns one float a sample (TRL's convention):

    @editrl.register_reward("sharpness")
    def sharpness(videos, **kwargs):
        return [video.diff(dim=-1).abs().mean().item() for video in videos]

It is offered `videos` (the edited clips, a list of [F,3,H,W] float32 in [0,1]), `cache` (a dict that lives for one
scoring call; rewards that share a model keep its outputs there), the columns of `COLUMNS`, and every further column of
the data set under its own name. `None` for a sample means "not applicable". A class with the same `__call__` may also
have `name`, `to(device)` and `requires` (the columns that must be filled in every row). `RewardOptions` says how it may
ask to be called.
"""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from editrl.errors import EditrlError, OutageError, did_you_mean
from editrl.registry import load_reward
from editrl.reward_options import RewardOptions, frame_indices
from editrl.reward_weights import WeightSchedule, read_schedule

if TYPE_CHECKING:
    from editrl.data import EditDataset, EditExample

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
_CLIPS = ("videos", "source_videos", "target_videos", "masks")  # what has frames that belong together
_OFFERED_ALWAYS = {"videos", "cache", "ids", "fps"}  # never missing, whatever the row holds
_RESERVED = {"videos", "cache"} | {name for name, field in COLUMNS.items() if name != field}


def reward_columns(examples: "Sequence[EditExample]") -> dict[str, list]:
    """The columns of `COLUMNS` and every extra column of the examples, each a list with one value per example.

    An example that lacks an extra column which another one has gets None there. The values are the examples' own
    objects, not copies: an example that is repeated for its group gives the same source tensor each time.
    """
    columns = {name: [getattr(example, field) for example in examples] for name, field in COLUMNS.items()}
    for key in dict.fromkeys(key for example in examples for key in example.extra):
        _refuse_reserved(key)
        columns[key] = [example.extra.get(key) for example in examples]
    return columns


class RewardSet:
    """Several rewards asked together.

    Args:
        rewards: registered names, "package.module:Name", "path/file.py:Name", or the callables themselves.
        weights: one a reward, a number or a schedule (see `editrl.reward_weights`); default 1 each. Kept for whoever
            aggregates; the scores are not weighted.
        kwargs: reward name -> constructor arguments (a function gets them bound).
        options: reward name -> what overrides the reward's own `RewardOptions`.
        batch_size: score this many samples at a time (bounds the memory of the reward models); None: all at once.
            A group that a groupwise reward must see whole is never cut.

    Attributes: `names` [K], `schedules` [K], `requires` (columns that some reward needs in every row), `groupwise`
    (names of the rewards that compare the clips of a group), `seconds` (name -> wall time in the last call, moving
    its model included; what rewards share is paid by the first that asks for it).
    """

    def __init__(
        self,
        rewards: Sequence[str | Reward],
        *,
        weights: Sequence[float | dict | list] | None = None,
        kwargs: dict[str, dict[str, Any]] | None = None,
        options: dict[str, dict[str, Any]] | None = None,
        batch_size: int | None = None,
    ):
        if isinstance(rewards, str) or not rewards:
            raise EditrlError(f"rewards is {rewards!r}: give a list with at least one reward name or callable.")
        if batch_size is not None and batch_size < 1:
            raise EditrlError(f"reward batch_size is {batch_size}: give a positive number, or None for all at once.")
        self.names = [reward_name(reward) for reward in rewards]
        self.schedules = _schedules(weights, self.names)
        self.batch_size = batch_size
        self.seconds = dict.fromkeys(self.names, 0.0)
        kwargs, options = kwargs or {}, options or {}
        for i, name in enumerate(self.names):
            if name in self.names[:i]:
                raise EditrlError(f"reward '{name}' is listed twice: pass objects and give one of them another `name`.")
        for what, given in (("kwargs", kwargs), ("options", options)):
            for name in given.keys() - set(self.names):
                raise EditrlError(
                    f"reward {what} for '{name}', which is not among the rewards ({', '.join(self.names)})."
                    + did_you_mean(name, self.names)
                )
        self._members = [
            _member(name, load_reward(reward, **kwargs.get(name, {})), options.get(name, {}))
            for name, reward in zip(self.names, rewards, strict=True)
        ]
        self.requires = set().union(*(member.requires for member in self._members))
        self.groupwise = [member.name for member in self._members if member.options.groupwise]
        self._device: torch.device | str | None = None

    @property
    def weights(self) -> torch.Tensor:
        """The weights of the first update, float32 [K]."""
        return self.weights_at(0)

    def weights_at(self, update: int) -> torch.Tensor:
        """The weights of the update with this number (from 0), float32 [K]; the same however often a run resumed."""
        return torch.tensor([schedule(update) for schedule in self.schedules], dtype=torch.float32)

    def to(self, device: torch.device | str) -> "RewardSet":
        """Move every reward that has a `to` (this is where the CLIP rewards load their weights). Returns self.

        Those that are kept elsewhere (`keep_on`) go to the CPU.
        """
        self._device = device
        for member in self._members:
            if callable(getattr(member.reward, "to", None)):
                member.reward.to(device if member.options.keep_on == "gpu" else "cpu")
        return self

    def check(self, dataset: "EditDataset") -> None:
        """Raise `EditrlError` for the first row that lacks a column some reward needs. Decodes nothing.

        Call it before training: a missing caption is better found now than at the first row that lacks it.
        """
        for index in tqdm(range(len(dataset)), desc="checking reward columns", delay=2, leave=False):
            row = dataset.row(index)
            for key in row:
                _refuse_reserved(key)
            for member in self._members:
                for column in sorted(member.requires):
                    key = COLUMNS.get(column, column)
                    if row.get(key) is None:
                        others = set(row) - set(COLUMNS.values()) - {key}
                        raise EditrlError(
                            f"reward '{member.name}' needs '{column}', but row {index} (id {row.get('id')!r}) has no "
                            f"'{key}': add it to that row, or leave the reward out." + did_you_mean(key, others)
                        )

    def __call__(
        self,
        videos: Sequence[torch.Tensor],
        columns: dict[str, list],
        group_ids: Sequence[int] | None = None,
        cache: dict | None = None,
    ) -> torch.Tensor:
        """Score N clips with K rewards.

        Args:
            videos: N edited clips, [F,3,H,W] float32 in [0,1].
            columns: name -> N values, as `reward_columns` makes them.
            group_ids: N integers; clips with one id are a group, in any order. Groupwise rewards need them.
            cache: shared with whoever scores the same clips; None: a new one for each `batch_size` clips.

        Returns: float32 CPU tensor [N,K]; NaN where a reward said None (not applicable).

        Raises: EditrlError, naming reward and sample, when a reward raises, returns another number of values, a
            non-number, NaN or infinity, or needs a column that a sample lacks, or groups that were not given.
        """
        videos = list(videos)
        for column, values in columns.items():
            if len(values) != len(videos):
                raise EditrlError(f"column '{column}' has {len(values)} values for {len(videos)} videos.")
        labels = _labels(len(videos), columns.get("ids"))
        columns = columns | {"videos": videos}
        groups = self._groups(len(videos), group_ids)
        self.seconds = dict.fromkeys(self.names, 0.0)
        scores = torch.empty(len(videos), len(self.names))
        with self._models_on_device():
            for chunk in _chunks(groups, self.batch_size or max(len(videos), 1)):
                shared = {} if cache is None else cache
                for k, member in enumerate(self._members):
                    began = time.perf_counter()
                    for part in member.calls(chunk):
                        scores[part, k] = member.score(columns, part, labels, shared)
                    self.seconds[member.name] += time.perf_counter() - began
        return scores

    def _groups(self, count: int, group_ids: Sequence[int] | None) -> list[list[int]]:
        """The numbers of the clips that must not be parted: of each group, or each clip for itself."""
        if not self.groupwise:
            return [[i] for i in range(count)]
        if group_ids is None or len(group_ids) != count:
            given = "no group_ids were given" if group_ids is None else f"there are {len(group_ids)} group_ids"
            raise EditrlError(
                f"reward '{self.groupwise[0]}' compares the clips of a group, but {given} for {count} videos."
            )
        members: dict[int, list[int]] = {}
        for i, group in enumerate(group_ids):
            members.setdefault(int(group), []).append(i)
        return list(members.values())

    @contextmanager
    def _models_on_device(self) -> Iterator[None]:
        """Those that lie in main memory between two calls are on the device within the block."""
        between = [m for m in self._members if m.options.keep_on == "between" and self._device is not None]
        try:
            for member in between:
                self._move(member, self._device)
            yield
        finally:
            for member in between:
                self._move(member, "cpu")

    def _move(self, member: "_Member", device: torch.device | str) -> None:
        began = time.perf_counter()
        member.reward.to(device)
        self.seconds[member.name] += time.perf_counter() - began


@dataclass(frozen=True)
class _Member:
    """One reward, what its signature says, and how it wants to be asked."""

    name: str
    reward: Reward
    accepts: frozenset[str] | None  # None: it takes **kwargs, that is, everything
    requires: frozenset[str]
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
            offered |= {name: self._sampled(offered[name], cache) for name in _CLIPS if name in offered}
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


def _member(name: str, reward: Any, options: dict[str, Any]) -> _Member:
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
    return _Member(
        name,
        reward,
        accepts=None if takes_everything else frozenset(named),
        requires=frozenset(requires) - _OFFERED_ALWAYS,
        options=RewardOptions.of(name, reward, options),
    )


def _chunks(groups: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    """Neighbouring groups with `size` clips at most; a larger group is a chunk of its own."""
    chunk: list[list[int]] = []
    for group in groups:
        if chunk and sum(map(len, chunk)) + len(group) > size:
            yield chunk
            chunk = []
        chunk.append(group)
    if chunk:
        yield chunk


def reward_name(reward: Any) -> str:
    """The registered name, the name behind the colon, or what the object calls itself."""
    if isinstance(reward, str):
        return reward.rpartition(":")[2]
    return getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__


def _schedules(weights: Sequence[float | dict | list] | None, names: list[str]) -> list[WeightSchedule]:
    weights = [1.0] * len(names) if weights is None else list(weights)
    if len(weights) != len(names):
        raise EditrlError(
            f"{len(weights)} reward weights for {len(names)} rewards ({', '.join(names)}): give one each."
        )
    schedules = [read_schedule(weight, name) for name, weight in zip(names, weights, strict=True)]
    for update in sorted({update for schedule in schedules for update, _ in schedule.points}):
        if not all(schedule.constant for schedule in schedules) and not any(s(update) for s in schedules):
            raise EditrlError(
                f"at update {update} the weights of all rewards are 0: nothing would be learned from there."
            )
    return schedules


def _labels(count: int, ids: list | None) -> list[str]:
    return [f"sample {i}" if ids is None else f"sample {i} (id {ids[i]!r})" for i in range(count)]


def _span(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]} to {labels[-1]}"


def _refuse_reserved(column: str) -> None:
    if column in _RESERVED:
        raise EditrlError(f"a data-set column is called '{column}', which names something else to a reward: rename it.")
