"""Our side of the sampling comparison: slots that refill. python tpaw_sampling.py WORKLOAD.json SLOTS DTYPE

Run by ../sampling.py. The line has the share of slots busy, prefill and decode apart, and the bounds of both, measured
in the same process: decoding must read the weights once a step, prefill computes the model's matmuls, whose peak is
that of products in the compute dtype, by XLA or by our kernels, whichever are faster.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import jax
import jax.numpy as jnp
import numpy as np

from tpaw_jax.config import SamplingConfig
from tpaw_jax.generation import engine
from tpaw_jax.generation.cpu import kernels
from tpaw_jax.generation.decoder import decoder_of
from tpaw_jax.generation.slots import make_sampler
from tpaw_jax.models import Transformer
from tpaw_jax.models.attention import TILES
from tpaw_jax.observe.profiling import compile_log
from tpaw_jax.runtime.host import restart_with_huge_pages
from tpaw_jax.types import Prompts


def main() -> None:
    restart_with_huge_pages()
    work, slots, dtype = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), jnp.dtype(sys.argv[3])
    architecture = common.MODELS[work["name"]]
    model = Transformer(architecture, dtype=dtype, attention=TILES)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    count = len(work["prompts"])
    ids = tuple(np.array(p, np.int32) for p in work["prompts"])
    prompts = Prompts(np.arange(count, dtype=np.int32), ids, ids)
    config = SamplingConfig(max_new_tokens=work["longest"]["response"], slots=slots)
    sampler = make_sampler(decoder_of(model), config, ())
    watch = Watch(sampler)
    answer = lambda limits: engine.generate(watch.sampler, params, prompts, seed=0, round_number=0, limits=limits)
    with compile_log() as compiled:
        answer(work["limits"])
    watch.start()
    start = time.perf_counter()
    made = answer(work["limits"])
    seconds = time.perf_counter() - start - watch.reading
    useful = sum(map(len, made.tokens))
    assert useful == sum(work["limits"])
    weights = sum(x.size * dtype.itemsize for x in jax.tree.leaves(params))
    of_token = 2 * architecture.num_layers * architecture.num_kv_heads * architecture.head_dim * dtype.itemsize
    bandwidth = watch.bandwidth
    ways = (False, True) if kernels.available() else (False,)
    of_way = lambda packed: common.matmul_peak(architecture, 512, backward=False, dtype=dtype, packed=packed)
    peak = max(of_way(packed)["median"] for packed in ways)
    prompt_tokens, matmul = sum(map(len, ids)), 2 * sum(x.size for x in jax.tree.leaves(params["layers"]))
    flops_of_token = matmul + 2 * architecture.vocab_size * architecture.hidden_size
    reading = (weights * watch.steps + of_token * watch.cached) / bandwidth
    multiplying = flops_of_token * watch.busy / 1e9 / peak
    head = 2 * architecture.vocab_size * architecture.hidden_size * count
    programs = ("prefill", "admit", "decode", "resize")
    print(
        json.dumps(
            {
                "requests": count,
                "tokens": useful,
                "seconds": seconds,
                "tokens_per_second": useful / seconds,
                **{f"{name}_seconds": watch.seconds[name] for name in programs},
                "host_seconds": seconds - sum(watch.seconds.values()),
                "slots_busy": watch.busy / watch.there,
                "steps": watch.steps,
                "step_milliseconds": 1e3 * watch.seconds["decode"] / watch.steps,
                "read_bandwidth_gb_per_second": bandwidth / 1e9,
                "share_of_bandwidth": reading / watch.seconds["decode"],
                "share_of_bound": max(reading, multiplying) / watch.seconds["decode"],
                "prefill_gflops": (prompt_tokens * matmul + head) / watch.seconds["prefill"] / 1e9,
                "matmul_peak_gflops": peak,
                "share_of_peak": (prompt_tokens * matmul + head) / watch.seconds["prefill"] / 1e9 / peak,
                "compiled": {f"jit({name})": [n for n, _ in compiled].count(f"jit({name})") for name in programs},
                "compile_seconds": sum(s for _, s in compiled),
                "machine": common.machine(),
            }
        )
    )


class Watch:
    """A sampler whose programs are awaited and timed; between chunks of decoding, a sum reads half a GiB.

    What a sum reads can change by half within a run, so the two take turns.
    """

    def __init__(self, sampler: engine.Sampler):
        self._array, self._sum = jnp.ones(2**27, jnp.float32), jax.jit(jnp.sum)
        self._sum(self._array).block_until_ready()
        timed = {name: self._timed(name, getattr(sampler, name)) for name in ("prefill", "admit", "resize")}
        self.sampler = sampler._replace(decode=self._decode(self._timed("decode", sampler.decode)), **timed)
        self.start()

    def start(self) -> None:
        self.seconds = dict.fromkeys(("prefill", "admit", "decode", "resize"), 0.0)
        self.steps = self.busy = self.there = self.cached = 0
        self._readings: list[float] = []  # seconds

    @property
    def reading(self) -> float:
        """Seconds that the sums have taken."""
        return sum(self._readings)

    @property
    def bandwidth(self) -> float:
        """Bytes a second that the median sum has read."""
        return self._array.nbytes / np.median(self._readings)

    def _timed(self, name, program):
        def run(*arguments):
            jax.block_until_ready(arguments)
            start = time.perf_counter()
            result = jax.block_until_ready(program(*arguments))
            self.seconds[name] += time.perf_counter() - start
            return result

        return run

    def _decode(self, program):
        def run(weights, state, *rest):
            steps, busy = int(state.steps[0]), int(state.busy[0])
            cached = int(np.asarray(state.position)[np.asarray(state.active)].sum())
            state, look = program(weights, state, *rest)
            made = int(state.steps[0]) - steps
            self.steps += made
            self.busy += int(state.busy[0]) - busy
            self.there += made * state.active.size
            self.cached += made * cached
            self._readings.append(common.seconds_of(lambda: self._sum(self._array)))
            return state, look

        return run


if __name__ == "__main__":
    main()
