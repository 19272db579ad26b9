"""Pack prompts and their responses into rows of fixed shape, as prefix trees `[x | y | g ...]`.

All triplets of a prompt share x and y, so a tree computes them once. Responses with identical tokens are stored once
and counted by multiplicity. Trees are assigned to rows by first-fit-decreasing bin packing.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from tpaw_jax.config import PackingConfig
from tpaw_jax.types import TARGET, Generations, Prompts, TeamScores, TreeBatch


@dataclasses.dataclass(frozen=True)
class Tree:
    """One prompt, its distinct responses, and the triplets that they form."""

    prompt: int  # index into Prompts
    prompt_tokens: np.ndarray
    sources: tuple[int, ...]  # for each response: TARGET, or the round that first sampled it
    responses: tuple[np.ndarray, ...]
    triplets: tuple[tuple[int, int, int], ...]  # (index of y, index of y_gen, multiplicity)

    def length(self, alignment: int = 1) -> int:
        """Count the row tokens that the tree occupies.

        The prompt and each response are padded to a multiple of `alignment`. A response's last token is only a label
        and takes no space.
        """
        return sum(_align(n, alignment) for n in (len(self.prompt_tokens), *(len(r) - 1 for r in self.responses)))

    @property
    def predictions(self) -> int:
        """Number of predicted tokens, i.e. all tokens of all responses."""
        return sum(len(r) for r in self.responses)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows on the host, with the prompt and source of each response."""

    batch: TreeBatch  # numpy arrays, rows on the leading axis
    prompt_index: np.ndarray  # [rows, R] int32, -1 is padding
    source: np.ndarray  # [rows, R] int32

    def __len__(self) -> int:
        return len(self.prompt_index)

    @property
    def triplets(self) -> np.ndarray:
        """Number of triplets in each row, counted with multiplicity, [rows]."""
        return np.asarray(self.batch.triplet_weight).sum(axis=-1)

    @property
    def fill(self) -> float:
        """Fraction of the rows' tokens that are not padding."""
        return float((np.asarray(self.batch.segment_ids) > 0).mean()) if len(self) else 0.0


def first_sources(prompts: Prompts, generations: Sequence[Generations]) -> dict[int, np.ndarray]:
    """Map each round to the source where each of its responses first appeared: TARGET, an earlier round, or itself.

    Identical responses to a prompt share a source, so each is computed and scored once.

    Returns:
        round -> int32 sources, [prompts].
    """
    seen = [{target.tobytes(): TARGET} for target in prompts.target_tokens]
    return {
        g.round: np.array(
            [seen[i].setdefault(tokens.tobytes(), g.round) for i, tokens in enumerate(g.tokens)], np.int32
        )
        for g in sorted(generations, key=lambda g: g.round)
    }


def trees_of_window(
    prompts: Prompts, window: Sequence[Generations], sources: dict[int, np.ndarray] | None = None
) -> list[Tree]:
    """Build one tree per prompt from the triplets of the rounds in `window` (D_O).

    `sources` is the result of `first_sources` over all rounds so far. By default it is computed from the window alone.
    """
    sources = first_sources(prompts, window) if sources is None else sources
    trees = []
    for i in range(len(prompts)):
        counts: dict[int, int] = {}
        tokens = {TARGET: prompts.target_tokens[i]}
        for generations in window:
            source = int(sources[generations.round][i])
            counts[source] = counts.get(source, 0) + 1
            tokens[source] = generations.tokens[i]
        order = tuple(tokens)
        triplets = tuple((0, order.index(source), n) for source, n in counts.items())
        trees.append(Tree(i, prompts.prompt_tokens[i], order, tuple(tokens.values()), triplets))
    return trees


def tree_of_responses(prompts: Prompts, prompt: int, responses: dict[int, np.ndarray]) -> Tree:
    """Build a tree without triplets, for scoring only; `responses` maps source to tokens."""
    return Tree(prompt, prompts.prompt_tokens[prompt], tuple(responses), tuple(responses.values()), ())


