"""Sampling: a policy answers prompts, and the responses are kept in files.

Read in this order:

1. `engine`: `generate`, the host loop that keeps the decode slots full.
2. `slots`: the state of the slots on the device, and the compiled programs that change it.
3. `cache`: the paged key-value cache, allocated on the host and read by attention on the device.
4. `decoder`: what the sampler needs from a model, prefill and a decode step; `decode_step`: that step for our
   `Transformer`; `cpu`: C++ kernels for it.
5. `token_sampling`: logits to tokens, by temperature, top-k, top-p and the random stream of each token.
6. `policy`: a model with its template and sampler, loaded from a configuration.
7. `generation_file`: responses as JSON lines, from another engine or of an unfinished round.
8. `completions`: `tpaw generate`. It is not re-exported, because importing Orbax takes seconds.
"""

from tpaw_jax.generation.cache import PAGE as PAGE
from tpaw_jax.generation.cache import Pages as Pages
from tpaw_jax.generation.cache import PageTable as PageTable
from tpaw_jax.generation.decoder import Decoder as Decoder
from tpaw_jax.generation.decoder import decoder_from_apply_fn as decoder_from_apply_fn
from tpaw_jax.generation.decoder import decoder_of as decoder_of
from tpaw_jax.generation.engine import StopFn as StopFn
from tpaw_jax.generation.engine import bucket as bucket
from tpaw_jax.generation.engine import gather_from_processes as gather_from_processes
from tpaw_jax.generation.engine import generate as generate
from tpaw_jax.generation.engine import local_share as local_share
from tpaw_jax.generation.engine import stop_at as stop_at
from tpaw_jax.generation.policy import SPEED_ONLY_KEYS as SPEED_ONLY_KEYS
from tpaw_jax.generation.policy import Policy as Policy
from tpaw_jax.generation.policy import open_policy as open_policy
from tpaw_jax.generation.policy import stop_tokens as stop_tokens
from tpaw_jax.generation.slots import STEPS_PER_CHUNK as STEPS_PER_CHUNK
from tpaw_jax.generation.slots import DecodeState as DecodeState
from tpaw_jax.generation.slots import Sampler as Sampler
from tpaw_jax.generation.slots import make_sampler as make_sampler
from tpaw_jax.generation.token_sampling import round_key as round_key
