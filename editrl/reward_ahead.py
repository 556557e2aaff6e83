"""Rewards that wait more than they compute: asked in a thread for the clips that are there, while others are made."""

from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import torch

from editrl.reward_member import Member, chunks


class RewardThread:
    """Asks rewards, one call at a time, beside the thread that samples.

    After a failure nothing more is asked: whatever comes later fails with that first error. So an outage is waited for
    once.
    """

    def __init__(self):
        here = (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_initialized() else (None, ())
        self._pool = ThreadPoolExecutor(1, "rewards", *here)  # a new thread would be on GPU 0
        self._failure: BaseException | None = None

    def ask(self, member: Member, *arguments) -> Future:
        """What `member.score(*arguments)` will return or raise."""
        return self._pool.submit(self._score, member, *arguments)

    def _score(self, member: Member, *arguments) -> torch.Tensor:
        if self._failure is not None:
            raise self._failure
        try:
            return member.score(*arguments)
        except BaseException as error:
            self._failure = error
            raise

    def close(self) -> None:
        """Drop what has not begun. A call that has begun ends by itself, and nobody waits for it here."""
        self._failure = self._failure or CancelledError()
        self._pool.shutdown(wait=False, cancel_futures=True)


class Ahead:
    """What background rewards of one set are asked about the clips of a rollout, which arrive in their order.

    Args:
        thread: asks them.
        members: these rewards.
        columns: name -> a value for each of the N clips, also of those that are still to come.
        groups: the numbers of the clips of each group, ascending.
        labels: N names for errors.
        batch_size: at most so many clips a call, a whole group excepted; None: those that have just arrived.
    """

    def __init__(
        self,
        thread: RewardThread,
        members: Sequence[Member],
        columns: dict[str, list],
        groups: list[list[int]],
        labels: list[str],
        batch_size: int | None,
    ):
        self.videos: list[torch.Tensor] = []
        self._thread, self._labels, self._batch_size = thread, labels, batch_size
        self._columns = columns | {"videos": self.videos}
        each = [[i] for i in range(len(labels))]
        self._waiting = [(member, groups if member.options.groupwise else each) for member in members]
        self._asked: dict[str, list[tuple[list[int], Future]]] = {member.name: [] for member in members}

    def add(self, clips: Sequence[torch.Tensor]) -> None:
        """The next clips, [F,3,H,W] float32 in [0,1], in main memory: on a GPU the thread would have to wait for what
        the sampling has queued there. Groupwise rewards are asked when a group is complete."""
        self.videos += clips
        count, cache, waiting = len(self.videos), {}, []
        for member, groups in self._waiting:
            whole = [group for group in groups if group[-1] < count]
            waiting.append((member, [group for group in groups if group[-1] >= count]))
            for chunk in chunks(whole, self._batch_size or count):
                for part in member.calls(chunk):
                    answer = self._thread.ask(member, self._columns, part, self._labels, cache)
                    self._asked[member.name].append((part, answer))
        self._waiting = waiting

    def scores(self, name: str) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Numbers of clips and their scores, float32 [n], call by call; waits for them. Raises as the reward did."""
        for part, answer in self._asked[name]:
            yield part, answer.result()
