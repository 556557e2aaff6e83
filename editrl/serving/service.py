"""A reward behind a door: what it asks for, one scoring at a time, and the numbers that a monitor reads."""

import asyncio
import contextlib
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch

from editrl.errors import EditrlError
from editrl.reward import RewardSet


class RewardService:
    """One reward, ready to score requests that arrive in any number.

    Args:
        reward: the reward itself (of `load_reward`); its weights are loaded on `device` here.
        name: what clients call it.
        identity: another text for every other reward, by which clients tell that one server stands in for another.
        columns: further columns to ask for, for a reward that looks for them in its **kwargs.
        batch_size: score this many samples at a time; None: a whole request.

    Attributes: `name`, `identity`, `requires` (columns that every sample must have), `columns` (those that clients
    should send: the parameters that the reward names, its `requires` and `columns`, and the further ones).

    EditrlError for a groupwise reward: a request holds clips, and not whose group they are.
    """

    def __init__(
        self,
        reward: Callable,
        name: str,
        *,
        identity: str = "",
        device: torch.device | str = "cpu",
        columns: Iterable[str] = (),
        batch_size: int | None = None,
    ):
        self.name, self.identity = name, identity
        self.rewards = RewardSet([reward], batch_size=batch_size)
        if self.rewards.groupwise:
            raise EditrlError(
                f"reward '{name}' compares the clips of a group, and requests do not say which clips are one: it "
                "cannot be served; list it in the run's own reward_funcs"
            )
        self.requires = sorted(self.rewards.requires)
        self.columns = sorted({"videos", *self.rewards.columns, *columns})
        self.rewards.to(device)
        self._began: float | None = None  # when the scoring that is going on began
        self._work: queue.SimpleQueue[tuple[Callable, asyncio.Future]] = queue.SimpleQueue()
        # One thread, so that a GPU model is never entered twice; a daemon, so that a hung reward does not keep the
        # process alive once the server has stopped.
        threading.Thread(target=self._run, name="scoring", daemon=True).start()

    async def score(self, columns: dict[str, list]) -> list[float | None]:
        """One float a sample, or None where the reward does not apply. EditrlError as `RewardSet` raises it."""
        answer = asyncio.get_running_loop().create_future()
        self._work.put((lambda: self._score(columns), answer))
        return await answer

    def seconds_busy(self) -> float:
        """How long the scoring that is going on has taken; 0 where there is none."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def _score(self, columns: dict[str, list]) -> list[float | None]:
        scores = self.rewards(columns["videos"], {name: v for name, v in columns.items() if name != "videos"})
        return [None if math.isnan(score) else score for score in scores[:, 0].tolist()]

    def _run(self) -> None:
        while True:
            work, answer = self._work.get()
            if answer.cancelled():  # the client left, or the server stops
                continue
            self._began = time.monotonic()
            try:
                settle, result = _set_result, work()
            except BaseException as error:  # somebody else's code: the request gets it, and this thread goes on
                settle, result = _set_exception, error
            self._began = None
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped
                answer.get_loop().call_soon_threadsafe(settle, answer, result)
            del work, answer, result  # or they would keep the clips until the next request


def _set_result(answer: asyncio.Future, result: Any) -> None:
    if not answer.done():
        answer.set_result(result)


def _set_exception(answer: asyncio.Future, error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)


class Meter:
    """Counts that only grow, and gauges, as Prometheus text."""

    def __init__(self, name: str):
        self.label = name.replace("\\", r"\\").replace('"', r"\"").replace("\n", " ")
        self.requests: Counter[int] = Counter()  # by status
        self.samples = 0
        self.errors = 0  # rewards that raised
        self.seconds = 0.0  # of scoring
        self.in_flight = 0
        self.waiting = 0
        self.started = time.time()

    def text(self) -> str:
        """The exposition format: `name{labels} value` lines."""
        reward = f'reward="{self.label}"'
        families = {
            "requests_total": ("counter", {f'{reward},status="{s}"': n for s, n in sorted(self.requests.items())}),
            "samples_total": ("counter", {reward: self.samples}),
            "errors_total": ("counter", {reward: self.errors}),
            "seconds_total": ("counter", {reward: self.seconds}),
            "in_flight": ("gauge", {reward: self.in_flight}),
            "waiting": ("gauge", {reward: self.waiting}),
            "start_time_seconds": ("gauge", {reward: self.started}),
        }
        lines = []
        for family, (kind, values) in families.items():
            lines.append(f"# TYPE editrl_reward_{family} {kind}")
            lines += [f"editrl_reward_{family}{{{labels}}} {value}" for labels, value in values.items()]
        return "\n".join(lines) + "\n"
