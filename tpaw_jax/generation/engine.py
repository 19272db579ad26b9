"""The sampling engine: the host loop that keeps the decode slots full.

Prefill packs prompts into rows of a fixed length. When a sequence finishes, its slot is refilled with the next
prefilled prompt; near the end, empty slots are dropped so that decode steps get cheaper. One chunk of decode steps is
always queued behind the running one, so the device never waits for the host.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from tpaw_jax.generation import token_sampling
from tpaw_jax.generation.cache import FREED, PAGE, Pages
from tpaw_jax.generation.slots import STEPS_PER_CHUNK, Admission, Prefilled, Sampler, Snapshot, Weights
from tpaw_jax.runtime import sharding
from tpaw_jax.storage import array_files
from tpaw_jax.types import AnyArray, Generations, PackedPrompts, Prompts, Ragged

Response = tuple[np.ndarray, np.ndarray]
"""Sampled tokens, int32, and their log-probs under the model, float32 nats."""

StopFn = Callable[[np.ndarray, int], int | None]
"""(tokens of a response, how many of them an earlier call has seen) -> how many it keeps if it ends there, or None."""

ADMISSIONS_PER_CALL = 8
"""Prompts of a shard that one call of `admit` moves into slots."""

MAX_SKIPPED = 64
"""How many prompts too long for the rest of a row are skipped in search of shorter ones."""

MIN_SLOTS_CPU = 8
"""Slots are never dropped below this number on a CPU, because decode steps would not get faster."""

MIN_SLOTS_PER_DEVICE = 128
"""The same per accelerator: below it, a step's time is that of reading the weights, and a new program must compile."""


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
    """Sample `num_generations` responses to each prompt, in the order of `prompts`.

    Request n is response n % num_generations to prompt n // num_generations; the result is in the order of requests.
    A response depends only on seed, round, prompt, prompt id and sample number.

    Args:
        limits: the most new tokens for each prompt; `max_new_tokens` by default.
        stop_fn: finds where a response ends, in addition to the stop tokens (see `stop_at`).
        finished: responses by request that are not sampled again.
        on_finished: called with new responses by request as they finish.
        progress: called with the number of requests and of tokens finished since its last call.

    Raises:
        ValueError: `limits` does not have one entry per prompt, each from 1 to `max_new_tokens`.
    """
    longest = sampler.config.max_new_tokens
    limits = [longest] * len(prompts) if limits is None else list(limits)
    if len(limits) != len(prompts) or not all(1 <= n <= longest for n in limits):
        rule = f"it must have {len(prompts)}, one per prompt, each from 1 to max_new_tokens ({longest})"
        raise ValueError(f"limits has {len(limits)} entries; {rule}.")
    responses: dict[int, Response] = dict(finished or {})
    local = sharding.resplit(params, sampler.mesh, sampler.dtype)  # a collective: also on processes without work
    missing = [i for i in range(len(prompts) * num_generations) if i not in responses]
    if missing:
        weights = sampler.prepare(local)
        del local  # possibly a copy of `params`; with the CPU kernels, only `weights` is needed from here on
        key = token_sampling.round_key(seed, round_number)
        engine = _Engine(sampler, weights, prompts, limits, num_generations=num_generations, requests=missing, key=key)
        while engine.unfinished:
            engine.refill()
            new = engine.decode(stop_fn)
            if new:
                on_finished(new)
            responses.update(new)
            progress(len(new), sum(len(tokens) for tokens, _ in new.values()))
    return generations_of(round_number, [responses[i] for i in range(len(prompts) * num_generations)])


def generations_of(round_number: int, responses: Sequence[Response]) -> Generations:
    """A round's `Generations` from its responses, in their order."""
    lengths = np.array([len(tokens) for tokens, _ in responses], np.int32)
    tokens = array_files.join((tokens for tokens, _ in responses), np.int32)
    log_probs = array_files.join((log_probs for _, log_probs in responses), np.float32)
    return Generations(round_number, Ragged.split(tokens, lengths), Ragged.split(log_probs, lengths))