def trees_of_targets(prompts: Prompts) -> list[Tree]:
    """Each prompt with its target as the only response."""
    return [
        Tree(i, x, (TARGET,), (y,), ((0, 0, 1),))
        for i, (x, y) in enumerate(zip(prompts.prompt_tokens, prompts.target_tokens, strict=True))
    ]


def pack(trees: Sequence[Tree], config: PackingConfig) -> Rows:
    """Pack trees into rows of `row_length` tokens and at most `max_responses_per_row` responses.

    A tree that does not fit into a row is split into several trees, each with its own copy of x and y. An `alignment`
    or `rows_per_batch` of 0 (automatic) counts as 1 throughout this module.

    Raises:
        ValueError: x, y and one generation do not fit into a row. Names the prompt and the lengths.
    """
    return _write_rows(_assign_to_rows(trees, config), config)


def check_rows(config: PackingConfig, longest_tree: int, shards: int, alignment: int) -> None:
    """Check that rows hold `longest_tree` tokens of three aligned parts, and suit the devices.

    Batches must split evenly over `shards` devices, and rows need the `alignment` of attention.

    Raises:
        ValueError: they do not. Names the configuration key.
    """
    if config.alignment % alignment:
        raise ValueError(
            f"packing.alignment is {config.alignment}; with rows of {config.row_length} tokens, attention on TPU needs "
            f"a multiple of {alignment}. It cannot change in a run that has begun: set it to {alignment} in a new one."
        )
    if config.rows_per_batch % shards:
        raise ValueError(
            f"packing.rows_per_batch is {config.rows_per_batch}; it must be a multiple of the {shards} devices that "
            "rows are split over. A resumed run keeps its value: use a number of devices that divides it."
        )
    padded = longest_tree + 3 * (config.alignment - 1)
    if config.row_length < padded:
        raise ValueError(
            f"packing.row_length is {config.row_length}; it must be at least {padded}, because prompt, target and "
            f"response are each padded to a multiple of {config.alignment} tokens."
        )


def row_count(trees: Sequence[Tree], config: PackingConfig) -> int:
    """Count the rows that `pack` would produce, without building them."""
    return len(_assign_to_rows(trees, config))


def _assign_to_rows(trees: Sequence[Tree], config: PackingConfig) -> list[list[Tree]]:
    """The trees of each row, by first-fit-decreasing over (tokens, predictions, responses)."""
    pieces = [piece for tree in trees for piece in _split(tree, config)]
    needs = np.array([(t.length(config.alignment), t.predictions, len(t.responses)) for t in pieces], int)
    needs = needs.reshape(-1, 3)
    order = np.argsort(-needs[:, 0], kind="stable")
    free = np.empty((len(pieces), 3), int)
    free[:] = config.row_length, config.row_length, config.max_responses_per_row
    members: list[list[Tree]] = []
    for i in order:
        row = int(np.argmax((free[: len(members) + 1] >= needs[i]).all(axis=1)))
        if row == len(members):
            members.append([])
        members[row].append(pieces[i])
        free[row] -= needs[i]
    return members


def empty_like(rows: Rows, count: int) -> Rows:
    """Build `count` padding rows with the shapes of `rows`."""
    shape = lambda x: np.zeros((count, *x.shape[1:]), x.dtype)
    batch = jax.tree.map(shape, rows.batch)
    batch = batch.replace(response_ids=np.full_like(batch.response_ids, rows.prompt_index.shape[1]))
    return Rows(batch, np.full_like(shape(rows.prompt_index), -1), shape(rows.source))


def take(rows: Rows, indices: np.ndarray, size: int) -> Rows:
    """Select the rows at `indices` as a batch of `size` rows, padded with empty rows at the end."""
    return _pad(_select(rows, indices), size)


def micro_batches_per_step(rows: Rows, batch_triplets: int, rows_per_batch: int) -> int:
    """Choose the micro-batches per step, at least one, so that a step has about `batch_triplets` triplets."""
    return micro_batches_of(float(rows.triplets.mean()), batch_triplets, rows_per_batch)


def micro_batches_of(triplets_a_row: float, batch_triplets: int, rows_per_batch: int) -> int:
    """Like `micro_batches_per_step`, for rows with a mean of `triplets_a_row` triplets."""
    return max(1, round(batch_triplets / (max(triplets_a_row, 1.0) * max(1, rows_per_batch))))


