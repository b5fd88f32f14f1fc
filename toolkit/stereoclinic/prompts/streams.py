"""A prompt set too large for memory: each rank reads its own part, in one pass.

    table     part 0 | part 1 | part 2 | ...          files, or row groups of Parquet files
    rank r    parts r, r + R, ...                     of R ranks; where there are fewer parts than ranks, every rank
                                                      reads all of them and takes entries r, r + R, ...

An entry's number is its place in the table, so that an interrupted run can continue with another number of ranks.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch.distributed
from torch.utils.data import IterableDataset

from stereoclinic.errors import InputError
from stereoclinic.prompts.occupations import BUILT_IN
from stereoclinic.prompts.sets import Row, read_prompts, with_seed

MOST_ROWS = 1 << 40  # entries in one part, at most; numbers of entries are part * MOST_ROWS + place in it


class Stream(IterableDataset[Row]):
    """Samples of a prompt set, each prompt with every seed. Iterating gives those of this rank.

    Prompts that occur twice are measured twice, as finding them would take memory for all.

    Args:
        source: A .txt/.csv/.jsonl/.parquet file or a hub data set, see `prompts.load_prompts`.
        seeds: Of each prompt.
        limit: Use only the first N entries; every rank then reads all of them.

    Raises:
        InputError: A built-in set, which needs no streaming. Faults of the source itself are raised when it is read.
    """

    def __init__(self, source: str | Path, seeds: range, limit: int | None = None) -> None:
        if str(source) in BUILT_IN or str(source).startswith("protocol:"):
            raise InputError(f"--stream: {source} is a built-in set; leave out --stream")
        self.source, self.seeds, self.limit = str(source), seeds, limit
        self.done: Collection[int] = frozenset()
        self.given = 0
        self.labels: list[str] = []  # not known before it is read

    def about(self) -> dict[str, Any]:
        """What is known before it is read."""
        first = "" if self.limit is None else f", first {self.limit} entries"
        return {"prompts": f"stream of {self.source}{first}", "seeds": [self.seeds[0], self.seeds[-1]]}

    def without(self, done: Collection[int]) -> "Stream":
        """The same but for samples of these numbers."""
        other = Stream(self.source, self.seeds, self.limit)
        other.done = frozenset(done)
        return other

    def __iter__(self) -> Iterator[Row]:
        self.given = 0
        for row in read_prompts(self.source, self._own):
            for place, seed in enumerate(self.seeds):
                number = row["number"] * len(self.seeds) + place
                if number not in self.done:
                    self.given += 1
                    yield with_seed(row, seed, number)

    def _own(self, parts: Sequence[Iterable[Row]]) -> Iterator[tuple[int, str, Row]]:
        rank, ranks = _place()
        whole = self.limit is None and len(parts) >= ranks  # then a rank reads its own parts only
        entries = count()
        for part in range(rank, len(parts), ranks) if whole else range(len(parts)):
            for place, entry in enumerate(parts[part]):
                number = next(entries)
                if number == self.limit:
                    return
                if whole or number % ranks == rank:
                    where = f" of part {part + 1}" if len(parts) > 1 else ""
                    yield part * MOST_ROWS + place, f"prompt {place + 1}{where}", entry


def _place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