def stop_at(decode: Callable[[np.ndarray], str], strings: Sequence[str]) -> StopFn:
    """A `stop_fn` for `generate`: a response ends with the token that completes one of `strings`; it keeps that token.

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
    """The indices of the prompts that this process answers, and whether all processes answer all prompts together."""
    if sampler.processes > 1:
        return np.arange(prompts), True
    return np.arange(jax.process_index(), prompts, jax.process_count()), False


class _Waiting(NamedTuple):
    """A request whose prompt is prefilled and that waits for a slot."""

    batch: Prefilled
    prompt: int  # index of the prompt in its row
    start: int  # of the prompt in its row
    request: int


class _Engine:
    """The requests of one call of `generate`, and the host's record of the device's slots and pages."""

    def __init__(
        self,
        sampler: Sampler,
        weights: Weights,
        prompts: Prompts,
        limits: Sequence[int],
        *,
        num_generations: int,
        requests: Sequence[int],
        key: Array,
    ):
        self.sampler, self.weights = sampler, weights
        self.key = _replicate_key(key, sampler.mesh) if sampler.processes > 1 else key
        self.prompts, self.limits, self.num_generations = prompts, np.array(limits), num_generations
        self.lengths = prompts.prompt_tokens.lengths
        self.requests_of: dict[int, list[int]] = {}
        for r in sorted(requests):
            self.requests_of.setdefault(r // num_generations, []).append(r)
        self.to_prefill = deque(self.requests_of)
        shards = sampler.shards
        self.waiting: list[deque[_Waiting]] = [deque() for _ in range(shards)]

        # Sizes follow from all prompts, also when a run resumes with a part of them, so that it uses the same programs.
        self.longest = int(self.lengths.max())
        even_share = math.ceil(self.lengths.sum() / shards)
        self.row = max(bucket(self.longest), min(bucket(sampler.config.prefill_tokens), bucket(even_share)))

        slots = math.ceil(min(sampler.config.slots * sampler.processes, len(prompts) * num_generations) / shards)
        sharers = min(num_generations, slots) if self.longest >= PAGE else 1  # only full pages of a prompt are shared
        shared = self.lengths // PAGE * PAGE * (1 - 1 / sharers)
        tokens = self.lengths + self.limits / 2 - shared
        entering = 0  # pages of prompts that have just been admitted
        if sampler.window is not None:  # older pages are given back
            tokens = np.minimum(tokens, sampler.window + PAGE + 2 * STEPS_PER_CHUNK)
            entering = min(slots, ADMISSIONS_PER_CALL) * math.ceil(self.longest / PAGE)
        typical = math.ceil(np.mean(tokens) / PAGE)
        table = math.ceil((self.longest + sampler.config.max_new_tokens) / PAGE)
        self.pages = Pages(shards, slots, max(table, typical * slots + entering), table, sharers)
        self.state = sampler.init(slots, self.pages.pages)
        self.occupant = np.full((shards, slots), -1)  # the request in each slot
        self.generated = np.zeros((shards, slots), int)  # new tokens of each slot in the last snapshot
        self.chunks_since = 0  # chunks of decode steps dispatched since the last snapshot

    @property
    def unfinished(self) -> bool:
        """Whether any request has no response yet."""
        return self._has_waiting or bool((self.occupant >= 0).any())

    @property
    def _has_waiting(self) -> bool:
        return bool(self.to_prefill) or any(self.waiting)

    def refill(self) -> None:
        """Put waiting requests into free slots; once none wait, drop empty slots."""
        while self._has_waiting:
            free = [np.flatnonzero(row < 0) for row in self.occupant]
            if self.to_prefill and any(len(f) and not w for f, w in zip(free, self.waiting, strict=True)):
                self._prefill()
            counts = [min(len(f), len(w), ADMISSIONS_PER_CALL) for f, w in zip(free, self.waiting, strict=True)]
            if not any(counts):
                break
            self._admit([f[:n] for f, n in zip(free, counts, strict=True)])
        if not self._has_waiting:
            self._drop_empty_slots()

    def decode(self, stop_fn: StopFn | None) -> dict[int, Response]:
        """Decode until a sixteenth of the slots, or all in use, are finished; free them and return their responses."""
        occupied, leaving = (self.occupant >= 0).sum(axis=1), max(1, self.occupant.size // 16)
        enough = max(0, int(occupied.sum()) - leaving)
        until = np.maximum(0, occupied - leaving).astype(np.int32)
        running = self._dispatch_chunk(until)
        while True:
            queued = self._dispatch_chunk(until)
            active = np.asarray(running.active)
            before, self.generated = self.generated, np.where(self.occupant >= 0, np.asarray(running.generated), 0)
            self.chunks_since = 1
            ended = self._end_by_text(running, before, stop_fn) if stop_fn else {}
            if active.sum() <= enough or ended:
                return self._collect(running, active, ended)
            running = queued

    def _dispatch_chunk(self, until_active: np.ndarray) -> Snapshot:
        """Dispatch a chunk of decode steps, after reserving pages for every token it may write."""
        self.chunks_since += 1
        prompts = np.maximum(self.occupant, 0) // self.num_generations
        self._expire_pages()
        new_tokens = np.minimum(self.generated + self.chunks_since * STEPS_PER_CHUNK, self.limits[prompts])
        self._reserve(np.where(self.occupant >= 0, self.lengths[prompts] + new_tokens, 0))
        self.state, snapshot = self.sampler.decode(
            self.weights.decode, self.state, self._place(self.pages.table()), self.key, self._place(until_active)
        )
        return snapshot

    def _end_by_text(self, snapshot: Snapshot, before: np.ndarray, stop_fn: StopFn) -> dict[tuple[int, int], int]:
        """Make the slots idle whose response `stop_fn` ends; returns the number of tokens each of them keeps."""
        tokens, ended = np.asarray(snapshot.tokens), {}
        for slot in zip(*np.nonzero(self.occupant >= 0), strict=True):
            kept = stop_fn(tokens[slot][: self.generated[slot]], int(before[slot]))
            if kept is not None:
                ended[slot] = kept
        mask = np.zeros(self.occupant.shape, bool)
        for slot in ended:
            mask[slot] = True
        if ended:
            self.state = self.sampler.cancel(self.state, self._place(mask))
        return ended

    def _collect(
        self, snapshot: Snapshot, active: np.ndarray, ended: Mapping[tuple[int, int], int]
    ) -> dict[int, Response]:
        """Free the finished slots; returns their responses by request."""
        tokens, log_probs = np.asarray(snapshot.tokens), np.asarray(snapshot.log_probs)
        responses: dict[int, Response] = {}
        for slot in zip(*np.nonzero(self.occupant >= 0), strict=True):
            if slot in ended or not active[slot]:
                count = ended.get(slot, self.generated[slot])
                responses[int(self.occupant[slot])] = tokens[slot][:count].copy(), log_probs[slot][:count].copy()
                self.occupant[slot] = -1
                self.pages.release(*slot)
        return responses

    def _prefill(self) -> None:
        """Prefill one row of prompts per shard; an empty row where a row of prefilled tokens already waits."""
        shards, max_prompts = len(self.waiting), max(1, self.row // 16)
        tokens, positions, segments = np.zeros((3, shards, self.row), np.int32)
        first, lengths = np.zeros((shards, max_prompts), np.int32), np.ones((shards, max_prompts), np.int32)
        tokens_of = lambda w: self.lengths[w.request // self.num_generations]
        waiting = [sum(map(tokens_of, queue)) for queue in self.waiting]
        filled = {r: (0, 0) for r in range(shards) if waiting[r] < self.row}  # tokens and prompts in the row
        placed: list[tuple[int, int, int, int]] = []
        skipped: list[int] = []
        while self.to_prefill and len(skipped) < MAX_SKIPPED:
            i = self.to_prefill.popleft()
            prompt = self.prompts.prompt_tokens[i]
            fitting = (r for r, (used, n) in filled.items() if n < max_prompts and used + len(prompt) <= self.row)
            row = min(fitting, key=lambda r: waiting[r] + filled[r][0], default=None)
            if row is None:
                skipped.append(i)
                continue
            start, n = filled[row]
            run = slice(start, start + len(prompt))
            tokens[row, run], positions[row, run], segments[row, run] = prompt, np.arange(len(prompt)), n + 1
            first[row, n], lengths[row, n] = start, len(prompt)
            filled[row] = run.stop, n + 1
            placed.append((row, n, start, i))
        self.to_prefill.extendleft(reversed(skipped))
        packed = PackedPrompts(tokens, positions, segments, first, lengths)
        batch = self.sampler.prefill(self.weights.prefill, self._place(packed))
        for row, n, start, i in placed:
            self.waiting[row].extend(_Waiting(batch, n, start, request) for request in self.requests_of[i])

    def _admit(self, free: list[np.ndarray]) -> None:
        """Move waiting requests into the `free` slots of their shards, as far as they come from one prefill batch."""
        shards, slots = self.occupant.shape
        batch = next(queue[0].batch for queue, f in zip(self.waiting, free, strict=True) if len(f))
        prompt_pages = math.ceil(self.longest / PAGE)
        slot = np.full((shards, ADMISSIONS_PER_CALL), slots, np.int32)
        index_in_row, length, prompt_id, sample, limit = np.zeros((5, shards, ADMISSIONS_PER_CALL), np.int32)
        starts = np.zeros((shards, ADMISSIONS_PER_CALL, prompt_pages), np.int32)
        admitted: list[tuple[int, int, int]] = []
        donors: dict[tuple[int, int], int] = {}  # the slot with the same prompt whose pages a new slot shares
        for r, queue in enumerate(self.waiting):
            for a, s in enumerate(free[r]):
                if queue[0].batch is not batch:
                    break
                new = queue.popleft()
                i, g = divmod(new.request, self.num_generations)
                others = np.flatnonzero(self.occupant[r] // self.num_generations == i).tolist()
                donor = next((other for other in others if FREED not in self.pages.of_slot(r, other)), None)
                if donor is not None:
                    donors[r, s] = donor
                self.occupant[r, s], self.generated[r, s] = new.request, 0
                slot[r, a], index_in_row[r, a], length[r, a] = s, new.prompt, self.lengths[i]
                prompt_id[r, a], sample[r, a], limit[r, a] = self.prompts.ids[i], g, self.limits[i]
                starts[r, a] = new.start + PAGE * np.arange(prompt_pages)
                admitted.append((r, a, s))
        pages = self._give_pages(admitted, length, donors)
        flat = lambda x: x.reshape(shards, -1)
        admission = Admission(slot, index_in_row, length, prompt_id, sample, limit, flat(starts), flat(pages))
        self.state = self.sampler.admit(self.state, batch, self._place(admission), self.key)
        self._expire_pages()

    def _give_pages(
        self, admitted: list[tuple[int, int, int]], length: np.ndarray, donors: Mapping[tuple[int, int], int]
    ) -> np.ndarray:
        """Reserve the pages of admitted prompts; returns those to write, [R, A, pages of a prompt].

        `admitted` are (shard, entry, slot), `length` [R, A] the prompts' tokens, and `donors` the slots whose full
        pages a slot shares. Shared pages are already written.
        """
        unshared, all_tokens = np.zeros((2, *self.occupant.shape), int)
        for r, a, s in admitted:
            all_tokens[r, s] = length[r, a]
            unshared[r, s] = 0 if (r, s) in donors else length[r, a]
        self._reserve(unshared)  # before sharing, since a donor may itself be admitted in this call
        shared = {(r, s): int(length[r, a]) // PAGE for r, a, s in admitted if (r, s) in donors}
        for (r, s), count in shared.items():
            self.pages.share(r, s, donors[r, s], count)
        self._reserve(all_tokens)
        pages = np.full((*length.shape, math.ceil(self.longest / PAGE)), self.pages.pages, np.int32)
        for r, a, s in admitted:
            written = shared.get((r, s), 0)
            held = self.pages.of_slot(r, s)[: math.ceil(length[r, a] / PAGE)]
            pages[r, a, written : len(held)] = held[written:]
        return pages

    def _expire_pages(self) -> None:
        """Give back the pages that no query of a slot sees any more; `generated` lags behind the device."""
        if self.sampler.window is not None:
            prompts = np.maximum(self.occupant, 0) // self.num_generations
            self.pages.expire(self.lengths[prompts] + self.generated - self.sampler.window)

    def _drop_empty_slots(self) -> None:
        """Halve the number of slots as often as the occupied ones fit and the minimum number of slots allows."""
        shards, slots = self.occupant.shape
        used = int(np.max(np.sum(self.occupant >= 0, axis=1)))
        fewer = slots
        on_cpu = self.sampler.mesh.devices.flat[0].platform == "cpu"
        fewest = MIN_SLOTS_CPU if on_cpu else shards * MIN_SLOTS_PER_DEVICE
        while fewer % 2 == 0 and used <= fewer // 2 and shards * fewer // 2 >= fewest:
            fewer //= 2
        if fewer < slots:
            per_slot = bucket(math.ceil(1.25 * self.pages.most_used / fewer), smallest=1)
            self._resize(fewer, max(self.pages.longest_table, min(per_slot, self.pages.longest_table) * fewer))

    def _reserve(self, tokens: np.ndarray) -> None:
        """Reserve pages for `tokens` [R, S]; grows the pool if too few pages are free."""
        if shortfall := self.pages.reserve(tokens):
            slots = self.occupant.shape[1]
            more = max(shortfall, self.pages.pages // 4)  # grow in large steps: each pool size compiles new programs
            self._resize(slots, self.pages.pages + math.ceil(more / slots) * slots)
            self.pages.reserve(tokens)

    def _resize(self, slots: int, pages: int) -> None:
        """Change the number of pages per shard, and drop slots; occupied slots come first if any are dropped."""
        fewer = slots < self.occupant.shape[1]
        order = np.argsort((self.occupant < 0) & fewer, axis=1, kind="stable")[:, :slots]
        self.occupant = np.take_along_axis(self.occupant, order, axis=1)
        self.generated = np.take_along_axis(self.generated, order, axis=1)
        kept = self._place((order, self.pages.resize(order, pages)))
        self.state = self.sampler.resize(self.state, *kept)

    def _place(self, arrays: PyTree[np.ndarray]) -> PyTree[AnyArray]:
        """Host arrays [R, ...] as the programs take them: split over the devices of all processes if several sample."""
        one_process = self.sampler.processes == 1
        return arrays if one_process else sharding.place(arrays, sharding.rows(self.sampler.mesh))


def _replicate_key(key: Array, mesh: Mesh) -> Array:
    data = sharding.place(np.asarray(jax.random.key_data(key)), sharding.replicated(mesh))
    return jax.jit(jax.random.wrap_key_data)(data)


def bucket(length: int, smallest: int = 128) -> int:
    """`length` rounded up to a power of two, so that similar runs share programs; attention on TPU needs >= 128."""
    return max(smallest, 1 << (length - 1).bit_length())
