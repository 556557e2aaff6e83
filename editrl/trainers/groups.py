"""Which example each group of a run samples."""

import torch
from torch.utils.data import Dataset


class GroupSchedule(Dataset):
    """Group g of a run -> (g, example index): the examples in a fresh random order each pass over them.

    A pure function of (seed, g): the groups of a run are numbered through, so a group id is unique, a resumed run meets
    the same groups, and a data set smaller than a generation batch simply comes round more often.
    """

    def __init__(self, num_examples: int, num_groups: int, seed: int):
        self.num_examples, self.num_groups, self.seed = num_examples, num_groups, seed
        self._order: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        return self.num_groups

    def __getitem__(self, group: int) -> tuple[int, int]:
        epoch, position = divmod(group, self.num_examples)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = epoch, torch.randperm(self.num_examples, generator=generator).tolist()
        return group, self._order[1][position]
