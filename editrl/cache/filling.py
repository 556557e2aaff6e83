"""Encode what a cache lacks, shard by shard, so that a run that is cut off loses one shard at most."""

from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from editrl.cache.conditions import ConditionsCache
from editrl.cache.encoding import Encoded, encode_examples
from editrl.cache.fingerprint import describe, key_of
from editrl.cache.shards import BrokenError, Entry, read_example, sweep, write_shard
from editrl.data import EditDataset, EditExample
from editrl.errors import EditrlError
from editrl.policy import FlowPolicy

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

Row = tuple[EditDataset, int]


@dataclass
class Filled:
    """What a run of `fill` has done so far."""

    total: int  # rows that are this process's share
    processes: int = 1
    encoded: int = 0
    kept: int = 0  # rows that were there already
    bytes: int = 0  # written
    seconds: float = 0.0

    @property
    def done(self) -> int:
        """Rows that need nothing more."""
        return self.encoded + self.kept


def fill(
    cache: ConditionsCache,
    policy: FlowPolicy,
    datasets: Sequence[EditDataset],
    *,
    batch_size: int = 8,
    shard_size: int = 64,
    process: int = 0,
    processes: int = 1,
    report: Callable[[Filled], Any] = lambda filled: None,
) -> Filled:
    """Encode the rows that `cache` lacks, or holds damaged, and write them.

    Args:
        cache: opened with the fingerprint of `policy`, whose encoders are loaded.
        batch_size: examples encoded together, those of one size.
        shard_size: rows a shard, at most: what a run loses when it is killed.
        process, processes: this process takes every `processes`-th shard. The processes need not talk.
        report: called after each batch and each shard.

    Raises:
        EditrlError: a clip cannot be read, or the disk is full. What was written before stays and is used.
    """
    start = time.perf_counter()
    cache.folder.mkdir(parents=True, exist_ok=True)
    if process == 0:
        sweep(cache.folder)
    rows = [(dataset, index) for dataset in datasets for index in range(len(dataset))]
    # By place in the manifests, not by what is missing: processes that start at different times see that differently.
    shares = [rows[first : first + shard_size] for first in range(0, len(rows), shard_size)][process::processes]
    filled = Filled(sum(map(len, shares)), processes)

    def tell() -> None:
        filled.seconds = time.perf_counter() - start
        report(filled)

    for share in shares:
        lacking = _lacking(cache, share)
        filled.kept += len(share) - len(lacking)
        encoded: list[Encoded] = []
        for examples in _batches([row for row, _ in lacking], batch_size):
            encoded += [one.to("cpu") for one in encode_examples(policy, examples)]
            filled.encoded += len(examples)
            tell()
        _write(cache, filled, encoded, lacking)
        tell()
    return filled


def _lacking(cache: ConditionsCache, rows: Sequence[Row]) -> list[tuple[Row, dict]]:
    """The rows without a sound entry, each with its description; of equal rows the first."""
    lacking = {}
    cache.digests.forget()
    for dataset, index in rows:
        description = describe(dataset, index, cache.digests.of)
        entry = cache.find(description)
        if entry is None or not _is_sound(entry):
            lacking.setdefault(key_of(description), ((dataset, index), description))
    return list(lacking.values())


def _is_sound(entry: Entry) -> bool:
    try:
        read_example(entry)
    except BrokenError:
        return False
    return True


def _batches(rows: Sequence[Row], size: int) -> Iterator[list[EditExample]]:
    """The examples of the rows; while a batch is encoded, the next one is decoded."""
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    with ThreadPoolExecutor(max_workers=size) as pool:
        coming: deque = deque()
        for part in parts:
            coming.append([pool.submit(dataset.__getitem__, index) for dataset, index in part])
            if len(coming) > 1:
                yield [future.result() for future in coming.popleft()]
        for futures in coming:
            yield [future.result() for future in futures]


def _write(cache: ConditionsCache, filled: Filled, encoded: list[Encoded], lacking: list[tuple[Row, dict]]) -> None:
    """Write a shard, or only what has been learnt of files: a data set that was copied need not be read again."""
    if not lacking and not cache.digests.some_were_read:
        return
    rows = [(dataset.ids[index], description) for (dataset, index), description in lacking]
    try:
        files = [(*stamp, digest) for stamp, digest in cache.digests.seen.items()]
        index, size = write_shard(cache.folder, encoded, rows, cache.fingerprint, files)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise EditrlError(f"{cache.folder}: cannot be written ({error.strerror}); choose another folder") from error
        raise EditrlError(_no_space(cache, filled, encoded)) from error
    for entry in index.entries:
        cache.add(entry)
    filled.bytes += size


def _no_space(cache: ConditionsCache, filled: Filled, encoded: list[Encoded]) -> str:
    """One line: how much has been written, how much more is needed at this rate, where."""
    before = filled.encoded - len(encoded)
    each = filled.bytes / before if before else sum(one.bytes for one in encoded) / max(len(encoded), 1)
    left = (filled.total - filled.kept - before) * filled.processes
    return (
        f"{cache.folder}: the disk is full after {size_text(filled.bytes)} ({before} examples); about "
        f"{size_text(each * left)} more are needed for up to {left} examples of {size_text(each)}. Free some space, or "
        "move the folder to a larger disk, and run the same command again: it goes on from here"
    )


def size_text(size: float) -> str:
    """Bytes for a person to read."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"
