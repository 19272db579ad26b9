"""The data types of a round, in the order in which they are used.

Dimension key, for shape annotations and name suffixes; a file that uses a letter for something else says so:

    B batch rows       T tokens of a row      P predictions of a row   R responses of a row
    S cache slots      C cache positions      M new tokens of a slot   A micro-batches of a step
    L layers           D model                F feed-forward           V vocabulary
    N query heads      K key-value heads      H head size              J players, newest first

Host-side types (`Prompts`, `Generations`) hold token sequences of different lengths as tuples of int32 arrays.
Device-side types are pytrees of fixed shape. Their arrays may have extra leading axes (all rows of a round, or the
micro-batches of a step); the annotations give the trailing axes.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

if TYPE_CHECKING:  # a device or a host array: type checkers cannot tell which
    from typing import Any as AnyArray
else:
    AnyArray = Array | np.ndarray

TARGET = -1
"""Source number of a target response. A generated response has the round (0, 1, 2, ...) that sampled it as source."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Tokenized prompts x and target responses y. Targets end with the end-of-turn token unless truncated."""

    ids: np.ndarray  # [prompts] int32; seeds a prompt's random stream, so reordering or subsetting does not change it
    prompt_tokens: tuple[np.ndarray, ...]
    target_tokens: tuple[np.ndarray, ...]
    rejected_tokens: tuple[np.ndarray, ...] = ()  # the data's rejected responses; () if it has none
    conversations: np.ndarray | None = None  # [prompts] int32; equal for the turns of a conversation; None: all differ

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def take(self, indices: Sequence[int] | np.ndarray) -> Self:
        """The prompts at `indices`, with their ids."""
        return type(self)(
            self.ids[np.asarray(indices, int)],
            tuple(self.prompt_tokens[i] for i in indices),
            tuple(self.target_tokens[i] for i in indices),
            tuple(self.rejected_tokens[i] for i in indices if self.rejected_tokens),
            None if self.conversations is None else self.conversations[np.asarray(indices, int)],
        )

    def conversation_of(self, index: int) -> int | None:
        """The number of the conversation that the prompt at `index` is a turn of."""
        return None if self.conversations is None else int(self.conversations[index])


class PackedPrompts(NamedTuple):
    """Prompts packed end to end into rows. Here R are the rows, T their tokens, N the most prompts of a row."""

    tokens: Int[AnyArray, "R T"]
    positions: Int[AnyArray, "R T"]
    segment_ids: Int[AnyArray, "R T"]  # 0 is padding
    first: Int[AnyArray, "R N"]  # index of each prompt's first token in its row
    lengths: Int[AnyArray, "R N"]  # tokens of each prompt; 1 for unused entries


@dataclasses.dataclass(frozen=True)
class Generations:
    """One round's generated responses, one per prompt, as the sampled token ids; text is never re-tokenized."""

    round: int
    tokens: tuple[np.ndarray, ...]  # int32; includes the stop token if one was sampled
    log_probs: tuple[np.ndarray, ...]  # float32, nats per token, under the policy at temperature 1; () if not kept


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
