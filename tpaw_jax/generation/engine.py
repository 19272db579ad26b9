"""The sampling engine: the host loop that keeps the decode slots full.

Prefill packs prompts into rows of one length. When a sequence finishes, its slot is refilled with the next prefilled
prompt; near the end, empty slots are dropped so that decode steps get cheaper. One chunk of decode steps is always
queued behind the running one, so the device never waits for the host.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from tpaw_jax.generation import token_sampling
from tpaw_jax.generation.cache import PAGE
from tpaw_jax.generation.decoder import decoder_from_apply_fn as decoder_from_apply_fn
from tpaw_jax.generation.decoder import decoder_of as decoder_of
from tpaw_jax.generation.pages import Pages
from tpaw_jax.generation.slots import STEPS_PER_CHUNK, Admission, Prefilled, Sampler, Snapshot, Weights
from tpaw_jax.generation.slots import make_sampler as make_sampler
from tpaw_jax.runtime import processes, sharding
from tpaw_jax.types import AnyArray, Generations, PackedPrompts, Prompts

Response = tuple[np.ndarray, np.ndarray]
"""Sampled tokens, int32, and their log-probs under the model, float32 nats."""

StopFn = Callable[[np.ndarray, int], int | None]
"""(tokens of a response, how many of them did not end it before) -> how many are kept where they end it, or None."""

ADMISSIONS_PER_CALL = 8
"""Prompts of a shard that one call of `admit` moves into slots."""

MAX_SKIPPED = 64
"""Prompts too long for what is left of a row that are passed over in search of ones that fit."""

MIN_SLOTS_CPU = 8
"""Slots that are kept to the end on a CPU: fewer would not decode a step faster."""

MIN_SLOTS_PER_DEVICE = 128
"""The same on accelerators, of each: up to there reading the weights is what a step takes, and a program costs more."""


def generate(
    sampler: Sampler,
    params: PyTree[Array],
    prompts: Prompts,
    *,
    seed: int,
    round_number: int,
    limits: Sequence[int] | None = None,
    num_generations: int = 1,
    stop_fn: StopFn | None = None,
    finished: Mapping[int, Response] | None = None,
    on_finished: Callable[[Mapping[int, Response]], None] = lambda responses: None,
    progress: Callable[[int, int], None] = lambda requests, tokens: None,
) -> Generations:
    """`num_generations` responses a prompt, in the order of `prompts`, those of a prompt one after the other.

    `limits` are new tokens that the responses of each prompt may have, at most and by default `max_new_tokens`.
    `stop_fn` tells which tokens end a response, besides the stop tokens (see `stop_at`).
    `finished` holds responses, by their place in the result, that need not be sampled again: since a text depends on
    its request alone, the result is the same. `on_finished` is called with the responses as they finish, `progress`
    with the requests and the tokens finished since its last call.

    Raises:
        ValueError: `limits` are not one a prompt within `max_new_tokens`.
    """
    longest = sampler.config.max_new_tokens
    most = [longest] * len(prompts) if limits is None else list(limits)
    if len(most) != len(prompts) or not all(1 <= n <= longest for n in most):
        raise ValueError(
            f"limits: there must be {len(prompts)}, one a prompt, each from 1 to max_new_tokens, {longest}."
        )
    done: dict[int, Response] = dict(finished or {})
    local = sharding.resplit(params, sampler.mesh, sampler.dtype)  # by all processes, whether they have work or not
    missing = [i for i in range(len(prompts) * num_generations) if i not in done]
    if missing:
        weights = sampler.prepare(local)
        del local  # a copy, where the caller's are of another dtype or mesh, that a CPU with kernels does not need
        key = token_sampling.round_key(seed, round_number)
        engine = _Engine(sampler, weights, prompts, most, num_generations, missing, key)
        while engine.unfinished:
            engine.refill()
            new = engine.decode(stop_fn)
            if new:
                on_finished(new)
            done.update(new)
            progress(len(new), sum(len(tokens) for tokens, _ in new.values()))
    ordered = [done[i] for i in range(len(prompts) * num_generations)]
    return Generations(round_number, tuple(t for t, _ in ordered), tuple(p for _, p in ordered))


def stop_at(decode: Callable[[np.ndarray], str], strings: Sequence[str]) -> StopFn:
    """`stop_fn` of `generate`: a response ends with the token that completes one of `strings`, which it keeps.

    `decode` turns tokens into text.
    """

    def stop_fn(tokens: np.ndarray, seen: int) -> int | None:
        text = decode(tokens)
        if not any(string in text for string in strings):
            return None
        counts = range(seen + 1, len(tokens) + 1)
        return next((n for n in counts if any(s in decode(tokens[:n]) for s in strings)), None)

    return stop_fn


def local_share(sampler: Sampler, prompts: int) -> tuple[np.ndarray, bool]:
    """The prompts that this process answers, and whether all processes answer all of them together."""
    if sampler.processes > 1:
        return np.arange(prompts), True
    return np.arange(jax.process_index(), prompts, jax.process_count()), False


def gather_from_processes(made: Generations, mine: np.ndarray, t: int) -> Generations:
    """All prompts' responses from what each process has made of its own, those at `mine`; one a prompt."""
    gathered = processes.all_gather(
        index=mine,
        lengths=np.array([len(tokens) for tokens in made.tokens], np.int32),
        tokens=np.concatenate([*made.tokens, np.zeros(0, np.int32)]),
        log_probs=np.concatenate([*made.log_probs, np.zeros(0, np.float32)]),
    )
    responses: dict[int, Response] = {}
    for part in gathered:
        cuts = np.cumsum(part["lengths"])[:-1]
        both = zip(np.split(part["tokens"], cuts), np.split(part["log_probs"], cuts), strict=True)
        responses |= dict(zip(part["index"].tolist(), both, strict=False))
    ordered = [responses[i] for i in range(len(responses))]
    return Generations(t, tuple(tokens for tokens, _ in ordered), tuple(log_probs for _, log_probs in ordered))