def most_micro_batches(batch_triplets: int, longest_triplet: int, config: PackingConfig) -> int:
    """Return an upper bound of `micro_batches_per_step` for any data, which fixes the shape of a step.

    A full row holds at least `row_length / longest_triplet` triplets, or `max_responses_per_row / 2` if that is less.
    First-fit leaves at most one row less than half full, so the mean is at least half of that. `longest_triplet` is the
    largest number of tokens that x, y and y_gen can have together.
    """
    fewest = min(config.row_length / longest_triplet, config.max_responses_per_row / 2) / 2
    return micro_batches_of(fewest, batch_triplets, config.rows_per_batch)


def epoch_order(rows: Rows, seed: int, round_number: int, epoch: int) -> np.ndarray:
    """Return the order in which an epoch visits the rows. It depends only on the arguments."""
    return np.random.default_rng((seed, round_number, epoch)).permutation(len(rows))


def step_batch(
    rows: Rows, scores: TeamScores, indices: np.ndarray, rows_per_batch: int, most_micro_batches: int
) -> tuple[TreeBatch, TeamScores, np.int32]:
    """Build the inputs of one train step from the rows at `indices`.

    Args:
        rows: all rows of the round.
        scores: their scores, log-probs [J, rows, R] and mask [J].
        indices: the rows of the step.
        rows_per_batch: rows B of a micro-batch.
        most_micro_batches: micro-batches A of the step's fixed shape.

    Returns:
        The batch [A, B, ...], its scores (log-probs [A, J, B, R], mask [A, J]), and how many of the A micro-batches
        contain rows.
    """
    rows_per_batch = max(1, rows_per_batch)
    used = -(-len(indices) // rows_per_batch)
    total = most_micro_batches * rows_per_batch
    batch = _pad(_select(rows, indices), total).batch
    split = lambda x: x.reshape(most_micro_batches, rows_per_batch, *x.shape[1:])
    players, _, responses = scores.log_probs.shape
    padded = np.zeros((players, total, responses), np.float32)
    padded[:, : len(indices)] = scores.log_probs[:, indices]
    log_probs = np.moveaxis(padded.reshape(players, most_micro_batches, rows_per_batch, responses), 0, 1)
    mask = np.broadcast_to(scores.player_mask, (most_micro_batches, len(scores.player_mask)))
    return jax.tree.map(split, batch), TeamScores(log_probs, mask), np.int32(used)


def empty_step(config: PackingConfig, players: int, micro_batches: int) -> tuple[TreeBatch, TeamScores, np.int32]:
    """Build step inputs without any rows, as `step_batch` would: they have a step's shapes and dtypes."""
    rows = pack([], config)
    scores = TeamScores(np.zeros((players, *rows.prompt_index.shape), np.float32), np.ones(players, bool))
    return step_batch(rows, scores, np.arange(0), config.rows_per_batch, micro_batches)


def _select(rows: Rows, indices: np.ndarray) -> Rows:
    batch = jax.tree.map(lambda x: x[indices], rows.batch)
    return Rows(batch, rows.prompt_index[indices], rows.source[indices])


def _pad(rows: Rows, size: int) -> Rows:
    if len(rows) == size:
        return rows
    padding = empty_like(rows, size - len(rows))
    both = lambda a, b: np.concatenate([a, b])
    batch = jax.tree.map(both, rows.batch, padding.batch)
    return Rows(batch, both(rows.prompt_index, padding.prompt_index), both(rows.source, padding.source))


def _split(tree: Tree, config: PackingConfig) -> list[Tree]:
    """The tree itself, or several trees with x, y and as many of the generations as fit into a row."""
    if _fits(tree, config):
        return [tree]
    parts: list[Tree] = []
    if not tree.triplets:
        parts = [_subtree(tree, [k], ()) for k in range(len(tree.responses))]
    current: list[tuple[int, int, int]] = []
    for triplet in tree.triplets:
        if current and not _fits(_with_triplets(tree, [*current, triplet]), config):
            parts.append(_with_triplets(tree, current))
            current = []
        current.append(triplet)
    if current:
        parts.append(_with_triplets(tree, current))
    for part in parts:
        if not _fits(part, config):
            raise ValueError(
                f"Prompt {tree.prompt}: {len(part.prompt_tokens)} prompt tokens with responses of "
                f"{', '.join(str(len(r)) for r in part.responses)} tokens exceed a row of {config.row_length} tokens "
                f"and {config.max_responses_per_row} responses. Raise packing.row_length or lower the length limits."
            )
    return parts


def _with_triplets(tree: Tree, triplets: Sequence[tuple[int, int, int]]) -> Tree:
    keep = list(dict.fromkeys(r for target, generated, _ in triplets for r in (target, generated)))
    renumbered = tuple((keep.index(t), keep.index(g), n) for t, g, n in triplets)
    return _subtree(tree, keep, renumbered)


def _subtree(tree: Tree, keep: Sequence[int], triplets: tuple[tuple[int, int, int], ...]) -> Tree:
    kept = tuple(tree.sources[k] for k in keep), tuple(tree.responses[k] for k in keep)
    return Tree(tree.prompt, tree.prompt_tokens, *kept, triplets)


def _fits(tree: Tree, config: PackingConfig) -> bool:
    too_long = max(tree.length(config.alignment), tree.predictions) > config.row_length
    return not too_long and len(tree.responses) <= config.max_responses_per_row


def _write_rows(members: Sequence[Sequence[Tree]], config: PackingConfig) -> Rows:
    count, length, most = len(members), config.row_length, config.max_responses_per_row
    ints = lambda n, value=0: np.full((count, n), value, np.int32)
    batch = TreeBatch(
        tokens=ints(length),
        positions=ints(length),
        segment_ids=ints(length),
        branch_ids=ints(length),
        hidden_index=ints(length),
        labels=ints(length),
        response_ids=ints(length, most),
        triplet_target=ints(most),
        triplet_generated=ints(most),
        triplet_weight=np.zeros((count, most), np.float32),
    )
    rows = Rows(batch, ints(most, -1), ints(most))
    for row, trees in enumerate(members):
        _write_row(rows, row, trees, config.alignment)
    return rows


def _write_row(rows: Rows, row: int, trees: Sequence[Tree], alignment: int) -> None:
    """Write the trees of one row, one after the other, into the arrays of `rows`."""
    b = jax.tree.map(lambda x: x[row], rows.batch)  # views, so that writing to them changes `rows`
    token, prediction, response, triplet = 0, 0, 0, 0
    for segment, tree in enumerate(trees, start=1):
        first_response, prompt_length = response, len(tree.prompt_tokens)
        prompt_span = slice(token, token + prompt_length)
        b.tokens[prompt_span] = tree.prompt_tokens
        b.positions[prompt_span] = np.arange(prompt_length)
        b.segment_ids[prompt_span] = segment
        last_of_prompt = token + prompt_length - 1
        token += _align(prompt_length, alignment)
        for branch, tokens in enumerate(tree.responses, start=1):
            read = len(tokens) - 1
            span = slice(token, token + read)
            b.tokens[span] = tokens[:-1]
            b.positions[span] = prompt_length + np.arange(read)
            b.segment_ids[span] = segment
            b.branch_ids[span] = branch
            predicted = slice(prediction, prediction + len(tokens))
            b.hidden_index[predicted] = np.concatenate([[last_of_prompt], np.arange(token, token + read)])
            b.labels[predicted] = tokens
            b.response_ids[predicted] = response
            rows.prompt_index[row, response] = tree.prompt
            rows.source[row, response] = tree.sources[branch - 1]
            token += _align(read, alignment)
            prediction, response = prediction + len(tokens), response + 1
        for target, generated, weight in tree.triplets:
            b.triplet_target[triplet] = first_response + target
            b.triplet_generated[triplet] = first_response + generated
            b.triplet_weight[triplet] = weight
            triplet += 1


def _align(tokens: int, alignment: int) -> int:
    """`tokens` rounded up to a multiple of `alignment`."""
    step = max(1, alignment)
    return -(-tokens // step) * step
