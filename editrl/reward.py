"""Rewards: what a scorer is offered, and `RewardSet`, which asks many scorers and lets no failure pass as a number.

A reward is a callable that takes keyword arguments by name and returns one float a sample (TRL's convention):

    @editrl.register_reward("sharpness")
    def sharpness(videos, **kwargs):
        return [video.diff(dim=-1).abs().mean().item() for video in videos]

It is offered `videos` (the edited clips, a list of [F,3,H,W] float32 in [0,1]), `cache` (a dict that lives for one
scoring call; rewards that share a model keep its outputs there), the columns of `COLUMNS`, and every further column of
the data set under its own name. `None` for a sample means "not applicable". A class with the same `__call__` may also
have `name`, `to(device)`, `requires` (the columns that must be filled in every row) and `columns` (those that it looks
for in its **kwargs, for who sends it no others). `RewardOptions` says how it may ask to be called.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from editrl.errors import EditrlError, did_you_mean
from editrl.registry import load_reward, reward_name
from editrl.reward_ahead import Ahead, RewardThread
from editrl.reward_member import COLUMNS, Member, Reward, chunks, member_of, numbered
from editrl.reward_weights import WeightSchedule, read_schedule

if TYPE_CHECKING:
    from editrl.data import EditDataset, EditExample

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
        rewards: registered names, "package.module:Name", "path/file.py:Name", or the callables themselves. Of one kind
            twice: "quality=remote", "alignment=remote"; everywhere else they then go by these names.
        weights: one a reward, a number or a schedule (see `editrl.reward_weights`); default 1 each. Kept for whoever
            aggregates; the scores are not weighted.
        kwargs: reward name -> constructor arguments (a function gets them bound).
        options: reward name -> what overrides the reward's own `RewardOptions`.
        batch_size: score this many samples at a time (bounds the memory of the reward models); None: all at once.
            A group that a groupwise reward must see whole is never cut.

    Attributes: `names` [K], `schedules` [K], `requires` (columns that some reward needs in every row), `columns` (those
    that some reward may look at: its parameters, `requires`, and its own attribute `columns`), `groupwise`
    (names of the rewards that compare the clips of a group), `background` (names of those that may be asked `ahead`),
    `seconds` (name -> wall time in the last call, moving its model included; what rewards share is paid by the first
    that asks for it, and one that was asked ahead counts with what was still to be waited for it).
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
                raise EditrlError(
                    f"reward '{name}' is listed twice: give one of them another name, as in other={name} (an object "
                    "its own `name`)."
                )
        for what, given in (("kwargs", kwargs), ("options", options)):
            for name in given.keys() - set(self.names):
                raise EditrlError(
                    f"reward {what} for '{name}', which is not among the rewards ({', '.join(self.names)})."
                    + did_you_mean(name, self.names)
                )
        self._members = [
            member_of(name, load_reward(reward, **kwargs.get(name, {})), options.get(name, {}))
            for name, reward in zip(self.names, rewards, strict=True)
        ]
        self.requires = set().union(*(member.requires for member in self._members))
        self.columns = set().union(*(member.columns for member in self._members))
        self.groupwise = [member.name for member in self._members if member.options.groupwise]
        self.background = [member.name for member in self._members if member.options.background]
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
        ahead: Ahead | None = None,
    ) -> torch.Tensor:
        """Score N clips with K rewards.

        Args:
            videos: N edited clips, [F,3,H,W] float32 in [0,1].
            columns: name -> N values, as `reward_columns` makes them.
            group_ids: N integers; clips with one id are a group, in any order. Groupwise rewards need them.
            cache: shared with whoever scores the same clips; None: a new one for each `batch_size` clips.
            ahead: of `self.ahead`, with these very clips: the background rewards have been asked there.

        Returns: float32 CPU tensor [N,K]; NaN where a reward said None (not applicable).

        Raises: EditrlError, naming reward and sample, when a reward raises, returns another number of values, a
            non-number, NaN or infinity, or needs a column that a sample lacks, or groups that were not given.
        """
        videos = list(videos)
        for column, values in columns.items():
            if len(values) != len(videos):
                raise EditrlError(f"column '{column}' has {len(values)} values for {len(videos)} videos.")
        labels = numbered(len(videos), columns.get("ids"))
        columns = columns | {"videos": videos}
        groups = self._groups(len(videos), group_ids)
        if ahead is not None and len(ahead.videos) != len(videos):
            raise EditrlError(f"{len(ahead.videos)} clips were taken ahead, but {len(videos)} are scored.")
        asked = () if ahead is None else self.background
        self.seconds = dict.fromkeys(self.names, 0.0)
        scores = torch.empty(len(videos), len(self.names))
        with self._models_on_device():
            for chunk in chunks(groups, self.batch_size or max(len(videos), 1)):
                shared = {} if cache is None else cache
                for k, member in enumerate(self._members):
                    if member.name in asked:
                        continue
                    began = time.perf_counter()
                    for part in member.calls(chunk):
                        scores[part, k] = member.score(columns, part, labels, shared)
                    self.seconds[member.name] += time.perf_counter() - began
        for name in asked:
            began = time.perf_counter()
            for part, values in ahead.scores(name):
                scores[part, self.names.index(name)] = values
            self.seconds[name] = time.perf_counter() - began
        return scores

    def ahead(self, thread: RewardThread, columns: dict[str, list], group_ids: Sequence[int]) -> Ahead:
        """Takes N clips as they come and has the background rewards asked about them; its scores are for a call.

        `columns` and `group_ids` are those of all N clips, as in a call.
        """
        members = [member for member in self._members if member.options.background]
        labels, groups = numbered(len(group_ids), columns.get("ids")), self._groups(len(group_ids), group_ids)
        return Ahead(thread, members, columns, groups, labels, self.batch_size)

    def cancel(self) -> None:
        """Nobody wants the scores of a call in another thread any more: rewards with a `cancel` stop waiting."""
        for member in self._members:
            if callable(getattr(member.reward, "cancel", None)):
                member.reward.cancel()

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

    def _move(self, member: Member, device: torch.device | str) -> None:
        began = time.perf_counter()
        member.reward.to(device)
        self.seconds[member.name] += time.perf_counter() - began


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


def _refuse_reserved(column: str) -> None:
    if column in _RESERVED:
        raise EditrlError(f"a data-set column is called '{column}', which names something else to a reward: rename it.")
