"""ConditionsCache: a folder of encoded examples, and which row of a data set finds its own there."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from editrl.cache.encoding import Encoded
from editrl.cache.fingerprint import Digests, changes, describe, key_of, model_changes
from editrl.cache.shards import BrokenError, Entry, read_example, read_index
from editrl.data import EditDataset, EditExample
from editrl.errors import EditrlError
from editrl.policy import Conditions, FlowPolicy

SHOWN = 3
"""Rows that an error names."""


class CachedRows:
    """The encoded examples of one data set, read from the disk when they are asked for."""

    def __init__(self, dataset: EditDataset, entries: Sequence[Entry]):
        self._entries = entries
        self._positions = {id: position for position, id in enumerate(dataset.ids)}

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Encoded:
        """Row `index`, on the CPU. EditrlError if it is damaged."""
        entry = self._entries[index]
        try:
            return read_example(entry)
        except BrokenError as error:
            raise EditrlError(
                f"conditions_cache '{entry.shard.parent}': {error}; `editrl precompute` rebuilds it"
            ) from error

    def encode(self, examples: Sequence[EditExample], unconditional: bool = False) -> Conditions:
        """What `FlowPolicy.encode` gives for examples of the data set, found by their ids."""
        if unconditional:
            raise EditrlError("a conditions cache holds no unconditional prompts; edit without true_cfg_scale")
        return Conditions.concatenate(self[self._positions[example.id]].conditions for example in examples)

    def standing_in(self, policy: FlowPolicy) -> FlowPolicy:
        """The policy, but that it looks the examples of the data set up instead of encoding them."""
        reader = copy.copy(policy)
        reader.encode = self.encode
        return reader


class ConditionsCache:
    """Encoded examples in a folder that `editrl precompute` fills.

    An entry is found by what it was encoded from, not by the row's place or id: a manifest that is shuffled, filtered
    or renamed finds its rows, and several recipes can share a folder.

    Args:
        folder: of the cache; a missing one is empty.
        fingerprint: of the policy whose conditions are wanted (`FlowPolicy.fingerprint`).
    """

    def __init__(self, folder: str | Path, fingerprint: str):
        self.folder = Path(folder)
        self.fingerprint = fingerprint
        self.digests = Digests()
        self.broken: list[str] = []
        """What is wrong with the shards that cannot be read."""
        self._rows: dict[EditDataset, CachedRows] = {}
        self._by_key: dict[str, list[Entry]] = defaultdict(list)
        self._by_id: dict[str, list[Entry]] = defaultdict(list)
        for path in sorted(self.folder.glob("shard-*.json")):
            try:
                index = read_index(path)
            except BrokenError as error:
                self.broken.append(str(error))
                continue
            for file in index.files:
                self.digests.add(*file)
            for entry in index.entries:
                self.add(entry)

    def add(self, entry: Entry) -> None:
        """Make an example known that has been written."""
        self._by_key[key_of(entry.description)].append(entry)
        self._by_id[entry.id].append(entry)

    def find(self, description: dict[str, Any]) -> Entry | None:
        """The newest entry of this description and of this policy.

        EditrlError if several models match, which happens only to a policy whose encoders are not loaded.
        """
        entries = self._by_key.get(key_of(description), ())
        entries = [entry for entry in entries if not model_changes(entry.policy, self.fingerprint)]
        newest = max(entries, key=lambda entry: entry.created, default=None)
        for entry in entries:
            differing = model_changes(entry.policy, newest.policy)
            if differing:
                raise EditrlError(
                    f"conditions_cache '{self.folder}' holds conditions of models that differ in their "
                    f"{', '.join(differing)}, and the encoders that would tell which is meant are not loaded; load "
                    "them (policy_kwargs without encoders: false), or give each model its own folder"
                )
        return newest

    def rows(self, dataset: EditDataset) -> CachedRows:
        """The rows of a data set; all have to be there (see `require`)."""
        if dataset not in self._rows:
            self.require([dataset])
        return self._rows[dataset]

    def require(self, datasets: Sequence[EditDataset]) -> None:
        """EditrlError that counts and names the rows that are missing or were encoded from something else."""
        found, lacking = {}, []
        total = sum(map(len, datasets))
        with tqdm(total=total, desc="checking the conditions cache", delay=2, disable=None) as progress:
            for dataset in datasets:
                entries = []
                for index, id in enumerate(dataset.ids):
                    description = describe(dataset, index, self._known_digest)
                    entries.append(self.find(description))
                    if entries[-1] is None:
                        lacking.append(f"{dataset.where(index)} (id {id!r}): {self._why_not(id, description)}")
                    progress.update()
                found[dataset] = CachedRows(dataset, entries)
        self.digests.forget()
        if lacking:
            shown = [*lacking[:SHOWN], *([f"and {len(lacking) - SHOWN} more"] if len(lacking) > SHOWN else [])]
            broken = f" ({'; '.join(self.broken[:SHOWN])})" if self.broken else ""
            raise EditrlError(
                f"conditions_cache '{self.folder}'{broken} lacks {len(lacking)} of {total} rows: {'; '.join(shown)}. "
                f"Fill it with `editrl precompute --config RECIPE --conditions_cache {self.folder}`"
            )
        self._rows |= found

    def _known_digest(self, media, root: Path) -> str | None:
        # A file of a size never seen cannot be what was encoded: a cache that lacks everything is told so at once.
        return self.digests.of(media, root, known_only=True)

    def _why_not(self, id: str, description: dict[str, Any]) -> str:
        """What distinguishes the row from the entry of its id that is most like it."""
        differences = []
        for entry in self._by_id.get(id, ()):
            if any(entry.description.get(name) == description[name] for name in ("instruction", "source")):
                models = model_changes(entry.policy, self.fingerprint)
                model = [f"the model changed ({', '.join(models)})"] if models else []
                differences.append(changes(entry.description, description) + model)
        return " and ".join(min(differences, key=len, default=["is not in the cache"]))


def open_cache(folder: str | None, policy: FlowPolicy, *datasets: EditDataset | None) -> ConditionsCache | None:
    """The cache that a trainer reads, which holds every row of its data sets; None without a folder.

    EditrlError for a policy that cannot be cached, and as `ConditionsCache.require`.
    """
    if folder is None:
        return None
    cache = ConditionsCache(folder, policy.fingerprint())
    cache.require([dataset for dataset in datasets if dataset is not None])
    return cache
