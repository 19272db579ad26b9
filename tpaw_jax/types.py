"""The data types of a round, in the order in which they are used.

Dimension key, for shape annotations and name suffixes; a file that uses a letter for something else says so:

    B batch rows       T tokens of a row      P predictions of a row   R responses of a row
    S cache slots      C cache positions      M new tokens of a slot   A micro-batches of a step
    L layers           D model                F feed-forward           V vocabulary
    N query heads      K key-value heads      H head size              J players, newest first

Host-side types (`Prompts`, `Generations`) hold token sequences of different lengths as `Ragged` arrays. Device-side
types are pytrees of fixed shape. Their arrays may have extra leading axes (all rows of a round, or the micro-batches of
a step); the annotations give the trailing axes.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self, overload

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

if TYPE_CHECKING:  # a device or a host array: type checkers cannot tell which
    from typing import Any as AnyArray
else:
    AnyArray = Array | np.ndarray

TARGET = -1
"""Source number of a target response. A generated response has the round (0, 1, 2, ...) that sampled it as source."""


@dataclasses.dataclass(frozen=True, eq=False)
class Ragged(Sequence[np.ndarray]):
    """One-dimensional arrays of different lengths in one buffer, which may be a memory-mapped file.

    An item is a view of the buffer. Items may overlap, and their order need not be that of the buffer.
    """

    buffer: np.ndarray
    starts: np.ndarray  # [items] int64
    lengths: np.ndarray  # [items] int32

    @classmethod
    def of(cls, items: "Iterable[np.ndarray] | Ragged", dtype: Any = np.int32) -> "Ragged":
        """The items, copied into a new buffer; unchanged if they are `Ragged`."""
        if isinstance(items, Ragged):
            return items
        items = list(items)
        buffer = np.concatenate([np.zeros(0, dtype), *items]).astype(dtype, copy=False)
        return cls.split(buffer, np.array([len(item) for item in items], np.int32))

    @classmethod
    def split(cls, buffer: np.ndarray, lengths: np.ndarray) -> "Ragged":
        """The items that lie end to end in a buffer."""
        return cls(buffer, np.cumsum(lengths, dtype=np.int64) - lengths, np.asarray(lengths, np.int32))

    @classmethod
    def zeros(cls, lengths: np.ndarray) -> "Ragged":
        """Items of zeros, which share their memory."""
        lengths = np.asarray(lengths, np.int32)
        return cls(np.zeros(lengths.max(initial=0), np.int32), np.zeros(len(lengths), np.int64), lengths)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "Ragged": ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | Ragged":
        if isinstance(index, slice):
            return Ragged(self.buffer, self.starts[index], self.lengths[index])
        start = self.starts[index]
        return self.buffer[start : start + self.lengths[index]]

    def __iter__(self) -> Iterator[np.ndarray]:
        for start, end in zip(self.starts, self.starts + self.lengths, strict=True):
            yield self.buffer[start:end]

    def take(self, indices: Sequence[int] | np.ndarray) -> "Ragged":
        """The items at `indices`, in the same buffer."""
        indices = np.asarray(indices, np.int64)
        return Ragged(self.buffer, self.starts[indices], self.lengths[indices])

    def flat(self) -> np.ndarray:
        """All items, end to end; a view if they lie so in the buffer."""
        ends = self.starts + self.lengths
        if not len(self):
            return self.buffer[:0]
        if np.array_equal(self.starts[1:], ends[:-1]):
            return self.buffer[self.starts[0] : ends[-1]]
        flat = np.empty(self.lengths.sum(dtype=np.int64), self.buffer.dtype)
        ends = np.cumsum(self.lengths, dtype=np.int64)
        for first in range(0, len(self), _ITEMS_AT_ONCE):
            some = self[first : first + _ITEMS_AT_ONCE]
            end = ends[first + len(some) - 1]
            np.concatenate(list(some), out=flat[ends[first] - self.lengths[first] : end])
        return flat


NOTHING = Ragged.zeros(np.zeros(0))
"""No items."""

_ITEMS_AT_ONCE = 10_000


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Tokenized prompts x and target responses y. Targets end with the end-of-turn token unless truncated.

    Tokens may be given as any sequence of int32 arrays.
    """

    ids: np.ndarray  # [prompts] int32; seeds a prompt's random stream, so reordering or subsetting does not change it
    prompt_tokens: Ragged
    target_tokens: Ragged
    rejected_tokens: Ragged = NOTHING  # the data's rejected responses; no items if it has none
    conversations: np.ndarray | None = None  # [prompts] int32; equal for the turns of a conversation; None: all differ

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "target_tokens", "rejected_tokens"):
            object.__setattr__(self, name, Ragged.of(getattr(self, name)))

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The prompts at `indices`, with their ids."""
        indices = np.asarray(indices, int)
        return type(self)(
            self.ids[indices],
            self.prompt_tokens.take(indices),
            self.target_tokens.take(indices),
            self.rejected_tokens.take(indices) if len(self.rejected_tokens) else self.rejected_tokens,
            None if self.conversations is None else self.conversations[indices],
        )


class PackedPrompts(NamedTuple):
    """Prompts packed end to end into rows. Here R are the rows, T their tokens, N the most prompts of a row."""

    tokens: Int[AnyArray, "R T"]
    positions: Int[AnyArray, "R T"]
    segment_ids: Int[AnyArray, "R T"]  # 0 is padding
    first: Int[AnyArray, "R N"]  # index of each prompt's first token in its row
    lengths: Int[AnyArray, "R N"]  # tokens of each prompt; 1 for unused entries


@dataclasses.dataclass(frozen=True)
class Generations:
    """One round's generated responses, one per prompt, as the sampled token ids; text is never re-tokenized.

    Tokens and log-probs may be given as any sequence of arrays.
    """

    round: int
    tokens: Ragged  # int32; includes the stop token if one was sampled
    log_probs: Ragged  # float32, nats per token, under the policy at temperature 1; no items if not kept

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", Ragged.of(self.tokens))
        object.__setattr__(self, "log_probs", Ragged.of(self.log_probs, np.float32))


class TreeBatch(struct.PyTreeNode):
    """Rows packed with prefix trees `[x | y | g ...]`. The positions of every response continue those of x.

    With `data.train_on: all`, the prompts of a conversation may share a trunk, see `data.prefix_trees`.

    The model never reads the last token of a response, so that token appears in `labels` but not in `tokens`.
    """

    tokens: Int[AnyArray, "*lead B T"]
    positions: Int[AnyArray, "*lead B T"]
    segment_ids: Int[AnyArray, "*lead B T"]  # the token's segment, counted from 1 in each row; 0 is padding
    branch_ids: Int[AnyArray, "*lead B T"]  # 0 for the trunk, else the number of the response in its segment, from 1
    prompt_end: Int[AnyArray, "*lead B T"]  # for responses: the end in the row of what they see of the trunk; else 0
    hidden_index: Int[AnyArray, "*lead B P"]  # the token of the row whose hidden state makes the prediction
    labels: Int[AnyArray, "*lead B P"]  # the token to predict
    response_ids: Int[AnyArray, "*lead B P"]  # the prediction's response, in [0, R); R is padding
    triplet_target: Int[AnyArray, "*lead B R"]  # index of y among the row's responses
    triplet_generated: Int[AnyArray, "*lead B R"]  # index of y_gen
    triplet_weight: Float[AnyArray, "*lead B R"]  # number of triplets of D_O that this entry represents; 0 is padding


class TeamScores(struct.PyTreeNode):
    """Log-probs of every response of a `TreeBatch` under each frozen player, newest player first, in nats."""

    log_probs: Float[AnyArray, "*lead J B R"]
    player_mask: Bool[AnyArray, "*lead J"]  # False for players that do not exist yet (rounds 0 and 1)


class TrainState(struct.PyTreeNode):
    """Everything that a train step updates."""

    step: Int[AnyArray, ""]  # steps of this round so far, including skipped ones
    params: PyTree[Array]
    master: PyTree[Array] | None  # float32 master copy if `params` are not float32; `params` are rounded from it
    opt_state: PyTree[Array]
    skipped: Int[AnyArray, ""]  # steps of this round skipped because the loss or gradient was not finite
    skipped_in_a_row: Int[AnyArray, ""]
