"""Which pages of the key-value cache each slot holds: the host's account."""

from __future__ import annotations

import heapq

import numpy as np

from tpaw_jax.models.cache import PAGE, PageTable

_BEYOND = 1 << 30


class Pages:
    """Pages of R shards with S slots each; a slot holds at most `longest_table` of them."""

    def __init__(self, shards: int, slots: int, pages: int, longest_table: int):
        self.pages, self.longest_table = pages, longest_table
        self._held: list[list[list[int]]] = [[[] for _ in range(slots)] for _ in range(shards)]
        self._free = [list(range(pages)) for _ in range(shards)]

    @property
    def most_used(self) -> int:
        """Pages that are held in the shard that holds most."""
        return max(self.pages - len(free) for free in self._free)

    def of_slot(self, shard: int, slot: int) -> list[int]:
        """A slot's pages in the order of its sequence."""
        return self._held[shard][slot]

    def reserve(self, tokens: np.ndarray) -> int:
        """Give every slot the pages that `tokens` [R, S] of it need, those it has included, the lowest free ones.

        0, or how many a shard lacks, and then nothing is given.
        """
        wanted = [
            [max(0, -(-int(n) // PAGE) - len(held)) for n, held in zip(row, slots, strict=True)]
            for row, slots in zip(tokens, self._held, strict=True)
        ]
        lacking = max(sum(row) - len(free) for row, free in zip(wanted, self._free, strict=True))
        if lacking > 0:
            return lacking
        for row, slots, free in zip(wanted, self._held, self._free, strict=True):
            for count, held in zip(row, slots, strict=True):
                held.extend(heapq.heappop(free) for _ in range(count))
        return 0

    def release(self, shard: int, slot: int) -> None:
        """Take a slot's pages back."""
        for page in self._held[shard][slot]:
            heapq.heappush(self._free[shard], page)
        self._held[shard][slot] = []

    def table(self) -> PageTable:
        """The account as the device reads it."""
        shards, slots = len(self._held), len(self._held[0])
        of_slot = np.full((shards, slots, self.longest_table), self.pages, np.int32)
        owner, first = np.zeros((2, shards, self.pages), np.int32)
        first[:] = _BEYOND
        for r, row in enumerate(self._held):
            for s, held in enumerate(row):
                of_slot[r, s, : len(held)] = held
                owner[r, held], first[r, held] = s, PAGE * np.arange(len(held))
        return PageTable(of_slot, owner, first)

    def resize(self, slots: np.ndarray, pages: int) -> np.ndarray:
        """Keep `slots` [R, S'] in this order, and `pages` pages, those that are held first.

        The old number of every page, [R, `pages`]; of a free one, a number beyond the old ones.
        """
        order = np.full((len(self._held), pages), self.pages)
        for r, row in enumerate(self._held):
            kept = [row[s] for s in slots[r]]
            old = [page for held in kept for page in held]
            order[r, : len(old)] = old
            numbers = iter(range(len(old)))
            self._held[r] = [[next(numbers) for _ in held] for held in kept]
            self._free[r] = list(range(len(old), pages))
        self.pages = pages
        return order
