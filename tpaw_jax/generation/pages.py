"""Which pages of the key-value cache each slot holds, alone or with others: the host's account."""

from __future__ import annotations

import heapq
from collections import Counter

import numpy as np

from tpaw_jax.generation.cache import PAGE, PageTable

_BEYOND = 1 << 30


class Pages:
    """Pages of R shards with S slots each: at most `longest_table` of a slot, which at most `sharers` slots hold."""

    def __init__(self, shards: int, slots: int, pages: int, longest_table: int, sharers: int = 1):
        self.pages, self.longest_table, self.sharers = pages, longest_table, sharers
        self._held: list[list[list[int]]] = [[[] for _ in range(slots)] for _ in range(shards)]
        self._holders: list[Counter[int]] = [Counter() for _ in range(shards)]
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
        for row, slots, free, holders in zip(wanted, self._held, self._free, self._holders, strict=True):
            for count, held in zip(row, slots, strict=True):
                new = [heapq.heappop(free) for _ in range(count)]
                held.extend(new)
                holders.update(new)
        return 0

    def share(self, shard: int, slot: int, other: int, count: int) -> None:
        """Let a slot without pages begin with the first `count` pages of another, which nobody writes into any more."""
        shared = self._held[shard][other][:count]
        self._held[shard][slot] = shared
        self._holders[shard].update(shared)

    def release(self, shard: int, slot: int) -> None:
        """Take a slot's pages back; those that another holds too stay with it."""
        holders = self._holders[shard]
        for page in self._held[shard][slot]:
            holders[page] -= 1
            if not holders[page]:
                heapq.heappush(self._free[shard], page)
        self._held[shard][slot] = []

    def table(self) -> PageTable:
        """The account as the device reads it."""
        shards, slots = len(self._held), len(self._held[0])
        of_slot = np.full((shards, slots, self.longest_table), self.pages, np.int32)
        part, owner = of_slot * self.sharers, np.zeros((shards, self.pages, self.sharers), np.int32)
        first = np.full_like(owner, _BEYOND)
        for r, row in enumerate(self._held):
            seen = np.zeros(self.pages, int)  # holders of a page so far
            for s, held in enumerate(row):
                place = seen[held]
                of_slot[r, s, : len(held)], part[r, s, : len(held)] = held, self.sharers * np.array(held) + place
                owner[r, held, place], first[r, held, place] = s, PAGE * np.arange(len(held))
                seen[held] += 1
        return PageTable(of_slot, part, owner, first)

    def resize(self, slots: np.ndarray, pages: int) -> np.ndarray:
        """Keep `slots` [R, S'] in this order, and `pages` pages, those that are held first.

        The old number of every page, [R, `pages`]; of a free one, a number beyond the old ones.
        """
        order = np.full((len(self._held), pages), self.pages)
        for r, row in enumerate(self._held):
            kept = [row[s] for s in slots[r]]
            self._holders[r] = Counter(page for held in kept for page in held)
            old = list(self._holders[r])
            order[r, : len(old)] = old
            number = {page: i for i, page in enumerate(old)}
            self._held[r] = [[number[page] for page in held] for held in kept]
            self._holders[r] = Counter({number[page]: n for page, n in self._holders[r].items()})
            self._free[r] = list(range(len(old), pages))
        self.pages = pages
        return order