class _Waiting(NamedTuple):
    """A request whose prompt is staged."""

    staged: Prefilled
    prompt: int  # its number in its row
    first: int  # where it begins there
    request: int


class _Engine:
    """The requests of one call of `generate`, and the device's slots and pages as the host accounts for them."""

    def __init__(
        self,
        sampler: Sampler,
        weights: Weights,
        prompts: Prompts,
        limits: Sequence[int],
        num_generations: int,
        requests: Sequence[int],
        key: Array,
    ):
        self.sampler, self.weights = sampler, weights
        self.key = _everywhere(key, sampler.mesh) if sampler.processes > 1 else key
        self.prompts, self.limits, self.num_generations = prompts, limits, num_generations
        self.requests_of: dict[int, list[int]] = {}
        for r in sorted(requests):
            self.requests_of.setdefault(r // num_generations, []).append(r)
        self.unstaged = deque(self.requests_of)
        shards = sampler.shards
        self.staged: list[deque[_Waiting]] = [deque() for _ in range(shards)]

        # Sizes come from all prompts, so that a run that goes on begins with the programs of one that is whole.
        lengths = [len(tokens) for tokens in prompts.prompt_tokens]
        self.longest = max(lengths)
        even_share = math.ceil(sum(lengths) / shards)
        self.row = max(bucket(self.longest), min(bucket(sampler.config.prefill_tokens), bucket(even_share)))

        slots = math.ceil(min(sampler.config.slots * sampler.processes, len(prompts) * num_generations) / shards)
        sharers = min(num_generations, slots) if self.longest >= PAGE else 1  # of a page; they share whole ones alone
        shared = [n // PAGE * PAGE * (1 - 1 / sharers) for n in lengths]
        sizes = [n + limit / 2 - s for n, limit, s in zip(lengths, limits, shared, strict=True)]
        typical = math.ceil(np.mean(sizes) / PAGE)
        table = math.ceil((self.longest + sampler.config.max_new_tokens) / PAGE)
        self.pages = Pages(shards, slots, max(table, typical * slots), table, sharers)
        self.state = sampler.init(slots, self.pages.pages)
        self.occupant = np.full((shards, slots), -1)
        self.known = np.zeros((shards, slots), int)  # new tokens of a slot at the last look
        self.unseen = 0  # chunks of steps dispatched since

    @property
    def unfinished(self) -> bool:
        """Whether any request has no response yet."""
        return self._waits or bool((self.occupant >= 0).any())

    @property
    def _waits(self) -> bool:
        return bool(self.unstaged) or any(self.staged)

    def refill(self) -> None:
        """Put waiting requests into free slots; give up slots that nothing waits for."""
        while self._waits:
            free = [np.flatnonzero(row < 0) for row in self.occupant]
            if self.unstaged and any(len(f) and not s for f, s in zip(free, self.staged, strict=True)):
                self._stage()
            entering = [min(len(f), len(s), ADMISSIONS_PER_CALL) for f, s in zip(free, self.staged, strict=True)]
            if not any(entering):
                break
            self._admit([f[:n] for f, n in zip(free, entering, strict=True)])
        if not self._waits:
            self._drop_empty_slots()

    def decode(self, stop_fn: StopFn | None) -> dict[int, Response]:
        """Decode until a sixteenth of the slots are through, or all of them; the finished responses, which leave."""
        occupied, leaving = (self.occupant >= 0).sum(axis=1), max(1, self.occupant.size // 16)
        enough = max(0, int(occupied.sum()) - leaving)
        until = np.maximum(0, occupied - leaving).astype(np.int32)
        running = self._chunk(until)
        while True:
            behind = self._chunk(until)
            active = np.asarray(running.active)
            before, self.known = self.known, np.where(self.occupant >= 0, np.asarray(running.generated), 0)
            self.unseen = 1
            ended = self._ended_by_text(running, active, before, stop_fn) if stop_fn else {}
            if active.sum() <= enough or ended:
                return self._collect(running, active, ended)
            running = behind

    def _chunk(self, until_active: np.ndarray) -> Snapshot:
        """Dispatch a chunk of steps, with pages for all that may be written since the last look."""
        self.unseen += 1
        needed = np.where(self.occupant >= 0, self._prompt_lengths() + self.known + self.unseen * STEPS_PER_CHUNK, 0)
        needed = np.minimum(needed, self._prompt_lengths() + self._limits())
        self._reserve(needed)
        self.state, look = self.sampler.decode(
            self.weights.decode, self.state, self._split(self.pages.table()), self.key, self._split(until_active)
        )
        return look

    def _ended_by_text(
        self, look: Snapshot, active: np.ndarray, before: np.ndarray, stop_fn: StopFn
    ) -> dict[tuple[int, int], int]:
        """The slots whose text stop_fn their response, and how many tokens they keep; they are idle from here on."""
        tokens, found = np.asarray(look.tokens), {}
        for slot in zip(*np.nonzero(self.occupant >= 0), strict=True):
            kept = stop_fn(tokens[slot][: self.known[slot]], int(before[slot]))
            if kept is not None:
                found[slot] = kept
        mask = np.zeros_like(active)
        for slot in found:
            mask[slot] = True
        if found:
            self.state = self.sampler.cancel(self.state, self._split(mask))
        return found

    def _collect(self, look: Snapshot, active: np.ndarray, ended: Mapping[tuple[int, int], int]) -> dict[int, Response]:
        tokens, log_probs = np.asarray(look.tokens), np.asarray(look.log_probs)
        done: dict[int, Response] = {}
        for slot in zip(*np.nonzero(self.occupant >= 0), strict=True):
            if slot in ended or not active[slot]:
                count = ended.get(slot, self.known[slot])
                done[int(self.occupant[slot])] = tokens[slot][:count].copy(), log_probs[slot][:count].copy()
                self.occupant[slot] = -1
                self.pages.release(*slot)
        return done

    def _stage(self) -> None:
        """Compute a row of prompts for each shard that has less than a row waiting: a program computes a row of all."""
        shards, most = len(self.staged), max(1, self.row // 16)
        tokens, positions, segments = np.zeros((3, shards, self.row), np.int32)
        first, lengths = np.zeros((shards, most), np.int32), np.ones((shards, most), np.int32)
        waiting = [sum(self._prompt_length(w.request) for w in queue) for queue in self.staged]
        filled = {r: (0, 0) for r in range(shards) if waiting[r] < self.row}  # tokens and prompts
        placed: list[tuple[int, int, int, int]] = []
        passed_over: list[int] = []
        while self.unstaged and len(passed_over) < MAX_SKIPPED:
            i = self.unstaged.popleft()
            prompt = self.prompts.prompt_tokens[i]
            room = (r for r, (there, n) in filled.items() if n < most and there + len(prompt) <= self.row)
            row = min(room, key=lambda r: waiting[r] + filled[r][0], default=None)
            if row is None:
                passed_over.append(i)
                continue
            start, n = filled[row]
            run = slice(start, start + len(prompt))
            tokens[row, run], positions[row, run], segments[row, run] = prompt, np.arange(len(prompt)), n + 1
            first[row, n], lengths[row, n] = start, len(prompt)
            filled[row] = run.stop, n + 1
            placed.append((row, n, start, i))
        self.unstaged.extendleft(reversed(passed_over))
        packed = PackedPrompts(tokens, positions, segments, first, lengths)
        staged = self.sampler.prefill(self.weights.prefill, self._split(packed))
        for row, n, start, i in placed:
            self.staged[row].extend(_Waiting(staged, n, start, request) for request in self.requests_of[i])

    def _admit(self, free: list[np.ndarray]) -> None:
        """Move the first that wait into the free slots of their shards, as many as come from one batch of prompts."""
        shards, slots = self.occupant.shape
        batch = next(queue[0].staged for queue, f in zip(self.staged, free, strict=True) if len(f))
        of_prompt = math.ceil(self.longest / PAGE)
        slot = np.full((shards, ADMISSIONS_PER_CALL), slots, np.int32)
        prompt, length, request, sample, limit = np.zeros((5, shards, ADMISSIONS_PER_CALL), np.int32)
        starts = np.zeros((shards, ADMISSIONS_PER_CALL, of_prompt), np.int32)
        lengths = np.zeros((shards, slots), int)
        entered: list[tuple[int, int, int]] = []
        sharing: dict[tuple[int, int], tuple[int, int]] = {}  # another slot with the prompt, and how many of its pages
        for r, queue in enumerate(self.staged):
            for a, s in enumerate(free[r]):
                if queue[0].staged is not batch:
                    break
                new = queue.popleft()
                i, g = divmod(new.request, self.num_generations)
                others = np.flatnonzero(self.occupant[r] // self.num_generations == i)
                if others.size:
                    sharing[r, s] = int(others[0]), len(self.prompts.prompt_tokens[i]) // PAGE
                self.occupant[r, s], self.known[r, s] = new.request, 0
                slot[r, a], prompt[r, a], length[r, a] = s, new.prompt, len(self.prompts.prompt_tokens[i])
                request[r, a], sample[r, a], limit[r, a] = self.prompts.ids[i], g, self.limits[i]
                starts[r, a] = new.first + PAGE * np.arange(of_prompt)
                lengths[r, s] = length[r, a]
                entered.append((r, a, s))
        alone = lengths.copy()
        for r, s in sharing:
            alone[r, s] = 0
        self._reserve(alone)
        for (r, s), (other, count) in sharing.items():
            self.pages.share(r, s, other, count)
        self._reserve(lengths)
        pages = np.full((shards, ADMISSIONS_PER_CALL, of_prompt), self.pages.pages, np.int32)
        for r, a, s in entered:
            _, there = sharing.get((r, s), (None, 0))
            held = self.pages.of_slot(r, s)[: math.ceil(length[r, a] / PAGE)]
            pages[r, a, there : len(held)] = held[there:]
        flat = lambda x: x.reshape(shards, -1)
        admission = Admission(slot, prompt, length, request, sample, limit, flat(starts), flat(pages))
        self.state = self.sampler.admit(self.state, batch, self._split(admission), self.key)

    def _drop_empty_slots(self) -> None:
        """Halve the slots, again and again, while half of them are enough and not fewer than are worth a program."""
        shards, slots = self.occupant.shape
        used = int((self.occupant >= 0).sum(axis=1).max())
        fewer = slots
        on_cpu = self.sampler.mesh.devices.flat[0].platform == "cpu"
        fewest = MIN_SLOTS_CPU if on_cpu else shards * MIN_SLOTS_PER_DEVICE
        while fewer % 2 == 0 and used <= fewer // 2 and shards * fewer // 2 >= fewest:
            fewer //= 2
        if fewer < slots:
            of_slot = bucket(math.ceil(1.25 * self.pages.most_used / fewer), smallest=1)
            self._resize(fewer, max(self.pages.longest_table, min(of_slot, self.pages.longest_table) * fewer))

    def _reserve(self, tokens: np.ndarray) -> None:
        """Give the slots pages for `tokens` [R, S]; where too few are free, there are more from here on."""
        if lacking := self.pages.reserve(tokens):
            slots = self.occupant.shape[1]
            more = max(lacking, self.pages.pages // 4)  # a program for each number of pages
            self._resize(slots, self.pages.pages + math.ceil(more / slots) * slots)
            self.pages.reserve(tokens)

    def _resize(self, slots: int, pages: int) -> None:
        """Go on with another number of pages a shard and, where some are given up, with the occupied slots first."""
        fewer = slots < self.occupant.shape[1]
        order = np.argsort((self.occupant < 0) & fewer, axis=1, kind="stable")[:, :slots]
        self.occupant = np.take_along_axis(self.occupant, order, axis=1)
        self.known = np.take_along_axis(self.known, order, axis=1)
        kept = self._split((order, self.pages.resize(order, pages)))
        self.state = self.sampler.resize(self.state, *kept)

    def _split(self, arrays: PyTree[np.ndarray]) -> PyTree[AnyArray]:
        """Arrays of the host, [R, ...], as the programs take them."""
        one_process = self.sampler.processes == 1
        return arrays if one_process else sharding.place(arrays, sharding.rows(self.sampler.mesh))

    def _prompt_length(self, request: int) -> int:
        return len(self.prompts.prompt_tokens[request // self.num_generations])

    def _prompt_lengths(self) -> np.ndarray:
        return self._of_occupants(lambda i: len(self.prompts.prompt_tokens[i]))

    def _limits(self) -> np.ndarray:
        return self._of_occupants(lambda i: self.limits[i])

    def _of_occupants(self, of: Callable[[int], int]) -> np.ndarray:
        values = [of(r // self.num_generations) if r >= 0 else 0 for r in self.occupant.reshape(-1)]
        return np.array(values).reshape(self.occupant.shape)


def _everywhere(key: Array, mesh: Mesh) -> Array:
    data = sharding.place(np.asarray(jax.random.key_data(key)), sharding.replicated(mesh))
    return jax.jit(jax.random.wrap_key_data)(data)


def bucket(length: int, smallest: int = 128) -> int:
    """The next power of two, so that runs on like prompts share programs; splash attention takes no less than 128."""
    return max(smallest, 1 << (length - 1).bit_length())
