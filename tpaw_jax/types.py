"""The pytrees of a round, in the order the data takes.

Dimension key, used in shape annotations and as name suffixes everywhere in the package:

    B batch rows       T tokens of a row      P predictions of a row   R responses of a row
    S cache slots      C cache positions      M new tokens of a slot   A micro-batches of a step
    L layers           D model                F feed-forward           V vocabulary
    N query heads      K key-value heads      H head size              J players, newest first

The host-side types (`Prompts`, `Generations`) hold ragged token lists as tuples of int32 arrays; the device-side types
are pytrees of fixed shape. A type's arrays may carry further leading axes (rows of a whole round, micro-batches of a
step); the annotations give the trailing ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

if TYPE_CHECKING:  # on the device or on the host: no type checker can know which
    from typing import Any as AnyArray
else:
    AnyArray = Array | np.ndarray

TARGET = -1
"""The source of a target response; the source of a generated one is the round (0, 1, 2, ...) that sampled it."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Tokenised prompts x and target responses y. Targets end with the end-of-turn token unless they were cut."""

    ids: np.ndarray  # [prompts] int32: names a prompt's random stream, so it survives re-ordering and sub-setting
    prompt_tokens: tuple[np.ndarray, ...]
    target_tokens: tuple[np.ndarray, ...]
    rejected_tokens: tuple[np.ndarray, ...] = ()  # the records' own other responses, one a prompt, where all have one

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def take(self, indices: Sequence[int] | np.ndarray) -> Prompts:
        """The prompts at `indices`, with their ids."""
        return Prompts(
            self.ids[np.asarray(indices, int)],
            tuple(self.prompt_tokens[i] for i in indices),
            tuple(self.target_tokens[i] for i in indices),
            tuple(self.rejected_tokens[i] for i in indices if self.rejected_tokens),
        )


class PackedPrompts(NamedTuple):
    """Prompts end to end in rows of T tokens, at most N in a row."""

    tokens: Int[AnyArray, "R T"]
    positions: Int[AnyArray, "R T"]
    segment_ids: Int[AnyArray, "R T"]  # 0 is padding
    first: Int[AnyArray, "R N"]  # where a prompt begins in its row
    lengths: Int[AnyArray, "R N"]  # 1 where there is no prompt


@dataclasses.dataclass(frozen=True)
class Generations:
    """What the policy of one round answered: one response a prompt, as sampled ids, never re-tokenised text."""

    round: int
    tokens: tuple[np.ndarray, ...]  # int32, the stop token included where one was sampled
    log_probs: tuple[np.ndarray, ...]  # float32 nats a token, under the sampling policy at temperature 1


class TreeBatch(struct.PyTreeNode):
    """Rows packed with prefix trees `[x | y | g ...]`; positions restart at the end of x for every response.

    The last token of a response is predicted but never read, so it is a label and takes no place among `tokens`.
    """

    tokens: Int[AnyArray, "*lead B T"]
    positions: Int[AnyArray, "*lead B T"]
    segment_ids: Int[AnyArray, "*lead B T"]  # the tree a token belongs to, from 1; 0 is padding
    branch_ids: Int[AnyArray, "*lead B T"]  # 0 in the prompt, the response's number from 1 in a response
    sources: Int[AnyArray, "*lead B P"]  # the place in the row whose hidden state makes a prediction
    labels: Int[AnyArray, "*lead B P"]  # the token to be predicted
    responses: Int[AnyArray, "*lead B P"]  # the response a prediction belongs to, in [0, R); R is padding
    triplet_target: Int[AnyArray, "*lead B R"]  # the response that is y
    triplet_generated: Int[AnyArray, "*lead B R"]  # the response that is y_gen
    triplet_weight: Float[AnyArray, "*lead B R"]  # how many triplets of D_O this one stands for; 0 is padding


class TeamScores(struct.PyTreeNode):
    """The frozen players' log-probs of every response of a `TreeBatch`, newest player first, in nats."""

    log_probs: Float[AnyArray, "*lead J B R"]
    player_mask: Bool[AnyArray, "*lead J"]  # False for the players that rounds 0 and 1 do not have


class TrainState(struct.PyTreeNode):
    """Everything that training a round changes."""

    step: Int[AnyArray, ""]  # optimizer steps taken in this round, skipped ones included
    params: PyTree[Array]
    master: PyTree[Array] | None  # float32 parameters, of which bfloat16 `params` are the rounded copy
    opt_state: PyTree[Array]
    skipped: Int[AnyArray, ""]  # steps of this round whose loss or gradient was not finite
    skipped_in_a_row: Int[AnyArray, ""]
