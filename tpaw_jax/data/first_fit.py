"""First-fit bin packing with three resources, in O(n log n)."""

Needs = tuple[int, int, int]
"""How much an item needs of each resource."""


class Bins:
    """Bins of equal capacities, of which each item goes into the first that has room for it.

    A binary tree over the bins holds in each node the most of every resource that a bin below it has left. Subtrees
    without room are skipped, so finding a bin and updating the path above it take O(log bins) in the usual case where
    one resource decides.
    """

    def __init__(self, capacity: Needs) -> None:
        self._capacity, self._leaves = capacity, 1
        self._free = [[c, c] for c in capacity]  # of each resource: a heap, whose index 0 is unused

    def add(self, needs: Needs) -> int:
        """Put an item into the first bin with room for all its needs, and return the bin.

        Raises:
            ValueError: the item does not fit into an empty bin.
        """
        if any(need > c for need, c in zip(needs, self._capacity, strict=True)):
            raise ValueError(f"An item that needs {needs} does not fit into a bin of {self._capacity}.")
        while (leaf := self._first(needs)) is None:
            self._double()
        for free, need in zip(self._free, needs, strict=True):
            _take(free, leaf, need)
        return leaf - self._leaves

    def _first(self, needs: Needs) -> int | None:
        """The leftmost leaf with room. A node may have room for each need in another bin, so a subtree can fail."""
        (x, y, z), (of_x, of_y, of_z), leaves = needs, self._free, self._leaves
        node = 1
        while True:
            if of_x[node] >= x and of_y[node] >= y and of_z[node] >= z:
                if node >= leaves:
                    return node
                node *= 2
            else:
                while node & 1:  # a right child, or the root: its parent's subtree is done
                    node >>= 1
                if node == 0:
                    return None
                node += 1

    def _double(self) -> None:
        """Make room for as many bins again."""
        old, self._leaves = self._leaves, 2 * self._leaves
        for resource, c in enumerate(self._capacity):
            free = [c] * (2 * self._leaves)
            free[self._leaves : self._leaves + old] = self._free[resource][old : 2 * old]
            for node in range(self._leaves - 1, 0, -1):
                free[node] = max(free[2 * node], free[2 * node + 1])
            self._free[resource] = free


def _take(free: list[int], leaf: int, need: int) -> None:
    """Take from a leaf, and update the nodes above it."""
    before = free[leaf]
    most = free[leaf] = before - need
    node = leaf
    while node > 1:
        beside = free[node ^ 1]
        if beside >= before:  # the bin was not the one with the most
            return
        most = beside if beside > most else most
        node >>= 1
        free[node] = most
